// The heat map of all ranks: a canvas, because there may be twelve thousand of them.

import { MEASURES, median } from "./board.js";
import { find, layOut } from "./cells.js";
import { byId, setText, variable } from "./dom.js";
import * as format from "./format.js";
import { colour, domain, inkOn } from "./scale.js";

const WORKS = ["training", "done"];
const LEGEND_WIDTH = 160;
const FAR = 1.5; // times the median
const MOST_MARKED = 40;
const NAMED = 12; // ranks that a sentence lists

export class HeatMap {
  #board = null;
  #cells = null;
  #shape = "";
  #values = [];
  #chosen = null;
  #onOpen;

  // `onOpen(rank)`: somebody wants to see more of a rank.
  constructor(onOpen) {
    this.#onOpen = onOpen;
    const canvas = byId("heat");
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("click", () => this.#open());
    canvas.addEventListener("keydown", (event) => this.#press(event));
    byId("heat-measure").addEventListener("change", () => this.show(this.#board));
    new ResizeObserver(() => this.#board && this.show(this.#board)).observe(canvas.parentElement);
  }

  show(board) {
    this.#board = board;
    byId("heat-box").hidden = !board.numRanks;
    if (!board.numRanks) return setText(byId("heat-note"), "No rank has been started yet.");
    const measure = this.#measure;
    this.#values = measure.of(board.ranks);
    const middle = median(this.#values);
    const limits = domain(this.#values, middle ?? 0);
    this.#place();
    this.#draw(limits);
    this.#mark(middle);
    this.#drawLegend(limits);
    const said = summary(board, measure, this.#values, middle);
    setText(byId("heat-note"), said);
    byId("heat").setAttribute("aria-label", `${said} Arrow keys go from rank to rank, Enter opens the log.`);
    this.#tell();
  }

  get #measure() {
    return MEASURES[byId("heat-measure").value];
  }

  #place() {
    const { ranks } = this.#board;
    const width = byId("heat").parentElement.clientWidth;
    const counts = countsOf(ranks.node);
    const shape = `${width}/${counts}`;
    if (shape !== this.#shape) this.#cells = layOut(counts, width);
    this.#shape = shape;
    fit(byId("heat"), width, this.#cells.height);
  }

  #draw([low, high]) {
    const { x, y, w, h, labels } = this.#cells;
    const pen = byId("heat").getContext("2d");
    const edge = edgeOf(w);
    const isNamed = w >= 22 && h >= 14;
    pen.textBaseline = "middle";
    pen.font = "12px system-ui, sans-serif";
    const [quiet, bad] = [variable("--quiet"), variable("--bad")];
    for (let i = 0; i < x.length; i++) {
      const value = this.#values[i];
      const works = WORKS.includes(this.#board.stateOf(i)) && value != null;
      const share = works ? (value - low) / (high - low) : 0;
      if (works) {
        pen.fillStyle = colour(share);
        pen.fillRect(x[i], y[i], w - edge, h - edge);
      } else {
        const hasFailed = this.#board.stateOf(i) === "failed";
        drawIdle(pen, [x[i], y[i], w - edge, h - edge], hasFailed ? bad : quiet, hasFailed);
      }
      if (isNamed) this.#write(pen, i, works ? inkOn(share) : quiet);
    }
    pen.fillStyle = quiet;
    for (const { node, x: left, y: middle } of labels) pen.fillText(this.#nodeName(node), left, middle, 78);
    if (this.#chosen !== null && this.#chosen < x.length) this.#outline(pen, this.#chosen, variable("--chosen"), 2);
  }

  // Among thousands of cells of a few pixels one that stands out is not seen.
  #mark(middle) {
    const pen = byId("heat").getContext("2d");
    const slow = this.#measure.isTime && !this.#cells.labels.length ? farAbove(this.#values, middle) : [];
    byId("heat-marked").hidden = !slow.length;
    for (const i of slow) this.#outline(pen, i, variable("--chosen"), 1);
  }

  #outline(pen, i, ink, away) {
    const { x, y, w, h } = this.#cells;
    const grown = 2 * away - edgeOf(w);
    pen.strokeStyle = ink;
    pen.lineWidth = 2;
    pen.strokeRect(x[i] - away, y[i] - away, w + grown, h + grown);
  }

  #write(pen, i, ink) {
    const { x, y, w, h } = this.#cells;
    const rank = `${this.#board.ranks.rank[i]}`;
    const value = this.#values[i];
    const isWhole = w >= 110 && value != null;
    pen.fillStyle = ink;
    pen.fillText(isWhole ? `${rank} · ${this.#inWords(value)}` : rank, x[i] + 5, y[i] + h / 2, w - 8);
  }

  #drawLegend([low, high]) {
    const canvas = byId("heat-legend");
    fit(canvas, LEGEND_WIDTH, 10);
    const pen = canvas.getContext("2d");
    for (let i = 0; i < LEGEND_WIDTH; i++) {
      pen.fillStyle = colour(i / (LEGEND_WIDTH - 1));
      pen.fillRect(i, 0, 1.5, 10);
    }
    setText(byId("heat-low"), this.#inWords(low));
    setText(byId("heat-high"), this.#inWords(high));
  }

  #inWords(value) {
    return this.#measure.isTime ? format.seconds(value == null ? null : value / 1e6) : format.whole(value);
  }

  #nodeName(place) {
    return this.#board.nodes.node[firstNodes(this.#board.ranks.node)[place]] ?? "–";
  }

  #point({ offsetX, offsetY }) {
    if (this.#cells) this.#choose(find(this.#cells, offsetX, offsetY) ?? this.#chosen);
  }

  #press(event) {
    const count = this.#board?.numRanks ?? 0;
    const now = this.#chosen ?? -1;
    const { node } = this.#board.ranks;
    const perNode = node.findLastIndex((other) => other === node[0]) + 1;
    const to = { ArrowRight: now + 1, ArrowLeft: now - 1, ArrowDown: now + perNode, ArrowUp: now - perNode, Home: 0, End: count - 1 };
    if (event.key === "Enter") this.#open();
    else if (event.key in to && count) this.#choose(Math.min(count - 1, Math.max(0, to[event.key])));
    else return;
    event.preventDefault();
  }

  #choose(index) {
    if (index === this.#chosen) return;
    this.#chosen = index;
    this.show(this.#board);
  }

  #open() {
    if (this.#chosen !== null) this.#onOpen(this.#board.ranks.rank[this.#chosen]);
  }

  #tell() {
    const { ranks } = this.#board;
    const i = this.#chosen;
    if (i === null || i >= ranks.rank.length) return setText(byId("heat-rank"), "Point at a cell for its rank; click for its log.");
    const micro = (value) => format.seconds(value == null ? null : value / 1e6);
    const wait = ranks.step_us[i] == null || ranks.compute_us[i] == null ? null : Math.max(0, ranks.step_us[i] - ranks.compute_us[i]);
    setText(byId("heat-rank"), [
      `rank ${ranks.rank[i]} on ${this.#board.nodeOf(i)}: ${this.#board.stateOf(i)}`,
      `step ${format.whole(ranks.step[i])} in ${micro(ranks.step_us[i])}`,
      `computed ${micro(ranks.compute_us[i])}`,
      `waited ${micro(wait)}`,
    ].join(" · "));
  }
}

// A rank without a number: an empty box, with a cross if it has failed.
function drawIdle(pen, [x, y, w, h], ink, isCrossed) {
  pen.strokeStyle = ink;
  pen.lineWidth = 1;
  pen.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
  if (!isCrossed) return;
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(x + w, y + h);
  pen.moveTo(x + w, y);
  pen.lineTo(x, y + h);
  pen.stroke();
}

// A canvas of so many pixels of the page, sharp on any screen; what it held is gone.
function fit(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
}

const edgeOf = (width) => (width > 6 ? 2 : 0);

// The places of the largest values that are far above the median.
function farAbove(values, middle) {
  const found = [];
  values.forEach((value, i) => value > FAR * middle && found.push(i));
  return found.sort((a, b) => values[b] - values[a]).slice(0, MOST_MARKED);
}

const firstNodes = (nodes) => nodes.filter((node, i) => i === 0 || node !== nodes[i - 1]);

function countsOf(nodes) {
  const counts = [];
  nodes.forEach((node, i) => {
    if (i === 0 || node !== nodes[i - 1]) counts.push(1);
    else counts[counts.length - 1] += 1;
  });
  return counts;
}

function summary(board, measure, values, middle) {
  const { ranks } = board;
  const inWords = (value) => (measure.isTime ? format.seconds(value / 1e6) : format.whole(value));
  const nodes = new Set(ranks.node).size;
  const words = [`${format.whole(ranks.rank.length)} ranks on ${format.whole(nodes)} ${nodes === 1 ? "node" : "nodes"}.`];
  if (middle !== null) {
    const worst = values.reduce((found, value, i) => ((value ?? -1) > (values[found] ?? -1) ? i : found), 0);
    const times = middle > 0 ? `, ${(values[worst] / middle).toFixed(1)} times the median` : "";
    words.push(`${measure.name}: median ${inWords(middle)}; most: rank ${ranks.rank[worst]} on ${board.nodeOf(worst)}, ${inWords(values[worst])}${times}.`);
  }
  const idle = ranks.rank.filter((_, i) => !WORKS.includes(board.stateOf(i)));
  if (idle.length) {
    const named = idle.length <= NAMED ? `: ${format.ranges(idle)}` : "";
    words.push(`${format.whole(idle.length)} ${idle.length === 1 ? "rank does" : "ranks do"} not train${named}.`);
  }
  return words.join(" ");
}
