// The steps that were trained, and fewer of them to draw.

// After a restart, steps are trained again: `line` is what counts now, `lost` are the stretches that were undone.
export class History {
  line = [];
  lost = [];

  // `points`: [step, loss, tokens per second, workers], as they were trained.
  add(points) {
    for (const [step, loss, speed, workers] of points) {
      if (this.line.length && step <= this.line.at(-1).step) this.undo(step);
      this.line.push({ step, loss, speed, workers });
    }
  }

  undo(step) {
    let first = this.line.length;
    while (first > 0 && this.line[first - 1].step >= step) first -= 1;
    const before = this.line.slice(Math.max(0, first - 1), first); // so that the stretch begins on the line
    this.lost.push([...before, ...this.line.splice(first)]);
  }
}

// At most `limit` points: of every bucket the lowest and the highest, so that no spike is lost.
export function thin(points, limit, value) {
  if (points.length <= limit) return points;
  const size = Math.ceil((2 * points.length) / limit);
  const kept = [];
  for (let start = 0; start < points.length; start += size) {
    const bucket = points.slice(start, start + size);
    kept.push(...extremes(bucket, value));
  }
  return kept;
}

function extremes(bucket, value) {
  const finite = bucket.filter((point) => value(point) !== null);
  if (finite.length < 2) return [finite[0] ?? bucket[0]];
  let [low, high] = [0, 0];
  finite.forEach((point, i) => {
    if (value(point) < value(finite[low])) low = i;
    if (value(point) > value(finite[high])) high = i;
  });
  return low === high ? [finite[low]] : [finite[Math.min(low, high)], finite[Math.max(low, high)]];
}

// The mean over stretches of equal length, for the eye: with thousands of steps, single ones are noise.
export function means(points, count, value) {
  const size = Math.ceil(points.length / count);
  const found = [];
  for (let start = 0; start < points.length; start += size) {
    const finite = points.slice(start, start + size).filter((point) => value(point) !== null);
    const sum = finite.reduce((total, point) => total + value(point), 0);
    if (finite.length) found.push({ step: finite[finite.length >> 1].step, mean: sum / finite.length });
  }
  return { found, size };
}

// Dense where the reader looks (`seen`: two steps, or null for everything), coarse beside it, so that zooming out
// never meets an empty chart.
export function thinAround(points, seen, value) {
  if (seen === null) return thin(points, 1500, value);
  const [from, to] = seen;
  return [
    ...thin(points.filter(({ step }) => step < from), 200, value),
    ...thin(points.filter(({ step }) => step >= from && step <= to), 1500, value),
    ...thin(points.filter(({ step }) => step > to), 200, value),
  ];
}
