// The delay matrix: who sends down, who receives across.

import { byId, element, replaceIfNew, setText } from "./dom.js";
import * as format from "./format.js";
import { colour, inkOn } from "./scale.js";

const MOST_NODES = 24; // as rows and columns that can be read
const MOST_RATIO = 4; // of the colours
const NOTHING =
  "No delays between nodes: the controller learns of them from findings about sources, destinations and links, and there are none now.";

export function showDelays({ nodes, delays }) {
  const { cells } = delays;
  byId("delays").hidden = !cells.length;
  const shown = cells.length ? nodesToShow(nodes.node, cells) : [];
  setText(byId("delays-note"), cells.length ? caption(nodes.node, shown) : NOTHING);
  replaceIfNew(byId("delays"), JSON.stringify([shown, cells]), () => (cells.length ? table(shown, cells) : []));
}

// All nodes, or of many those that are named.
function nodesToShow(all, cells) {
  if (all.length <= MOST_NODES) return all;
  const named = new Set(cells.flat().filter((value) => all.includes(value)));
  return all.filter((node) => named.has(node)).slice(0, MOST_NODES);
}

function caption(all, shown) {
  const part = shown.length < all.length ? ` Of ${format.whole(all.length)} nodes, those that findings name.` : "";
  return `Messages from a row to a column, times as long as others of their size.${part}`;
}

function table(nodes, cells) {
  const head = element("tr", "", element("th", "", "from \\ to"), ...nodes.map((node) => heading(node, "col")));
  const rows = nodes.map((source) =>
    element("tr", "", heading(source, "row"), ...nodes.map((target) => cell(source, target, cells))));
  return [element("thead", "", head), element("tbody", "", ...rows)];
}

function heading(node, scope) {
  const made = element("th", "", node);
  made.scope = scope;
  return made;
}

function cell(source, target, cells) {
  const found = cells.find(([from, to]) => (from === source || from === null) && (to === target || to === null));
  if (source === target || !found) return element("td", "quiet", source === target ? "" : "·");
  const [, , ratio, text] = found;
  const share = ratio == null ? 1 : Math.log(Math.max(1, ratio)) / Math.log(MOST_RATIO);
  const made = element("td", "", ratio == null ? "slow" : `${ratio.toFixed(2)}×`);
  made.style.background = colour(share);
  made.style.color = inkOn(share);
  made.title = text;
  return made;
}
