// The plan of a batch: one row per rank, one block per micro-batch.

import { byId, setText } from "./dom.js";
import * as format from "./format.js";
import { ranksOf } from "./packed.js";

const SVG = "http://www.w3.org/2000/svg";
const ROWS = 64; // at once; a picture of 1,000 rows would be grey noise
const RING_COLOURS = 8; // --ring-0 to --ring-7 in style.css
const [LEFT, RIGHT, BOTTOM] = [58, 74, 22];
const LABEL_WIDTH = 7; // pixels of a digit


export class PlanPicture {
  #answer = null;
  #first = 0;

  constructor() {
    const svg = byId("plan");
    svg.addEventListener("pointermove", (event) => this.#point(event));
    svg.addEventListener("pointerleave", () => this.#point(null));
    byId("plan-ranks").addEventListener("change", (event) => {
      this.#first = Number(event.target.value);
      this.#draw();
    });
    new ResizeObserver(() => this.#draw()).observe(svg.parentElement);
  }

  // Somebody reads it with the pointer: it stays as it is.
  get isRead() {
    return byId("plan").matches(":hover");
  }

  // `answer`: {step, plan, spans?}; spans are the predicted times, a list of {rank, micro_batch, start_s, stop_s}.
  show(answer) {
    const plan = { ...answer.plan, ranks: ranksOf(answer.plan) };
    this.#answer = { ...answer, plan };
    this.#offerRanks();
    this.#draw();
    const { step } = answer;
    setText(byId("plan-step"), `of step ${format.whole(step)}`);
    setText(byId("plan-note"), facts(plan, answer.spans));
  }

  #offerRanks() {
    const { ranks } = this.#answer.plan;
    const select = byId("plan-ranks");
    byId("plan-part").hidden = ranks.length <= ROWS;
    const count = Math.ceil(ranks.length / ROWS);
    if (select.options.length === count) return;
    this.#first = 0;
    const option = (i) => new Option(`${i * ROWS}–${Math.min((i + 1) * ROWS, ranks.length) - 1}`, i * ROWS);
    select.replaceChildren(...Array.from({ length: count }, (_, i) => option(i)));
  }

  #draw() {
    if (!this.#answer) return;
    const { plan, spans } = this.#answer;
    const rows = layOut(plan, spans);
    const end = Math.max(1e-12, ...rows.flat().map(({ stop }) => stop));
    const shown = rows.slice(this.#first, this.#first + ROWS);
    const svg = byId("plan");
    const width = svg.parentElement.clientWidth;
    const height = shown.length > 32 ? 9 : shown.length > 12 ? 14 : 22;
    svg.setAttribute("width", width);
    svg.setAttribute("height", shown.length * height + BOTTOM);
    const scale = (width - LEFT - RIGHT) / end;
    const parts = shown.flatMap((blocks, i) => drawRow(blocks, this.#first + i, i * height, height, scale));
    svg.replaceChildren(...parts, ...axis(end, scale, shown.length * height, spans));
  }

  #point(event) {
    const block = event?.target.closest?.(".block");
    const tip = byId("plan-tip");
    tip.hidden = !block;
    for (const other of byId("plan").querySelectorAll(".block")) {
      other.classList.toggle("dim", Boolean(block?.dataset.ring) && other.dataset.ring !== block.dataset.ring);
    }
    if (!block) return;
    setText(tip, block.dataset.tip);
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(8, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8))}px`;
  }
}

function facts({ lengths, ranks, capacity, certificate, planner }, spans) {
  const tokens = lengths.reduce((sum, length) => sum + length, 0);
  const slots = ranks.reduce((sum, blocks) => sum + blocks.length, 0) * capacity;
  const { makespan_s: makespan, lower_bound_s: bound, binding } = certificate;
  return [
    `${format.whole(lengths.length)} sequences, ${format.whole(tokens)} tokens on ${format.whole(ranks.length)} ranks.`,
    `Predicted ${format.seconds(makespan)}; no plan takes less than ${format.seconds(bound)} (${binding}):`,
    `ratio ${bound > 0 ? (makespan / bound).toFixed(3) : "1.000"}.`,
    `Fill ${slots ? Math.round((100 * tokens) / slots) : 0} %. Planner: ${planner}.`,
    `Width: ${spans ? "predicted time" : "tokens"}; a coloured block shares a sequence with its ring.`,
  ].join(" ");
}

// Per rank its blocks with where they start and stop: in predicted seconds if those are known, else in tokens.
function layOut(plan, spans) {
  const colours = new Map(); // of rings, in the order in which they appear
  const times = new Map(spans?.map((span) => [`${span.rank}/${span.micro_batch}`, span]));
  return plan.ranks.map((microBatches, rank) => {
    let position = 0;
    return microBatches.map((microBatch, index) => {
      const tokens = microBatch.pieces.reduce((sum, piece) => sum + tokensOf(piece), 0);
      const span = times.get(`${rank}/${index}`);
      const [start, stop] = span ? [span.start_s, span.stop_s] : [position, position + tokens];
      position = stop;
      return { rank, index, tokens, start, stop, microBatch, ...ringOf(microBatch, colours) };
    });
  });
}

const tokensOf = (piece) => piece.ranges.reduce((sum, [start, stop]) => sum + stop - start, 0);

// The largest ring of a micro-batch names its colour; one rank alone is no ring.
function ringOf({ pieces }, colours) {
  const largest = pieces.reduce((found, { ring }) => (ring.length > found.length ? ring : found), []);
  if (largest.length < 2) return { ring: "", colour: "" };
  const ring = [...largest].sort((a, b) => a - b).join(",");
  if (!colours.has(ring)) colours.set(ring, colours.size % RING_COLOURS);
  return { ring, colour: `ring-${colours.get(ring)}` };
}

function drawRow(blocks, rank, top, height, scale) {
  const middle = top + height / 2;
  const total = blocks.reduce((sum, { tokens }) => sum + tokens, 0);
  const isLabelled = height > 9 || rank % 8 === 0;
  const labels = isLabelled ? [
    make("text", { x: LEFT - 8, y: middle, class: "row end" }, `rank ${rank}`),
    make("text", { x: "100%", y: middle, class: "row end" }, format.whole(total)),
  ] : [];
  return [...labels, ...blocks.flatMap((block) => drawBlock(block, top, height, scale))];
}

function drawBlock(block, top, height, scale) {
  const x = LEFT + block.start * scale;
  const width = Math.max(1.5, (block.stop - block.start) * scale - 1);
  const place = { x, y: top + 1, width, height: height - 2, rx: height > 9 ? 2 : 0 };
  const words = { class: `block ${block.colour}`, "data-ring": block.ring, "data-tip": tip(block) };
  const rect = make("rect", { ...place, ...words });
  const label = format.whole(block.tokens);
  if (height < 14 || width < label.length * LABEL_WIDTH + 8) return [rect];
  return [rect, make("text", { x: x + width / 2, y: top + height / 2, class: "label" }, label)];
}

function tip({ rank, index, tokens, start, stop, microBatch, ring }) {
  const { pieces } = microBatch;
  const lines = pieces.slice(0, 12).map(pieceInWords);
  if (pieces.length > 12) lines.push(`and ${pieces.length - 12} more`);
  const offloads = microBatch.offload ? `, ${Math.round(100 * microBatch.offload)}% of products on the host` : "";
  const options = microBatch.recompute === "none" ? "" : `, activations as the layout says${offloads}`;
  return [
    `rank ${rank}, micro-batch ${index + 1}: ${format.whole(tokens)} tokens${options}`,
    ...(ring ? [`ring of ${ring.split(",").length}: ranks ${format.ranges(ring.split(",").map(Number))}`] : []),
    ...(lines.length ? lines : ["no tokens: it only takes part in what the group does together"]),
  ].join("\n");
}

function pieceInWords(piece) {
  const parts = piece.ranges.map(([start, stop]) => `${format.whole(start)}–${format.whole(stop - 1)}`).join(", ");
  return `sequence ${piece.sequence}: tokens ${parts}`;
}

function axis(end, scale, top, spans) {
  const write = (share) => (spans ? format.seconds(share * end) : format.whole(share * end));
  const place = (share) => ({ x: LEFT + share * end * scale, y: top + 13, class: share ? "row end" : "row" });
  const label = (share) => make("text", place(share), write(share));
  const unit = make("text", { x: "100%", y: top + 13, class: "row end" }, "tokens");
  return [label(0), label(1), unit];
}

function make(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}
