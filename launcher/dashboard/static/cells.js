// Where the cell of every rank is: a row per node while there are few, else a strip per node, strips in bands.

const MOST_ROWS = 16;
const MOST_IN_ROW = 64;
const LABEL = 84;
const MOST_HEIGHT = 460;
const MOST_STRIP = 8;

// `counts`: ranks of every node, in the order of the ranks. Gives boxes [x, y] by rank, their size, the whole height.
export function layOut(counts, width) {
  const isFew = counts.length <= MOST_ROWS && Math.max(...counts) <= MOST_IN_ROW;
  return isFew ? rows(counts, width) : strips(counts, width);
}

function rows(counts, width) {
  const w = Math.max(4, Math.min(132, Math.floor((width - LABEL) / Math.max(...counts))));
  const h = Math.max(14, Math.min(34, Math.floor(MOST_HEIGHT / counts.length) - 4));
  const [x, y] = [[], []];
  const labels = counts.map((count, node) => {
    for (let i = 0; i < count; i++) {
      x.push(LABEL + i * w);
      y.push(node * (h + 4));
    }
    return { node, x: 0, y: node * (h + 4) + h / 2 };
  });
  return { x, y, w, h, labels, height: counts.length * (h + 4) };
}

function strips(counts, width) {
  const most = Math.max(...counts);
  const tall = most <= MOST_STRIP ** 2 ? Math.min(most, MOST_STRIP) : Math.ceil(Math.sqrt(most));
  for (let size = 30; ; size--) {
    const found = stripsOf(counts, tall, size, width);
    if (found.height <= MOST_HEIGHT || size === 3) return found;
  }
}

function stripsOf(counts, tall, size, width) {
  const gap = size > 6 ? 4 : 2;
  const [x, y] = [[], []];
  let [left, top] = [0, 0];
  for (const count of counts) {
    const wide = Math.ceil(count / tall) * size;
    if (left > 0 && left + wide > width) [left, top] = [0, top + tall * size + 2 * gap];
    for (let i = 0; i < count; i++) {
      x.push(left + Math.floor(i / tall) * size);
      y.push(top + (i % tall) * size);
    }
    left += wide + gap;
  }
  return { x, y, w: size, h: size, labels: [], height: top + tall * size };
}

// The rank whose cell holds a point, or null.
export function find({ x, y, w, h }, px, py) {
  for (let i = 0; i < x.length; i++) {
    if (px >= x[i] && px < x[i] + w && py >= y[i] && py < y[i] + h) return i;
  }
  return null;
}
