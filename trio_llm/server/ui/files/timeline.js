// The last steps as bars: the tokens that each computed, in proportion to the budget, and its time below.
import { color, prepared, redrawWith } from "./colors.js";
import { byId } from "./dom.js";

const [TOKENS_PX, GAP_PX, TIME_PX, BAR_PX] = [110, 14, 34, 7];
const MAX_STEPS = 512;

export class Timeline {
  #steps = [];
  #budget = 0;
  #prompts = null;
  #at = null;

  constructor() {
    const canvas = byId("timeline");
    redrawWith(canvas, () => this.#draw());
    canvas.addEventListener("pointermove", (event) => this.#point(Math.floor(event.offsetX / BAR_PX)));
    canvas.addEventListener("pointerleave", () => this.#point(null));
    canvas.addEventListener("blur", () => this.#point(null));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      this.#point(this.#at === null ? this.#shown().length - 1 : this.#at + step);
    });
  }

  add(steps, budget, prompts) {
    this.#steps = [...this.#steps, ...steps].slice(-MAX_STEPS);
    [this.#budget, this.#prompts] = [budget, prompts];
    this.#draw();
    this.#say();
  }

  #shown() {
    return this.#steps.slice(-Math.max(1, Math.floor(byId("timeline").clientWidth / BAR_PX)));
  }

  #point(at) {
    this.#at = at === null ? null : Math.min(Math.max(at, 0), this.#shown().length - 1);
    this.#draw();
    this.#say();
  }

  #draw() {
    const canvas = byId("timeline");
    const steps = this.#shown();
    if (!steps.length || canvas.clientWidth === 0) return;
    const { context, width, height } = prepared(canvas, TOKENS_PX + GAP_PX + TIME_PX);
    const most = Math.max(8, ...steps.map((step) => step.tokens)) * 1.1;
    const longest = usualMaximum(steps.map((step) => step.ms + (step.own_ms ?? 0)));
    const tokens = (count) => (count / most) * TOKENS_PX;
    const time = (ms) => (Math.min(ms, longest) / longest) * TIME_PX;
    const bar = (name, x, bottom, tall) => {
      context.fillStyle = color(name);
      context.fillRect(x, bottom - tall, BAR_PX - 2, tall);
    };
    for (const [at, step] of steps.entries()) {
      const x = at * BAR_PX;
      const decode = tokens(step.tokens - step.prefill_tokens);
      bar("decode", x, TOKENS_PX, decode);
      bar("prefill", x, TOKENS_PX - decode, tokens(step.prefill_tokens));
      if (step.preempted) bar("danger", x, TOKENS_PX + 5, 4);
      bar("model-time", x, height, time(step.ms));
      const around = time(step.ms + (step.own_ms ?? 0)) - time(step.ms);
      bar("own-time", x, height - time(step.ms), around);
    }
    if (this.#at !== null) {
      context.fillStyle = color("pointed");
      context.fillRect(this.#at * BAR_PX - 1, 0, BAR_PX, height);
    }
    this.#line(context, width, tokens(this.#budget), "budget");
    if (this.#prompts !== null) this.#line(context, width, tokens(this.#prompts), "prompt tokens now");
  }

  // A limit, where it is not above what is drawn.
  #line(context, width, tall, label) {
    if (tall > TOKENS_PX) return;
    const y = Math.round(TOKENS_PX - tall) + 0.5;
    context.strokeStyle = context.fillStyle = color("muted");
    context.setLineDash([5, 4]);
    context.beginPath();
    context.moveTo(0, y);
    context.lineTo(width, y);
    context.stroke();
    context.setLineDash([]);
    context.font = "11px system-ui, sans-serif";
    context.textAlign = "right";
    context.fillText(label, width - 4, y < 14 ? y + 12 : y - 4);
  }

  #say() {
    const text = byId("timeline-text");
    const step = this.#at === null ? undefined : this.#shown()[this.#at];
    if (step === undefined) {
      const most = Math.max(0, ...this.#shown().map((one) => one.tokens));
      const share = this.#budget ? ((100 * most) / this.#budget).toFixed(0) : 0;
      const prompts = this.#prompts === null ? "" : `, ${this.#prompts.toLocaleString("en")} of prompts now`;
      text.textContent = `Budget of a step: ${this.#budget.toLocaleString("en")} tokens${prompts}. The fullest shown: ${share} %.`;
      return;
    }
    const preempted = step.preempted ? `, ${step.preempted} preempted` : "";
    const own = step.own_ms === null ? "" : ` + ${step.own_ms.toFixed(1)} ms around it`;
    text.textContent = `Step ${step.step}: ${step.rows} sequences, ${step.prefill_tokens} prompt tokens, `
      + `${step.tokens - step.prefill_tokens} decoded${preempted}, ${step.ms.toFixed(1)} ms in the model${own}`;
  }
}

// One step that took long must not flatten all others.
function usualMaximum(times) {
  const ordered = times.toSorted((one, other) => one - other);
  return Math.max(1.5 * ordered[Math.floor(0.95 * (ordered.length - 1))], 0.001);
}
