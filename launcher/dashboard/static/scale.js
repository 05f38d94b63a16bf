// Colours of numbers: cividis (Nunez, Anderton and Renslow, 2018), which looks the same to people with and without
// colour-blindness, and whose lightness grows evenly, so that it can be read in grey.

const CIVIDIS = [
  [0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115],
  [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56],
];
const STEPS = 256;

const TABLE = Array.from({ length: STEPS }, (_, i) => {
  const place = (i / (STEPS - 1)) * (CIVIDIS.length - 1);
  const low = Math.min(CIVIDIS.length - 2, Math.floor(place));
  return CIVIDIS[low].map((from, c) => Math.round(from + (CIVIDIS[low + 1][c] - from) * (place - low)));
});
const COLOURS = TABLE.map(([r, g, b]) => `rgb(${r} ${g} ${b})`);
const IS_DARK = TABLE.map(([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b < 118);

const place = (share) => Math.round(Math.min(1, Math.max(0, share)) * (STEPS - 1));
export const colour = (share) => COLOURS[place(share)];
export const inkOn = (share) => (IS_DARK[place(share)] ? "#ffffff" : "#000000");

// From where to where colours go. What differs by less than a quarter of the median looks alike: noise is no news.
export function domain(values, middle) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value == null) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return [0, 1];
  return [Math.min(low, 0.75 * middle), Math.max(high, 1.25 * middle, low + 1)];
}
