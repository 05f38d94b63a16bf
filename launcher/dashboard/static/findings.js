// What is wrong now: findings, nodes that are set aside or do not answer, and what no copy protects.

import { byId, element, replaceIfNew, setText } from "./dom.js";

const MOST = 50;

export function showFindings({ findings, nodes, job }) {
  const lines = [...findings.found.map(ofFinding), ...ofNodes(nodes), ...ofRack(job)];
  byId("wrong").classList.toggle("calm", !lines.length);
  setText(byId("wrong-note"), lines.length > MOST ? `The first ${MOST} of ${lines.length}.` : lines.length ? "" : "Nothing is found, and no node is set aside.");
  replaceIfNew(byId("wrong-list"), JSON.stringify(lines), () => lines.slice(0, MOST).map(item));
}

const ofFinding = ({ kind, text, confidence, node, rank }) => ({
  kind,
  text,
  where: [rank != null ? `rank ${rank}` : "", node ?? ""].filter(Boolean).join(" on "),
  sure: `${Math.round(100 * confidence)} % sure`,
});

function ofNodes({ node, state = [], aside = [] }) {
  const found = [];
  node.forEach((name, i) => {
    if (aside[i] != null) found.push({ kind: "set aside", text: aside[i], where: name, sure: "" });
    if (["cut off", "lost", "refused"].includes(state[i])) found.push({ kind: state[i], text: `the node is ${state[i]}`, where: name, sure: "" });
  });
  return found;
}

const ofRack = ({ lost_rack: text }) => (text ? [{ kind: "rack unprotected", text, where: "", sure: "" }] : []);

function item({ kind, text, where, sure }) {
  return element("li", "", element("span", "kind failure", kind), element("span", "where", where), element("span", "text", text), element("span", "quiet", sure));
}
