// Numbers as people read them. What is not known is a dash.

const NONE = "–";
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const whole = (value) => (value == null ? NONE : WHOLE.format(value));
export const loss = (value) => (value == null ? NONE : value.toFixed(4));

export function speed(value) {
  if (value == null) return NONE;
  if (value >= 1e6) return `${(value / 1e6).toFixed(2)} M`;
  return value >= 1e5 ? `${(value / 1e3).toFixed(0)} k` : whole(value);
}

// A short time, with three digits.
export function seconds(value) {
  if (value == null) return NONE;
  if (value === 0) return "0 s";
  if (value >= 10) return `${value.toFixed(1)} s`;
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 1e-3 ? `${(value * 1e3).toPrecision(3)} ms` : `${(value * 1e6).toFixed(0)} µs`;
}

// A long time, in its two largest units.
export function duration(value) {
  if (value == null) return NONE;
  const total = Math.round(value);
  const days = Math.floor(total / 86400);
  const hours = Math.floor(total / 3600) % 24;
  const minutes = Math.floor(total / 60) % 60;
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${total % 60} s` : `${total} s`;
}

export function bytes(value) {
  if (value == null) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, value > 0 ? Math.floor(Math.log2(value) / 10) : 0);
  const amount = value / 1024 ** power;
  return `${amount >= 100 || power === 0 ? amount.toFixed(0) : amount.toFixed(1)} ${units[power]}`;
}

export function clock(secondsSince1970) {
  const time = new Date(secondsSince1970 * 1000);
  const today = time.toDateString() === new Date().toDateString();
  const hours = time.toLocaleTimeString("en-GB");
  return today ? hours : `${time.toLocaleDateString("en-CA")} ${hours}`;
}

// 0, 1, 2, 3, 7 as "0–3, 7".
export function ranges(numbers) {
  const runs = [];
  for (const number of [...numbers].sort((a, b) => a - b)) {
    if (runs.length && runs.at(-1)[1] === number - 1) runs.at(-1)[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`)).join(", ") || NONE;
}
