// Tables of ranks and nodes, and the list of events. Text from the job only ever becomes textContent.

import * as format from "./format.js";
import { groupOf } from "./marks.js";

const MOST_RANKS = 64;
const MOST_EVENTS = 100;
const SLOW = 1.25; // times the median compute time

// Sets what differs only: selected text, hover and what a screen reader has said stay as they are.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

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

export function showRanks(ranks) {
  const known = ranks.map(({ compute_s }) => compute_s).filter((value) => value != null);
  const median = [...known].sort((a, b) => a - b)[Math.floor((known.length - 1) / 2)]; // the lower: of two ranks, one can be slow
  const longest = Math.max(0, ...known);
  const shown = ranks.length <= MOST_RANKS ? ranks : slowest(ranks);
  const cells = shown.map((rank) => rankCells(rank, median, longest));
  fill(document.getElementById("ranks"), cells);
  const note = document.getElementById("ranks-note");
  note.hidden = shown.length === ranks.length;
  const all = format.whole(ranks.length);
  setText(note, `The slowest ${shown.length} of ${all} ranks; those that do not train come first.`);
}

function slowest(ranks) {
  const trouble = ({ state }) => (state === "training" || state === "done" ? 0 : 1);
  const order = (a, b) => trouble(b) - trouble(a) || (b.compute_s ?? -1) - (a.compute_s ?? -1);
  return [...ranks].sort(order).slice(0, MOST_RANKS);
}

function rankCells(rank, median, longest) {
  const { compute_s: compute } = rank;
  const isSlow = compute != null && compute > SLOW * median;
  const label = format.seconds(compute) + (isSlow ? ` · ${(compute / median).toFixed(1)}×` : "");
  return [
    { text: `${rank.rank}`, className: "right" },
    { text: rank.node },
    { text: rank.state, className: `word ${rank.state}` },
    { text: format.whole(rank.step), className: "right" },
    { text: format.seconds(rank.step_s), className: "right" },
    { text: label, className: isSlow ? "compute slow" : "compute", bar: { part: compute ?? 0, of: longest } },
    { text: rank.pid == null ? "–" : `${rank.pid}`, className: "right" },
  ];
}

export function showNodes(nodes) {
  fill(document.getElementById("nodes"), nodes.map(nodeCells));
}

function nodeCells(node) {
  return [
    { text: node.node },
    { text: node.is_spare ? `${node.state}, spare` : node.state, className: `word ${node.state.replace(" ", "-")}` },
    { text: format.seconds(node.lease_left_s), className: "right" },
    { text: format.ranges(node.ranks) },
    { text: format.bytes(node.memory_free_bytes), className: "right" },
    { text: format.bytes(node.shared_memory_bytes), className: "right" },
    { text: node.host || node.address || "–" },
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

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}
