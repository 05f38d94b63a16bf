// Listens to the controller and shows what it says.

import { Board } from "./board.js";
import { Chart, loadPlotly, plotly } from "./charts.js";
import { keepToken, takeToken, TokenMissing, Unreachable, watch } from "./client.js";
import { showDelays } from "./delays.js";
import { byId, setText } from "./dom.js";
import { showFindings } from "./findings.js";
import * as format from "./format.js";
import { HeatMap } from "./heat.js";
import { History } from "./history.js";
import { showCheckpoints, showSnapshot } from "./keeping.js";
import { LogView } from "./logs.js";
import { INCIDENTS, groupOf } from "./marks.js";
import { PlanPicture } from "./plan.js";
import { showRecovery } from "./recovery.js";
import { addEvents, showNodes, showRanks } from "./tables.js";

const FIRST_MS = 1000;
const LONGEST_MS = 8000; // between two tries while the controller is gone
const ENDED = ["finished", "stopped", "failed"];
const NO_TOKEN =
  "This page needs the link with its token. Run “evermesh dashboard” where the job was launched: it makes that link. Or paste the token of the run, from the file “token” of its folder:";

let board = new Board();
let steps = new History();
let events = [];
let shownEvents = 0;
const lossChart = new Chart("loss-chart", {
  name: "loss",
  axis: "nats per token",
  value: ({ loss }) => loss,
  hover: "loss %{y:.4f}",
  fromZero: false,
});
const speedChart = new Chart("speed-chart", {
  name: "tokens/s",
  axis: "tokens/s",
  value: ({ speed }) => speed,
  hover: "%{y:,.0f} tokens/s",
  fromZero: true,
});
const picture = new PlanPicture();
const logs = new LogView();
const heat = new HeatMap((rank) => logs.open(rank));
const unseen = new Set(); // sections that changed while nobody looked
let directory = null; // of the job that was heard last
let isConnected = false;
let waitMs = FIRST_MS;
let timer = null;

function notice(text, needsToken = false) {
  setText(byId("notice-text"), text);
  byId("notice").hidden = !text;
  byId("token-form").hidden = !needsToken;
  document.body.classList.toggle("stale", Boolean(text));
}

async function connect() {
  clearTimeout(timer);
  if (isConnected) return;
  isConnected = true;
  let isFirst = true;
  let isWorthTrying = true;
  try {
    await watch("api/watch", (message) => {
      if (isFirst) beginAnew();
      isFirst = false;
      waitMs = FIRST_MS;
      notice("");
      take(message);
    });
    waitMs = LONGEST_MS; // it has said all
  } catch (error) {
    isWorthTrying = explain(error);
  } finally {
    isConnected = false;
    if (isWorthTrying) timer = setTimeout(connect, waitMs);
  }
}

// The first message of a stream tells all.
function beginAnew() {
  board = new Board();
  steps = new History();
  events = [];
  shownEvents = 0;
  byId("events").replaceChildren();
  unseen.add("history");
}

// Says why the controller was not heard; true when another try can help.
function explain(error) {
  if (error instanceof TokenMissing) {
    notice(NO_TOKEN, true);
    return false;
  }
  waitMs = Math.min(2 * waitMs, LONGEST_MS);
  if (!(error instanceof Unreachable)) console.error(error);
  const { state } = board.job;
  const ended = ENDED.includes(state) ? ` The job has ended (${state}), so it may be gone for good.` : "";
  const old = state ? " Below is what it said last." : "";
  notice(`Controller not reachable, trying again (${error.message}).${ended}${old}`);
  return true;
}

function take({ changed, steps: points, events: told, has_more: hasMore }) {
  const began = performance.now();
  board.apply(changed);
  if (directory !== null && directory !== board.job.directory) location.reload(); // another job has taken this address
  directory = board.job.directory;
  steps.add(points);
  events.push(...told);
  for (const name of Object.keys(changed)) unseen.add(name);
  if (points.length || told.length) unseen.add("history");
  if (!document.hidden && !hasMore) show();
  byId("drawn").dataset.ms = Math.ceil(performance.now() - began);
  setText(byId("drawn"), `${format.clock(Date.now() / 1000)}, drawn in ${byId("drawn").dataset.ms} ms`);
}

