// The token, and requests to the controller.

const KEY = "evermesh-token";
// JSON strings, or the numbers that JSON has no word for and Python writes all the same.
const STRING_OR_NOT_FINITE = /"(?:[^"\\]|\\.)*"|-?Infinity|NaN/g;

export class TokenMissing extends Error {}
export class Unreachable extends Error {}

// The token comes behind the #, which a browser never sends. It leaves the address bar, so that it does not end up in
// bookmarks and screenshots; sessionStorage keeps it for this tab alone.
export function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token === null) return;
  sessionStorage.setItem(KEY, token);
  history.replaceState(null, "", location.pathname + location.search);
}

export async function get(path) {
  const token = sessionStorage.getItem(KEY);
  if (!token) throw new TokenMissing();
  const [answer, text] = await request(path, token);
  if (answer.status === 401) {
    sessionStorage.removeItem(KEY);
    throw new TokenMissing();
  }
  if (!answer.ok) throw new Unreachable(`it answers ${answer.status} to ${path}`);
  return parse(text);
}

async function request(path, token) {
  const headers = { Authorization: `Bearer ${token}` };
  try {
    const answer = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(30_000) });
    return [answer, await answer.text()];
  } catch (error) {
    throw new Unreachable(error.name === "TimeoutError" ? "no answer in 30 s" : "no connection", { cause: error });
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return JSON.parse(text.replace(STRING_OR_NOT_FINITE, (found) => (found.startsWith('"') ? found : "null")));
  }
}
