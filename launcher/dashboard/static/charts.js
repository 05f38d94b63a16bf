// Loss and throughput over steps, drawn by plotly.

import { variable } from "./dom.js";
import { means, thinAround } from "./history.js";
import { GROUPS, marks } from "./marks.js";

const MOST_LINES = 200; // of one group of marks; more would be a wall
const MOST_TEXT = 80;
const DOTS_UP_TO = 100;
const MEANS_FROM = 2000;
const MEANS = 250;

let begin;
// Resolves when the library is there.
export const plotly = new Promise((resolve, reject) => (begin = { resolve, reject }));

// It is large, and takes longer to begin than all the rest of the page to be drawn: so that is drawn first.
export function loadPlotly() {
  if (document.getElementById("plotly")) return;
  const script = document.createElement("script");
  script.id = "plotly";
  script.src = "static/plotly.js";
  script.addEventListener("load", () => begin.resolve(window.Plotly));
  script.addEventListener("error", () => begin.reject(new Error("the plot library could not be loaded")));
  document.head.append(script);
}

// Plotly reads some HTML in texts; what a job wrote must stay as it is.
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

export class Chart {
  #element;
  #series;
  #seen = null; // the steps that the reader zoomed to
  #last = null;

  // `series`: {value: point => number, name, axis, hover, fromZero}
  constructor(id, series) {
    this.#element = document.getElementById(id);
    this.#series = series;
  }

  async draw(history, events) {
    this.#last = [history, events];
    const Plotly = await plotly;
    const isFirst = !this.#element.classList.contains("js-plotly-plot");
    const traces = [...this.#lost(history), this.#line(history), ...this.#means(history), ...markTraces(marks(events))];
    await Plotly.react(this.#element, traces, this.#layout(), { displayModeBar: false, responsive: true });
    if (isFirst) this.#element.on("plotly_relayout", (change) => this.#zoomed(change));
  }

  redraw() {
    if (this.#last) this.draw(...this.#last);
  }

  #zoomed(change) {
    if ("xaxis.range[0]" in change) this.#seen = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    else if (change["xaxis.autorange"]) this.#seen = null;
    else return;
    this.redraw();
  }

  #line({ line }) {
    const { value, name, hover } = this.#series;
    const points = thinAround(line, this.#seen, value);
    return {
      name,
      x: points.map(({ step }) => step),
      y: points.map(value),
      mode: line.length <= DOTS_UP_TO ? "lines+markers" : "lines",
      line: { color: variable("--line"), width: line.length < MEANS_FROM ? 1.8 : 0.6 },
      opacity: line.length < MEANS_FROM ? 1 : 0.35,
      marker: { size: 4 },
      hovertemplate: `${hover}<extra></extra>`,
      showlegend: false,
    };
  }

  #means({ line }) {
    if (line.length < MEANS_FROM) return [];
    const { found, size } = means(line, MEANS, this.#series.value);
    return [{
      name: `mean of ${size} steps`,
      x: found.map(({ step }) => step),
      y: found.map(({ mean }) => mean),
      mode: "lines",
      line: { color: variable("--line"), width: 2 },
      hoverinfo: "skip",
    }];
  }

  // One trace for all stretches: a null between two of them lifts the pen.
  #lost({ lost }) {
    if (!lost.length) return [];
    const { value, hover } = this.#series;
    const gap = { step: null };
    const points = lost.flatMap((stretch) => [...thinAround(stretch, this.#seen, value), gap]);
    return [{
      name: "undone by a restart",
      x: points.map(({ step }) => step),
      y: points.map((point) => (point === gap ? null : value(point))),
      mode: "lines+markers", // a stretch of one step is no line
      opacity: 0.45,
      line: { color: variable("--lost"), width: 1.2 },
      marker: { size: 3 },
      hovertemplate: `${hover} (undone)<extra></extra>`,
    }];
  }

  #layout() {
    const { axis, fromZero } = this.#series;
    const [ink, grid] = [variable("--quiet"), variable("--edge")];
    const font = { size: 11 };
    const step = { title: { text: "step", standoff: 4, font }, unifiedhovertitle: { text: "step %{x:,d}" } };
    const common = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true };
    return {
      uirevision: "keep", // zoom and legend stay as the reader set them
      height: 250,
      margin: { l: 56, r: 12, t: 8, b: 36 },
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      font: { family: "system-ui, sans-serif", size: 12, color: ink },
      hovermode: "x unified",
      hoverlabel: { bgcolor: variable("--panel"), bordercolor: grid, font: { color: variable("--ink") } },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 11 } },
      xaxis: { ...common, ...step, showgrid: false, tickformat: ",d" },
      yaxis: { ...common, title: { text: axis, standoff: 6, font }, rangemode: fromZero ? "tozero" : "normal" },
      yaxis2: { overlaying: "y", range: [0, 1], fixedrange: true, visible: false }, // marks reach from edge to edge
    };
  }
}

function markTraces(found) {
  const present = Object.entries(found).filter(([, events]) => events.length);
  return present.flatMap(([group, events]) => groupTraces(group, events));
}

function groupTraces(group, events) {
  const every = Math.ceil(events.length / MOST_LINES);
  const drawn = events.filter((_, i) => (events.length - 1 - i) % every === 0); // the newest is always among them
  const { colour, symbol, dash } = GROUPS[group];
  const height = 1 - 0.07 * Object.keys(GROUPS).indexOf(group); // a resume and the restart it follows are at one step
  const color = variable(colour);
  const common = { yaxis: "y2", legendgroup: group };
  const line = {
    ...common,
    x: drawn.flatMap(({ step }) => [step, step, null]),
    y: drawn.flatMap(() => [0, 1, null]),
    mode: "lines",
    line: { color, width: 1.1, dash },
    opacity: 0.6,
    hoverinfo: "skip",
    showlegend: false,
  };
  const heads = {
    ...common,
    name: every > 1 ? `${group} (every ${every}th)` : group,
    x: drawn.map(({ step }) => step),
    y: drawn.map(() => height),
    mode: "markers",
    marker: { color, symbol, size: 8 },
    cliponaxis: false,
    text: drawn.map(hoverText),
    hovertemplate: "%{text}<extra></extra>",
  };
  return [line, heads];
}

function hoverText({ kind, text }) {
  const [first] = text.split("\n");
  return plain(`${kind}: ${first.length > MOST_TEXT ? `${first.slice(0, MOST_TEXT)}…` : first}`);
}
