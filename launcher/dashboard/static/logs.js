// Logs of ranks, a page at a time.

import { get, TokenMissing } from "./client.js";
import { byId, setText } from "./dom.js";
import * as format from "./format.js";

const PERIOD_MS = 2000;

export class LogView {
  #page = null;
  #timer = null;

  constructor() {
    byId("log-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#newest();
    });
    byId("log-kind").addEventListener("change", () => this.#newest());
    byId("log-older").addEventListener("click", () => this.#load(`before=${this.#page.begin}`, true));
    byId("log-newer").addEventListener("click", () => this.#load(`after=${this.#page.end}`, false));
    byId("log-follow").addEventListener("change", () => this.#newest());
  }

  open(rank) {
    byId("log-rank").value = `${rank}`;
    byId("log-panel").scrollIntoView({ block: "nearest" });
    byId("log-text").focus({ preventScroll: true });
    this.#newest();
  }

  #newest() {
    return this.#load("", false);
  }

  async #load(place, isOlder) {
    clearTimeout(this.#timer);
    const rank = byId("log-rank").value;
    if (!/^\d+$/.test(rank)) return;
    const label = `rank ${rank}`;
    try {
      const page = await get(`api/logs/${rank}?kind=${byId("log-kind").value}${place && `&${place}`}`);
      const isMoved = !this.#page || page.begin !== this.#page.begin || page.end !== this.#page.end;
      this.#page = page;
      setText(byId("log-text"), page.text);
      setText(byId("log-note"), page.size ? `${label}: bytes ${format.whole(page.begin)} to ${format.whole(page.end)} of ${format.whole(page.size)}` : `${label} has printed nothing`);
      if (isMoved) byId("log-text").scrollTop = isOlder ? 0 : byId("log-text").scrollHeight;
    } catch (error) {
      if (error instanceof TokenMissing) return;
      this.#page = null;
      setText(byId("log-text"), "");
      setText(byId("log-note"), error.message);
    }
    byId("log-older").disabled = !this.#page?.begin;
    byId("log-newer").disabled = !this.#page || this.#page.end >= this.#page.size;
    if (byId("log-follow").checked && !place) this.#timer = setTimeout(() => this.#newest(), PERIOD_MS);
  }
}
