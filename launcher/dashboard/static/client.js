// The token, and requests to the controller.

const KEY = "evermesh-token";
const SILENT_MS = 15_000; // the stream says something every second

export class TokenMissing extends Error {}
export class Unreachable extends Error {}

// The token comes behind the #, which a browser never sends. It leaves the address bar, so that it does not end up in
// bookmarks and screenshots; sessionStorage keeps it for this tab and this port alone, which no cookie would.
export function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return;
  keepToken(token);
  history.replaceState(null, "", location.pathname + location.search);
}

export const keepToken = (token) => sessionStorage.setItem(KEY, token.trim());

export async function get(path) {
  const answer = await request(path, AbortSignal.timeout(SILENT_MS));
  return told(() => answer.json());
}

// Gives every line of a stream of JSON to `take`, until it ends.
export async function watch(path, take) {
  const control = new AbortController();
  let timer = setTimeout(() => control.abort(), SILENT_MS);
  const answer = await request(path, control.signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  try {
    for (;;) {
      const { done, value } = await told(() => reader.read());
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => control.abort(), SILENT_MS);
      const [rest, ...begun] = value.split("\n");
      parts.push(rest);
      for (const next of begun) {
        take(JSON.parse(parts.join("")));
        parts = [next];
      }
    }
  } finally {
    clearTimeout(timer);
    control.abort();
  }
}

async function request(path, signal) {
  const token = sessionStorage.getItem(KEY);
  if (!token) throw new TokenMissing();
  const headers = { Authorization: `Bearer ${token}` };
  const answer = await told(() => fetch(path, { headers, cache: "no-store", signal }));
  if (answer.status === 401) {
    sessionStorage.removeItem(KEY);
    throw new TokenMissing();
  }
  if (!answer.ok) throw new Unreachable(await reason(answer, path));
  return answer;
}

async function reason(answer, path) {
  const { detail } = await answer.json().catch(() => ({}));
  return typeof detail === "string" ? detail : `it answers ${answer.status} to ${path}`;
}

async function told(work) {
  try {
    return await work();
  } catch (error) {
    const isLate = error.name === "TimeoutError" || error.name === "AbortError";
    throw new Unreachable(isLate ? `nothing heard for ${SILENT_MS / 1000} s` : "no connection", { cause: error });
  }
}
