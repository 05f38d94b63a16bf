// What became of attempts: the states of the job over time, and every incident from its cause to the next step.

import { byId, element, replaceIfNew, setText } from "./dom.js";
import * as format from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 22;
const LEAST = 2; // pixels of a state, so that a short one is seen
const MOST_INCIDENTS = 20;

export function showRecovery({ recovery }) {
  const { spans, incidents, omitted } = recovery;
  const calm = spans.length ? "No attempt has ended before its time." : "The job has not begun.";
  const kept = incidents.slice(-MOST_INCIDENTS);
  const total = incidents.length + omitted;
  setText(byId("recovery-note"), !total ? calm : kept.length < total ? `The newest ${kept.length} of ${format.whole(total)} incidents.` : "");
  drawStates(spans);
  replaceIfNew(byId("incidents"), JSON.stringify(kept), () => kept.reverse().map(incidentItem));
}

function drawStates(spans) {
  const svg = byId("states");
  const legend = byId("states-legend");
  if (!spans.length) return svg.replaceChildren();
  const begin = spans[0][1];
  const now = Math.max(Date.now() / 1000, begin + 1);
  const width = svg.parentElement.clientWidth;
  svg.setAttribute("width", width);
  svg.setAttribute("height", HEIGHT);
  const x = (time) => ((Math.min(time, now) - begin) / (now - begin)) * width;
  svg.replaceChildren(...spans.map(([state, from, to, attempt]) => {
    const end = to ?? now;
    const place = { x: x(from), width: Math.max(LEAST, x(end) - x(from)), y: 0, height: HEIGHT, class: `span ${state}` };
    const made = make("rect", place);
    made.append(make("title", {}, `${state}, attempt ${attempt}, ${format.seconds(end - from)} from ${format.clock(from)}`));
    return made;
  }));
  const seconds = {};
  for (const [state, from, to] of spans) seconds[state] = (seconds[state] ?? 0) + (to ?? now) - from;
  const parts = Object.entries(seconds).sort((a, b) => b[1] - a[1]);
  replaceIfNew(legend, parts.map(([state]) => state).join(), () => parts.map(([state]) => element("li", `word ${state}`, state, element("span", "quiet", ""))));
  parts.forEach(([, total], i) => setText(legend.children[i].lastElementChild, ` ${format.duration(total)}`));
}

function incidentItem({ time_s: time, attempt, cause, until_training_s: until, phases, steps_lost: lost, source, outcome, story }) {
  const parts = phases.map(([state, seconds]) => `${state} ${format.seconds(seconds)}`).join(", ");
  const back = until == null ? outcome : `${format.seconds(until)} until the next step`;
  const state = source == null ? "" : ` State from ${source}, ${format.whole(lost)} steps lost.`;
  const [head, ...rest] = cause.split("\n");
  const details = element("details", "text", element("summary", "", `${head} → ${back}`));
  const lines = [...rest, parts ? `${parts}.${state}` : state.trim(), ...story.map(moment)].filter(Boolean);
  details.append(element("pre", "", lines.join("\n")));
  return element("li", "", element("time", "", format.clock(time)), element("span", "at", `attempt ${attempt}`), details);
}

const moment = ({ after_s: after, kind, text }) => `${after < 0 ? "−" : "+"}${Math.abs(after).toFixed(2)} s  ${kind}: ${text.split("\n")[0]}`;

function make(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}
