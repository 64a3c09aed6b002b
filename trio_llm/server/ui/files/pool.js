// The map of the KV cache: a cell per block, in the colour of the request that owns it.
import { color, prepared, redrawWith, requestColor } from "./colors.js";
import { byId } from "./dom.js";

const MEANINGS = { s: "shared", u: "used", c: "free, cached", f: "free" };
const [SMALLEST, LARGEST, HEIGHT] = [4, 26, 250];

export class PoolMap {
  #pool = null;
  #names = new Map();
  #columns = 1;
  #size = LARGEST;
  #at = null; // The cell under the pointer or the keyboard's cursor.

  constructor() {
    const canvas = byId("pool");
    redrawWith(canvas, () => this.#draw());
    canvas.addEventListener("pointermove", (event) => {
      const cell = Math.floor(event.offsetY / this.#size) * this.#columns + Math.floor(event.offsetX / this.#size);
      this.#point(event.offsetX < this.#columns * this.#size ? cell : null);
    });
    canvas.addEventListener("pointerleave", () => this.#point(null));
    canvas.addEventListener("blur", () => this.#point(null));
    canvas.addEventListener("keydown", (event) => this.#move(event));
  }

  show(pool, requests) {
    this.#pool = pool;
    this.#names = new Map(requests.map(({ number, id }) => [number, id ?? `request ${number}`]));
    this.#draw();
    this.#say();
  }

  #move(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.#columns, ArrowDown: this.#columns };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.#point(this.#at === null ? 0 : this.#at + steps[event.key]);
  }

  #point(cell) {
    const cells = this.#pool?.states.length ?? 0;
    this.#at = cell === null || cells === 0 ? null : Math.min(Math.max(cell, 0), cells - 1);
    this.#draw();
    this.#say();
  }

  #draw() {
    const canvas = byId("pool");
    if (this.#pool === null || canvas.clientWidth === 0) return;
    const { states, owners, references } = this.#pool;
    const fitting = Math.floor(Math.sqrt((canvas.clientWidth * HEIGHT) / states.length));
    this.#size = Math.min(Math.max(fitting, SMALLEST), LARGEST);
    this.#columns = Math.max(1, Math.floor(canvas.clientWidth / this.#size));
    const { context } = prepared(canvas, Math.ceil(states.length / this.#columns) * this.#size + 2);
    const side = this.#size - (this.#size > 6 ? 2 : 1);
    const plain = { c: color("cached"), f: color("free") };
    for (const [cell, state] of [...states].entries()) {
      const x = (cell % this.#columns) * this.#size;
      const y = Math.floor(cell / this.#columns) * this.#size;
      context.fillStyle = plain[state] ?? requestColor(owners[cell]);
      context.fillRect(x, y, side, side);
      if (references[cell] > 1) { // Shared: a hole.
        context.fillStyle = color("surface");
        context.fillRect(x + side / 3, y + side / 3, side / 3, side / 3);
      }
    }
    if (this.#at !== null) {
      context.strokeStyle = color("text");
      context.lineWidth = 2;
      const x = (this.#at % this.#columns) * this.#size;
      context.strokeRect(x + 1, Math.floor(this.#at / this.#columns) * this.#size + 1, side - 1, side - 1);
    }
  }

  #say() {
    const text = byId("pool-text");
    if (this.#pool === null) return;
    const { total_blocks: total, blocks_per_cell: size, states, owners, references } = this.#pool;
    if (this.#at === null) {
      const each = size > 1 ? `, ${size} in each cell` : "";
      text.textContent = `${total.toLocaleString("en")} blocks${each}. Point at one, or use the arrow keys.`;
      return;
    }
    const first = this.#at * size + 1;
    const last = Math.min(first + size - 1, total);
    const name = size > 1 ? `Blocks ${first} to ${last}` : `Block ${first}`;
    const owner = owners[this.#at] ? `, ${this.#names.get(owners[this.#at]) ?? `request ${owners[this.#at]}`}` : "";
    const count = references[this.#at];
    text.textContent = `${name}: ${MEANINGS[states[this.#at]]}${owner}, ${count} reference${count === 1 ? "" : "s"}`;
  }
}
