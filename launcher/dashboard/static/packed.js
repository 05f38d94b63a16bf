// The micro-batches of every rank from the packed columns of a plan (parallelism/rank_work.py).

export function ranksOf({ lengths, packed }) {
  const rings = slices(packed.ring, starts(packed.ring_size));
  const recomputed = new Set(packed.recomputed);
  const microBatches = slices(packed.sequence, packed.micro_batch_start);
  return slices(microBatches, packed.rank_start).map((ofRank, rank) => ofRank.map((sequences, i) => {
    const isRecomputed = recomputed.has(packed.rank_start[rank] + i);
    return {
      pieces: sequences.map((sequence) => {
        const ring = rings[sequence];
        return { sequence, ring, ranges: share(lengths[sequence], ring.length, ring.indexOf(rank)) };
      }),
      recompute: isRecomputed ? "block" : "none",
      offload: isRecomputed ? packed.offload : 0,
    };
  }));
}

// What member `index` of a ring holds of a sequence: chunk `index` and its mirror image, of twice as many as members.
function share(length, ring, index) {
  if (ring === 1) return [[0, length]];
  const size = Math.floor(length / (2 * ring));
  const rest = length % (2 * ring);
  const longerTails = Math.min(rest, ring);
  const longerHeads = rest - longerTails;
  const begin = (chunk) =>
    chunk * size + Math.min(chunk, longerHeads) + Math.min(Math.max(chunk - ring, 0), longerTails);
  const [head, tail] = [index, 2 * ring - 1 - index].map((chunk) => [begin(chunk), begin(chunk + 1)]);
  if (head[1] === tail[0]) return [[head[0], tail[1]]];
  return [head, tail].filter(([start, stop]) => start < stop);
}

const slices = (values, starts) => starts.slice(1).map((stop, i) => values.slice(starts[i], stop));

function starts(sizes) {
  let total = 0;
  return [0, ...sizes.map((size) => (total += size))];
}
