// The figures at the top: what runs, how fast, and what the caches and drafts bring.
import { byId } from "./dom.js";

// Rates are means over so many seconds, shares over so many steps.
const WINDOW_S = 1;
const STEPS = 1024;
const whole = new Intl.NumberFormat("en");
const percent = (part, all) => (all ? `${((100 * part) / all).toFixed(part === all ? 0 : 1)} %` : "–");
export const rate = (value) => (value === null ? "–" : value < 10 ? value.toFixed(1) : whole.format(Math.round(value)));
const sum = (rows, name) => rows.reduce((total, row) => total + row[name], 0);

export class Figures {
  #marks = []; // { at, generated, prefill }: tokens since the mark before.
  #steps = [];

  // Forgets the times: nothing is known of those without a connection.
  restart() {
    this.#marks = [];
  }

  // Shows a state and returns its rates, null while they are not known.
  add(frame) {
    this.#steps = [...this.#steps, ...frame.steps].slice(-STEPS);
    const rates = this.#rates(frame);
    const { states, blocks_per_cell: size } = frame.pool;
    const used = [...states].filter((state) => state === "u" || state === "s").length;
    set("running", whole.format(frame.running));
    set("waiting", whole.format(frame.waiting));
    set("generated-rate", rate(rates.generated));
    set("prefill-rate", rate(rates.prefill));
    set("used", `${size > 1 ? "≤ " : ""}${percent(used, states.length)}`);
    set("hits", percent(sum(this.#steps, "hit_tokens"), sum(this.#steps, "queried_tokens")));
    set("accepted", percent(sum(this.#steps, "accepted"), sum(this.#steps, "drafted")));
    const last = this.#steps.at(-1);
    set("step-time", last ? `${last.ms.toFixed(last.ms < 10 ? 2 : 1)} ms` : "–");
    return rates;
  }

  #rates(frame) {
    this.#marks.push({
      at: frame.at_s, generated: sum(frame.steps, "generated_tokens"), prefill: sum(frame.steps, "prefill_tokens"),
    });
    while (this.#marks.length > 2 && frame.at_s - this.#marks[1].at >= WINDOW_S) this.#marks.shift();
    const [first, ...rest] = this.#marks;
    const seconds = frame.at_s - first.at;
    if (!seconds) return { generated: null, prefill: null };
    return { generated: sum(rest, "generated") / seconds, prefill: sum(rest, "prefill") / seconds };
  }
}

function set(name, text) {
  byId(`figure-${name}`).textContent = text;
}
