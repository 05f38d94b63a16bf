// The delay matrix: who sends down, who receives across.

import { byId, element, replaceIfNew, setText } from "./dom.js";
import * as format from "./format.js";
import { colour, inkOn } from "./scale.js";

const MOST_NODES = 24; // as rows and columns that can be read
const MOST_RATIO = 4; // of the colours
const NOTHING =
  "No delays between nodes: they are measured by messages from rank to rank, such as those of rings and pipelines, and none cross between nodes.";

export function showDelays({ nodes, delays }) {
  const known = { cells: delays.cells, measured: new Map(delays.measured.map((of) => [of[0] + "\n" + of[1], of])) };
  const isKnown = known.cells.length > 0 || known.measured.size > 0;
  byId("delays").hidden = !isKnown;
  const shown = isKnown ? nodesToShow(nodes.node, delays) : [];
  setText(byId("delays-note"), isKnown ? caption(nodes.node, shown) : NOTHING);
  replaceIfNew(byId("delays"), JSON.stringify([shown, delays]), () => (isKnown ? table(shown, known) : []));
}

// All nodes, or of many those that findings name, then those of the longest ways.
function nodesToShow(all, { cells, measured }) {
  if (all.length <= MOST_NODES) return all;
  const exists = new Set(all);
  const named = [...cells, ...measured].flatMap(([source, target]) => [source, target]).filter((node) => exists.has(node));
  const shown = new Set([...new Set(named)].slice(0, MOST_NODES));
  return all.filter((node) => shown.has(node));
}

function caption(all, shown) {
  const part = shown.length < all.length ? ` Of ${format.whole(all.length)} nodes, those that findings name and those of the longest ways.` : "";
  return `Messages from a row to a column, times as long as others of their size.${part}`;
}

function table(nodes, known) {
  const head = element("tr", "", element("th", "", "from \\ to"), ...nodes.map((node) => heading(node, "col")));
  const rows = nodes.map((source) =>
    element("tr", "", heading(source, "row"), ...nodes.map((target) => cell(source, target, known))));
  return [element("thead", "", head), element("tbody", "", ...rows)];
}

function heading(node, scope) {
  const made = element("th", "", node);
  made.scope = scope;
  return made;
}

function cell(source, target, { cells, measured }) {
  if (source === target) return element("td", "quiet", "");
  const found = cells.find(([from, to]) => (from === source || from === null) && (to === target || to === null));
  const seen = measured.get(source + "\n" + target);
  if (!found && !seen) return element("td", "quiet", "·");
  const [ratio, text] = found ? [found[2], found[3]] : [seen[2], `${format.whole(seen[3])} messages`];
  const share = ratio == null ? 1 : Math.min(1, Math.log(Math.max(1, ratio)) / Math.log(MOST_RATIO));
  const made = element("td", "", ratio == null ? "slow" : `${ratio.toFixed(2)}×`);
  made.style.background = colour(share);
  made.style.color = inkOn(share);
  made.title = text;
  return made;
}
