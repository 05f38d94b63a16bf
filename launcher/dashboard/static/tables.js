// Tables of ranks and nodes, and the list of events. Text from the job only ever becomes textContent.

import { median } from "./board.js";
import { element, setText } from "./dom.js";
import * as format from "./format.js";
import { groupOf } from "./marks.js";

const MOST_RANKS = 64;
const MOST_NODES = 64;
const MOST_EVENTS = 100;
const SLOW = 1.25; // times the median compute time

// `rows` hold cells: {text, className?, bar?: {part, of}}. Rows and cells are used again.
function fill(table, rows) {
  const body = table.tBodies[0];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, i) => {
    const row = body.rows[i] ?? body.insertRow();
    cells.forEach((cell, j) => fillCell(row.cells[j] ?? row.appendChild(newCell(j)), cell));
  });
}

function newCell(column) {
  const cell = document.createElement(column === 0 ? "th" : "td");
  if (column === 0) cell.scope = "row";
  return cell;
}

function fillCell(element, { text, className = "", bar }) {
  if (element.className !== className) element.className = className;
  if (!bar) return setText(element, text);
  if (!element.firstElementChild) element.append(newBar(), document.createElement("span"));
  const [track, label] = element.children;
  track.firstElementChild.style.width = `${bar.of > 0 ? Math.min(100, (100 * bar.part) / bar.of) : 0}%`;
  setText(label, text);
}

function newBar() {
  const track = document.createElement("div");
  track.className = "bar";
  track.append(document.createElement("div"));
  return track;
}

export function showRanks(board) {
  const { ranks, numRanks } = board;
  const middle = median(ranks.compute_us ?? []);
  const longest = (ranks.compute_us ?? []).reduce((found, value) => Math.max(found, value ?? 0), 0);
  const shown = numRanks <= MOST_RANKS ? ranks.rank.map((_, i) => i) : slowest(board);
  fill(document.getElementById("ranks"), shown.map((i) => rankCells(board, i, middle, longest)));
  const note = document.getElementById("ranks-note");
  note.hidden = shown.length === numRanks;
  setText(note, `The slowest ${shown.length} of ${format.whole(numRanks)} ranks; those that do not train come first.`);
}

function slowest({ ranks }) {
  const isWell = ranks.states.map((state) => state === "training" || state === "done");
  const weight = ranks.rank.map((_, i) => (isWell[ranks.state[i]] ? (ranks.compute_us[i] ?? -1) : Infinity));
  return ranks.rank.map((_, i) => i).sort((a, b) => weight[b] - weight[a] || a - b).slice(0, MOST_RANKS);
}

function rankCells(board, i, middle, longest) {
  const { ranks } = board;
  const [compute, state, pid] = [ranks.compute_us[i], board.stateOf(i), ranks.pid[i]];
  const isSlow = compute != null && compute > SLOW * middle;
  const label = micro(compute) + (isSlow ? ` · ${(compute / middle).toFixed(1)}×` : "");
  return [
    { text: `${ranks.rank[i]}`, className: "right" },
    { text: board.nodeOf(i) },
    { text: state, className: `word ${state}` },
    { text: format.whole(ranks.step[i]), className: "right" },
    { text: micro(ranks.step_us[i]), className: "right" },
    { text: label, className: isSlow ? "compute slow" : "compute", bar: { part: compute ?? 0, of: longest } },
    { text: pid == null ? "–" : `${pid}`, className: "right" },
  ];
}

const micro = (value) => format.seconds(value == null ? null : value / 1e6);

export function showNodes({ nodes }) {
  const trouble = nodes.node.map((_, i) => (nodes.state[i] === "ready" && nodes.aside[i] == null ? 0 : 1));
  const all = nodes.node.map((_, i) => i);
  const shown = all.length <= MOST_NODES ? all : all.sort((a, b) => trouble[b] - trouble[a] || a - b).slice(0, MOST_NODES);
  fill(document.getElementById("nodes"), shown.map((i) => nodeCells(nodes, i)));
  const note = document.getElementById("nodes-note");
  note.hidden = shown.length === nodes.node.length;
  setText(note, `${shown.length} of ${format.whole(nodes.node.length)} nodes; those that are not ready come first.`);
}

function nodeCells(nodes, i) {
  const state = nodes.state[i];
  const extra = nodes.aside[i] != null ? ", aside" : nodes.is_spare[i] ? ", spare" : "";
  const [first, count] = [nodes.first_rank[i], nodes.num_ranks[i]];
  const mebibytes = (value) => format.bytes(value == null ? null : value * 2 ** 20);
  return [
    { text: nodes.node[i] },
    { text: state + extra, className: `word ${nodes.aside[i] != null ? "waiting" : state.replace(" ", "-")}` },
    { text: format.seconds(nodes.lease_left_s[i]), className: "right" },
    { text: count ? (count === 1 ? `${first}` : `${first}–${first + count - 1}`) : "–" },
    { text: mebibytes(nodes.memory_free_mib[i]), className: "right" },
    { text: mebibytes(nodes.shared_memory_mib[i]), className: "right" },
    { text: nodes.host[i] || "–" },
  ];
}

// Adds the newest on top; all events are counted, the newest are kept on the page.
export function addEvents(events, total) {
  const list = document.getElementById("events");
  for (const event of events.slice(-MOST_EVENTS)) list.prepend(eventItem(event));
  while (list.children.length > MOST_EVENTS) list.lastElementChild.remove();
  const note = document.getElementById("events-note");
  note.hidden = total > 0 && total <= MOST_EVENTS;
  setText(note, total ? `The newest ${MOST_EVENTS} of ${format.whole(total)} events.` : "Nothing has happened yet.");
}

function eventItem(event) {
  const item = document.createElement("li");
  const time = element("time", "", format.clock(event.time_s));
  time.dateTime = new Date(event.time_s * 1000).toISOString();
  const step = event.step == null ? "" : `step ${format.whole(event.step)}`;
  const kind = element("span", `kind ${groupOf(event) ?? ""}`, event.kind);
  item.append(time, kind, element("span", "at", step), body(event));
  return item;
}

// A stack trace is folded behind its first line.
function body({ text }) {
  const [first, ...more] = text.split("\n");
  if (!more.length) return element("span", "text", text);
  const details = element("details", "text", "");
  details.append(element("summary", "", first), element("pre", "", more.join("\n")));
  return details;
}
