// For screen readers: whole sentences, not every token.

const PAUSE_MS = 1500;
// A full-width mark ends a sentence by itself; what closes a quotation belongs to it.
const SENTENCE_END = /[.!?…](?=\s)|[。！？][」』）】”’]*|\n/g;
const KEPT = 8;

export class Announcer {
  #text = "";
  #timer = 0;

  /** @param {HTMLElement} region an aria-live one */
  constructor(region) {
    this.region = region;
  }

  add(text) {
    this.#text += text;
    this.#timer ||= setTimeout(() => this.#flush(), PAUSE_MS);
  }

  /** The answer is over: say the rest. */
  end() {
    this.#say(this.#text);
    this.clear();
  }

  clear() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#text = "";
  }

  #flush() {
    this.#timer = 0;
    const ends = [...this.#text.matchAll(SENTENCE_END)];
    if (!ends.length) return;
    const cut = ends.at(-1).index + ends.at(-1)[0].length;
    this.#say(this.#text.slice(0, cut));
    this.#text = this.#text.slice(cut);
  }

  #say(text) {
    const words = text.replace(/[*_`#>|]+/g, "").trim();
    if (!words) return;
    const line = document.createElement("p");
    line.textContent = words;
    this.region.append(line);
    while (this.region.childElementCount > KEPT) this.region.firstElementChild.remove();
  }
}
