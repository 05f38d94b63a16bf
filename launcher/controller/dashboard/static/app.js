// Asks the controller once a second and shows what it says.

import { Chart, plotly } from "./charts.js";
import { get, takeToken, TokenMissing, Unreachable } from "./client.js";
import * as format from "./format.js";
import { History } from "./history.js";
import { PlanPicture } from "./plan.js";
import { addEvents, setText, showNodes, showRanks } from "./tables.js";

const PERIOD_MS = 1000;
const LONGEST_MS = 8000; // between two tries while the controller is gone
const HIDDEN_MS = 15000; // nobody looks
const ENDED = ["finished", "stopped", "failed"];
const NO_TOKEN =
  "This page needs the link with its token. Run “evermesh dashboard” where the job was launched: it makes that link.";

const byId = (id) => document.getElementById(id);
const steps = new History();
const events = [];
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
let status = null;
let plannedAt = null;
let waitMs = PERIOD_MS;
let timer = null;
let isAsking = false;

function notice(text) {
  setText(byId("notice"), text);
  byId("notice").hidden = !text;
  document.body.classList.toggle("stale", Boolean(text));
}

async function ask() {
  clearTimeout(timer);
  if (isAsking) return;
  isAsking = true;
  let isWorthAsking = true;
  try {
    await refresh();
    waitMs = PERIOD_MS;
    notice("");
  } catch (error) {
    isWorthAsking = explain(error);
  } finally {
    isAsking = false;
    if (isWorthAsking) timer = setTimeout(ask, document.hidden ? HIDDEN_MS : waitMs);
  }
}

// Says why the controller was not heard; true when another try can help.
function explain(error) {
  if (error instanceof TokenMissing) {
    notice(NO_TOKEN);
    return false;
  }
  waitMs = Math.min(2 * waitMs, LONGEST_MS);
  if (!(error instanceof Unreachable)) console.error(error);
  const isEnd = status && ENDED.includes(status.state);
  const ended = isEnd ? ` The job has ended (${status.state}), so it may be gone for good.` : "";
  const old = status ? " Below is what it said last." : "";
  notice(`Controller not reachable, trying again (${error.message}).${ended}${old}`);
  return true;
}

async function refresh() {
  const answer = await get("api/status");
  if (status && status.directory !== answer.directory) location.reload(); // another job has taken this address
  status = answer;
  showStatus();
  const news = [get(`api/steps?after=${steps.seq}`), get(`api/events?after=${lastEvent()}`)];
  const [newSteps, newEvents] = await Promise.all(news);
  steps.add(newSteps);
  events.push(...newEvents);
  if (newEvents.length || !events.length) addEvents(newEvents, events.length);
  if (newSteps.length || newEvents.length) drawCharts();
  await refreshPlan();
}

const lastEvent = () => events.at(-1)?.seq ?? 0;

async function refreshPlan() {
  const now = `${status.generation}/${status.step}`;
  if (now === plannedAt || picture.isRead) return;
  const answer = await get("api/plan");
  if (answer) {
    picture.show(answer);
    plannedAt = now;
  }
}

function drawCharts() {
  const isEmpty = !steps.line.length;
  byId("loss-note").hidden = byId("speed-note").hidden = !isEmpty;
  if (isEmpty) return;
  lossChart.draw(steps, events);
  speedChart.draw(steps, []);
}

function showStatus() {
  const { name, state, reason, step, steps: total, loss, tokens_per_s: speed, time_left_s: left } = status;
  byId("job").hidden = false;
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
  showFacts();
  showRanks(status.ranks);
  showNodes(status.nodes);
}

function showTimeLeft(state, left) {
  const isRunning = !ENDED.includes(state);
  setText(byId("left"), isRunning ? format.duration(left) : "–");
  setText(byId("end"), isRunning && left != null ? `done about ${format.clock(Date.now() / 1000 + left)}` : "");
}

function showFacts() {
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
addEventListener("hashchange", () => {
  takeToken();
  ask();
});
document.addEventListener("visibilitychange", () => document.hidden || ask());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
ask();