// Draws what has changed since it was drawn last.
function show() {
  const has = (...names) => names.some((name) => unseen.has(name));
  byId("job").hidden = false;
  if (has("job")) showStatus(board.job);
  if (has("ranks", "nodes")) heat.show(board);
  if (has("ranks", "nodes")) showRanks(board);
  if (has("nodes")) showNodes(board);
  if (has("findings", "nodes", "job")) showFindings(board);
  if (has("delays", "nodes")) showDelays(board);
  if (has("job", "nodes")) showSnapshot(board);
  showRecovery(board); // time goes on
  const isLater = has("plan") && picture.isRead;
  if (has("plan") && board.plan.told && !isLater) picture.show(board.plan.told);
  if (has("history")) showHistory();
  unseen.clear();
  if (isLater) unseen.add("plan");
  requestAnimationFrame(() => setTimeout(loadPlotly));
}

function showHistory() {
  const fresh = events.slice(shownEvents);
  if (fresh.length || !events.length) addEvents(fresh, events.length);
  shownEvents = events.length;
  showCheckpoints(events);
  const isEmpty = !steps.line.length;
  byId("loss-note").hidden = byId("speed-note").hidden = !isEmpty;
  if (isEmpty) return;
  lossChart.draw(steps, events);
  speedChart.draw(steps, events.filter((event) => INCIDENTS.includes(groupOf(event))));
}

function showStatus(job) {
  const { name, state, reason, step, steps: total, loss, tokens_per_s: speed, time_left_s: left } = job;
  document.title = `${name}: ${state}${total && step != null ? ` ${Math.floor((100 * step) / total)} %` : ""}`;
  setText(byId("name"), name);
  setText(byId("state"), state);
  byId("state").className = `word ${state}`;
  setText(byId("reason"), reason);
  setText(byId("step"), total == null ? format.whole(step) : `${format.whole(step ?? 0)} of ${format.whole(total)}`);
  byId("progress").hidden = total == null;
  byId("progress").value = total ? (step ?? 0) / total : 0;
  setText(byId("loss"), format.loss(loss));
  setText(byId("speed"), format.speed(speed));
  showTimeLeft(state, left);
  showFacts(job);
}

function showTimeLeft(state, left) {
  const isRunning = !ENDED.includes(state);
  setText(byId("left"), isRunning ? format.duration(left) : "–");
  setText(byId("end"), isRunning && left != null ? `done about ${format.clock(Date.now() / 1000 + left)}` : "");
}

function showFacts(status) {
  const { generation, restarts, max_restarts: most, workers, started_s: started, directory, pid, snapshot } = status;
  const facts = {
    Attempt: `${generation}`,
    Restarts: `${restarts} of at most ${most}`,
    "A restart loses": snapshot ? `${format.whole(snapshot.lost_steps)} steps, from ${snapshot.source}` : "–",
    Workers: format.whole(workers),
    Started: format.clock(started),
    Controller: `process ${pid}`,
    Directory: directory,
  };
  const list = byId("facts");
  if (!list.children.length) list.append(...Object.keys(facts).map(newFact));
  Object.values(facts).forEach((text, i) => setText(list.children[i].lastElementChild, text));
}

function newFact(name) {
  const pair = document.createElement("div");
  pair.append(document.createElement("dt"), document.createElement("dd"));
  pair.firstElementChild.textContent = name;
  return pair;
}

function redrawCharts() {
  lossChart.redraw();
  speedChart.redraw();
}

takeToken();
plotly.catch((error) => setText(byId("loss-note"), `No charts: ${error.message}.`));
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(byId("token").value);
  byId("token").value = "";
  connect();
});
addEventListener("hashchange", () => {
  takeToken();
  connect();
});
document.addEventListener("visibilitychange", () => document.hidden || !directory || show());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  lossChart.redraw();
  speedChart.redraw();
  heat.show(board);
});
connect();
