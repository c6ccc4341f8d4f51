// The messages of one conversation as elements.

import { GrowingText } from "./markdown.js";
import { isLive } from "./store.js";
import { describeEnding } from "./words.js";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Of `org/model.gguf`, the last part. */
export const nameOf = (model) => model?.split("/").at(-1) || "Answer";
const isBlank = (text) => !text.trim();

/** An answer, or what the user wrote. */
class MessageView {
  constructor(message, plain, onDraw) {
    this.message = message;
    this.isAnswer = message.role === "assistant";
    this.heading = element("h2", { class: "who" }, this.isAnswer ? nameOf(message.model) : "You");
    this.body = element("div", { class: "text", "data-testid": this.isAnswer ? "answer" : "question" });
    this.root = element("article", { "data-role": message.role, "data-message-id": message.id });
    this.root.append(this.heading);
    this.text = new GrowingText(this.body, { plain: plain || !this.isAnswer, onDraw });
    if (this.isAnswer) this.#addReasoning(onDraw);
    this.root.append(this.body);
    this.#fill();
    if (this.isAnswer) this.#addCopy();
    this.update();
  }

  #addReasoning(onDraw) {
    const body = element("div", { class: "text" });
    this.reasoning = new GrowingText(body, { plain: true, onDraw });
    this.details = element("details", { class: "reasoning", hidden: "" }, element("summary", {}, "Thoughts"), body);
    this.root.append(this.details);
  }

  #addCopy() {
    const copy = element("button", { class: "link copy", type: "button" }, "Copy");
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(this.message.text);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
    this.copy = copy;
    this.ending = element("span", { class: "ending" });
    this.tools = element("div", { class: "tools" }, copy, this.ending);
    this.root.append(this.tools);
  }

  #fill() {
    const { text, reasoning, gaps = [] } = this.message;
    let start = 0;
    for (const gap of gaps) {
      this.text.append(text.slice(start, gap.at));
      this.gap(gap);
      start = gap.at;
    }
    this.text.append(text.slice(start));
    if (reasoning) this.add("", reasoning);
    if (this.isAnswer && !isLive(this.message)) this.text.end();
    this.flush();
  }

  add(text, reasoning) {
    if (text) this.text.append(text);
    if (reasoning) {
      this.details.hidden = false;
      this.reasoning.append(reasoning);
    }
  }

  gap({ bytes }) {
    const words = `Here ${bytes.toLocaleString("en")} bytes of the stream are missing: the server had dropped them.`;
    this.text.insert(element("p", { class: "gap", role: "note", "data-gap": bytes }, words));
  }

  flush() {
    this.text.flush();
    this.reasoning?.flush();
  }

  /** The answer is over. */
  end() {
    this.text.end();
    this.reasoning.flush();
    this.update();
  }

  /** What may have changed about it besides its text. */
  update() {
    if (!this.isAnswer) return;
    const { state, text, offset, epoch } = this.message;
    Object.assign(this.root.dataset, { state, offset: offset ?? 0, epoch: epoch ?? "" });
    this.root.setAttribute("aria-busy", String(isLive(this.message)));
    this.root.classList.toggle("waiting", isLive(this.message) && isBlank(text));
    // There is no clipboard on plain http:// addresses.
    this.copy.hidden = isLive(this.message) || isBlank(text) || !navigator.clipboard;
    this.ending.textContent = state === "completed" ? "" : describeEnding(this.message);
  }
}

export class Transcript {
  #views = new Map();
  #shown = "";
  #plain = false;
  #atBottom = true;
  #top = 0;

  /** @param {HTMLElement} root @param {HTMLElement} scroller */
  constructor(root, scroller) {
    this.root = root;
    this.scroller = scroller;
    scroller.addEventListener("scroll", () => this.#lookAtScroll(), { passive: true });
    // The composer grows, a keyboard opens, a thought is unfolded: stay at the end.
    new ResizeObserver(() => this.#stick()).observe(scroller);
  }

  #lookAtScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    const left = scrollHeight - scrollTop - clientHeight;
    const up = scrollTop < this.#top && left > 1; // who begins to scroll up is let go at once
    this.#top = scrollTop;
    this.#atBottom = left < 48 && !up;
  }

  /** Stay at the end while that is where the reader is. */
  #stick() {
    if (this.#atBottom) this.scroller.scrollTop = 1e9;
  }

  toEnd() {
    this.#atBottom = true;
    this.#stick();
  }

  /** Show these messages; of the same conversation what is there already stays as it is. */
  show({ id, messages }, plain) {
    const isSame = id === this.#shown && plain === this.#plain;
    const before = isSame ? this.#views : new Map();
    const viewOf = (message) =>
      before.get(message.id)?.message === message
        ? before.get(message.id)
        : new MessageView(message, plain, () => this.#stick());
    this.#views = new Map(messages.map((message) => [message.id, viewOf(message)]));
    this.#place([...this.#views.values()].map((view) => view.root));
    [this.#shown, this.#plain] = [id, plain];
    if (!isSame) this.#atBottom = true;
    this.#stick();
  }

  /** What stands where it belongs is not touched: a long history would be laid out anew. */
  #place(roots) {
    const { children } = this.root;
    for (const [i, root] of roots.entries())
      if (children[i] !== root) this.root.insertBefore(root, children[i] ?? null);
    while (children.length > roots.length) this.root.lastElementChild.remove();
  }

  view(message) {
    return this.#views.get(message.id);
  }
}
