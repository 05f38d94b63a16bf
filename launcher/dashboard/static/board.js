// What the stream has told so far: sections of fields, of which each message brings those that changed.

export class Board {
  job = {};
  nodes = { node: [] };
  ranks = { rank: [] };
  findings = { found: [] };
  delays = { cells: [], measured: [] };
  recovery = { spans: [], incidents: [], omitted: 0 };
  plan = { told: null };

  apply(changed) {
    for (const [name, fields] of Object.entries(changed)) this[name] = { ...this[name], ...fields };
  }

  get numRanks() {
    return this.ranks.rank.length;
  }

  stateOf(index) {
    return this.ranks.states[this.ranks.state[index]];
  }

  nodeOf(index) {
    return this.nodes.node[this.ranks.node[index]] ?? "–";
  }
}

// What can be seen of every rank: microseconds, or a number of steps. `null` where it is not known.
export const MEASURES = {
  compute: { name: "Compute time", isTime: true, of: ({ compute_us: own }) => own },
  wait: {
    name: "Waiting for others",
    isTime: true,
    of: ({ step_us: whole, compute_us: own }) =>
      whole.map((value, i) => (value == null || own[i] == null ? null : Math.max(0, value - own[i]))),
  },
  step: { name: "Step time", isTime: true, of: ({ step_us: whole }) => whole },
  behind: {
    name: "Steps behind",
    isTime: false,
    of: ({ step }) => {
      const most = step.reduce((found, value) => Math.max(found, value ?? 0), 0);
      return step.map((value) => (value == null ? null : most - value));
    },
  },
};

// The lower median: of two ranks one can be slow.
export function median(values) {
  const known = Float64Array.from(values.filter((value) => value != null)).sort();
  return known.length ? known[Math.floor((known.length - 1) / 2)] : null;
}
