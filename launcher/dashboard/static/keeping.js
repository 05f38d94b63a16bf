// What would be left of the training: snapshots in memory, checkpoints on storage.

import { byId, element, replaceIfNew, setText } from "./dom.js";
import * as format from "./format.js";

const KINDS = ["checkpoint", "checkpoint failed"];
const MOST = 8;

export function showSnapshot({ job, nodes }) {
  const found = job.snapshot;
  byId("snapshot-note").hidden = Boolean(found);
  setText(byId("snapshot-note"), found ? "" : "Nothing is known before the first step.");
  const held = (nodes.snapshot_mib ?? []).reduce((most, value) => Math.max(most, value ?? 0), 0);
  const facts = found ? {
    "Newest snapshot": found.step == null ? (found.is_on ? "none yet" : "off") : `step ${format.whole(found.step)}, ${format.whole(found.age_steps)} steps old`,
    "One every": found.every == null ? "–" : `${format.whole(found.every)} steps`,
    "Protected by other nodes": found.protection,
    "In memory, most of a node": format.bytes(held * 2 ** 20),
    "Complete, skipped, lost": `${found.committed}, ${found.skipped}, ${found.lost}`,
    "A restart loses": `${format.whole(found.lost_steps)} steps (${format.seconds(found.lost_s)}), from ${found.source}`,
    "A lost node loses": `${format.whole(found.lost_steps_of_node)} steps`,
  } : {};
  replaceIfNew(byId("snapshot"), JSON.stringify(facts), () =>
    Object.entries(facts).map(([name, text]) => element("div", "", element("dt", "", name), element("dd", "", text))));
}

export function showCheckpoints(events) {
  const found = events.filter(({ kind }) => KINDS.includes(kind));
  const newest = found.slice(-MOST).reverse();
  setText(byId("checkpoints-note"), found.length > MOST ? `The newest ${MOST} of ${format.whole(found.length)} checkpoints.` : found.length ? "" : "No checkpoint yet.");
  byId("checkpoints").hidden = !found.length;
  const body = byId("checkpoints").tBodies[0];
  replaceIfNew(body, `${found.length}`, () => newest.map(row));
}

function row({ kind, step, time_s: time, fields = {}, text }) {
  const isFailed = kind !== "checkpoint";
  const cells = isFailed
    ? [element("td", "bad", "failed"), element("td", "text", text.split("\n")[0])]
    : [element("td", "right", format.bytes(fields.bytes_written)), element("td", "", `${format.seconds(fields.write_s)}, stood still ${format.seconds(fields.stop_s)}`)];
  const head = element("th", "right", format.whole(step));
  head.scope = "row";
  return element("tr", "", head, element("td", "", format.clock(time)), ...cells);
}
