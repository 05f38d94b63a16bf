// Which events are marked on the loss, and how.

// The word in the legend, the colour (a variable of style.css) and the symbol: a mark is known without its colour too.
export const GROUPS = {
  checkpoint: { colour: "--checkpoint", symbol: "circle", dash: "dot" },
  restart: { colour: "--restart", symbol: "diamond", dash: "solid" },
  failure: { colour: "--failure", symbol: "x", dash: "solid" },
  stop: { colour: "--stop", symbol: "square", dash: "dash" },
  resume: { colour: "--resume", symbol: "triangle-up", dash: "dash" },
  skipped: { colour: "--skipped", symbol: "cross", dash: "dot" },
  finding: { colour: "--finding", symbol: "star", dash: "dot" },
};

const GROUP_OF_KIND = {
  checkpoint: "checkpoint",
  restarted: "restart",
  failed: "failure",
  died: "failure",
  "node lost": "failure",
  stopped: "stop",
  finished: "stop",
  resumed: "resume",
  skipped: "skipped",
  finding: "finding",
};

// Of these throughput shows the trace, too.
export const INCIDENTS = ["restart", "failure", "resume", "finding"];

export const groupOf = (event) => GROUP_OF_KIND[event.kind] ?? null;

// Events by group; only those that name a step can be marked.
export function marks(events) {
  const found = Object.fromEntries(Object.keys(GROUPS).map((group) => [group, []]));
  for (const event of events) {
    const group = groupOf(event);
    if (group && event.step != null) found[group].push(event);
  }
  return found;
}
