// Colours for drawing: the style sheet's, and one for each request.

// Returns a variable of the style sheet as it is now, light or dark.
export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// Neighbouring numbers get hues far apart.
export function requestColor(number) {
  const hue = (number * 137.508) % 360;
  return `hsl(${hue.toFixed(0)} ${color("request-saturation")} ${color("request-lightness")})`;
}

// Calls `draw` when the system changes between light and dark, and when the element changes its width.
export function redrawWith(element, draw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(draw).observe(element);
}

// Sizes a canvas to its box, in device pixels; returns its context and size in CSS pixels.
export function prepared(canvas, height) {
  const width = canvas.clientWidth;
  const scale = devicePixelRatio;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return { context, width, height };
}
