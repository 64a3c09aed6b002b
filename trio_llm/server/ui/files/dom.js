// Small helpers for the document.

export const byId = (id) => document.getElementById(id);

// Makes an element; properties are those of the object, so text is never parsed as markup.
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Makes a button that shows for a moment that it has copied a text.
export function copyButton(text) {
  const button = element("button", { type: "button", className: "link", textContent: "Copy" });
  button.addEventListener("click", () => copy(button, text()));
  return button;
}

export async function copy(button, text) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch { // Browsers allow it on https and localhost only.
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = label; }, 1500);
}
