// The last minute as curves: tokens a second, times to the first token and between tokens.
import { color, redrawWith } from "./colors.js";
import { byId } from "./dom.js";
import uPlot from "./vendor/uPlot.esm.js";

const [WINDOW_S, HEIGHT] = [60, 130];
const seconds = (ms) => (ms < 1000 ? `${ms} ms` : `${ms / 1000} s`);

export class Curves {
  #curves = [
    new Curve("rates", ["decode", "prefill"], (value) => value),
    new Curve("first-token", ["decode", "danger"], seconds, true),
    new Curve("inter-token", ["decode", "danger"], seconds),
  ];

  add(at, rates, firstToken, interToken) {
    const rows = [
      [rates.generated, rates.prefill],
      [firstToken?.p50_ms ?? null, firstToken?.p95_ms ?? null],
      [interToken?.p50_ms ?? null, interToken?.p95_ms ?? null],
    ];
    for (const [index, curve] of this.#curves.entries()) curve.add(at, rows[index]);
  }
}

class Curve {
  #box;
  #names;
  #label;
  #dots; // Whether each value is a dot: a line needs two.
  #columns; // Times, then one column per line.
  #plot = null;

  constructor(name, names, label, dots = false) {
    this.#box = byId(`curve-${name}`);
    this.#names = names;
    this.#label = label;
    this.#dots = dots;
    this.#columns = [[], ...names.map(() => [])];
    redrawWith(this.#box, () => this.#draw(true));
  }

  add(at, values) {
    for (const [index, value] of [at, ...values].entries()) this.#columns[index].push(value);
    const old = this.#columns[0].findIndex((time) => at - time <= WINDOW_S);
    if (old > 0) for (const column of this.#columns) column.splice(0, old);
    this.#draw(false);
  }

  #draw(again) {
    if (this.#box.clientWidth === 0 || !this.#columns[0].length) return;
    if (again) {
      this.#plot?.destroy();
      this.#plot = null;
    }
    this.#plot ??= new uPlot(this.#options(), this.#columns, this.#box);
    const now = this.#columns[0].at(-1);
    this.#plot.batch(() => {
      this.#plot.setData(this.#columns, false);
      this.#plot.setScale("x", { min: now - WINDOW_S, max: now });
    });
  }

  #options() {
    const axis = { stroke: color("muted"), grid: { stroke: color("line"), width: 1 }, ticks: { show: false } };
    const now = () => this.#columns[0].at(-1);
    const splits = () => [60, 40, 20, 0].map((ago) => now() - ago);
    const ago = (plot, times) => times.map((time) => `${Math.round(time - now())} s`.replace("-", "−"));
    return {
      width: this.#box.clientWidth,
      height: HEIGHT,
      padding: [8, 16, 0, 0],
      legend: { show: false },
      cursor: { show: false },
      scales: { x: { time: false, auto: false }, y: { range: (plot, low, high) => [0, Math.max(high ?? 1, 1) * 1.1] } },
      axes: [
        { ...axis, splits, values: ago, size: 26 },
        { ...axis, values: (plot, values) => values.map(this.#label), size: 56 },
      ],
      series: [{}, ...this.#names.map((name) => (
        { stroke: color(name), width: 1.5, spanGaps: true, points: { show: this.#dots, size: 4 } }
      ))],
    };
  }
}
