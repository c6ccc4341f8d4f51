// Light Markdown as it streams: only the last block is made anew, finished ones stay.
//
// Elements are made one by one from marked's tokens; HTML in the text is shown as the text it is.

import { lexer } from "./vendor/marked/marked.esm.js";

// Making the last block anew for every token costs more the longer it gets: beyond this it is cut,
// lists between items, paragraphs between sentences. What can't be cut is shown as it is written,
// from the second figure on. A code block is only added to from its first line on: who selects in
// it or scrolls it is not disturbed.
const LONG_CHARS = 4000;
const TOO_LONG_CHARS = 20_000;
const BLANK_CHARS = 100; // so many between two blocks say no more than two
// marked descends a level for each quote or list within another: text that nests deeper than anyone
// writes, enough to exhaust the stack, is shown as it is written.
const TOO_DEEP = /^(?:[ \t]*>){40}|^[ \t]*(?:[*+-][ \t]+){40}/m;
// An indented fence takes its indentation from each line: that is left to marked.
const FENCE = /^(?:(```+)[^`\n]*|(~~~+)[^\n]*)\n/;
const BLANK_LINE = { ends: /\n[ \t]*\n/, mayEnd: /^[ \t]*$/ };
const SAFE_LINK = /^(https?|mailto):/i;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'", nbsp: "\u00a0" };
const INLINE = { strong: "strong", em: "em", del: "del" };

function element(name, children = [], attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const unescape = (text) => text.replace(/&(amp|lt|gt|quot|#39|nbsp);/g, (_, name) => ENTITIES[name]);
const nodes = (tokens) => tokens.flatMap(node);

/** Where the line ends begin that stand last before `end`: marked is of two minds whether they are code. */
function lineEndsFrom(text, end = text.length) {
  while (text[end - 1] === "\n") end--;
  return end;
}

function link(token) {
  if (!SAFE_LINK.test(token.href)) return nodes(token.tokens ?? []);
  const attributes = { href: token.href, rel: "noopener noreferrer nofollow", target: "_blank" };
  return [element("a", token.tokens ? nodes(token.tokens) : [token.text || token.href], attributes)];
}

function list(token) {
  const items = token.items.map((item) => element("li", nodes(item.tokens)));
  const start = token.ordered && token.start !== 1 ? { start: token.start } : {};
  return element(token.ordered ? "ol" : "ul", items, start);
}

function table(token) {
  const row = (cells, name) => element("tr", cells.map((cell) => element(name, nodes(cell.tokens))));
  const body = token.rows.map((cells) => row(cells, "td"));
  const made = element("table", [element("thead", [row(token.header, "th")]), element("tbody", body)]);
  return element("div", [made], { class: "wide-content" });
}

/** The headings that one of this depth stands under, and itself. */
const under = (outline, depth) => [...outline.filter((one) => one < depth), depth];

/** The tokens of a text; null if it can't be taken apart. */
function lexed(source) {
  if (TOO_DEEP.test(source)) return null;
  try {
    return lexer(source);
  } catch {
    return null;
  }
}

/** What a token becomes; what isn't known here is shown as it was written. */
function node(token) {
  switch (token.type) {
    case "space":
    case "def":
      return [];
    case "heading":
      if (!token.tokens.length) return [element("p", [token.raw])]; // its words are still to come
      // The page has h1 and h2; whether a model begins with # or ###, the next is h3.
      return [element(`h${Math.min(6, 2 + (token.outline?.length ?? token.depth))}`, nodes(token.tokens))];
    case "paragraph":
      return [element("p", nodes(token.tokens))];
    case "text":
      return token.tokens ? nodes(token.tokens) : [unescape(token.text)];
    case "escape":
      return [token.text];
    case "code":
      return [element("pre", [element("code", [token.text.slice(0, lineEndsFrom(token.text))])], { tabindex: "0" })]; // scrolls by keyboard
    case "blockquote":
      return [element("blockquote", nodes(token.tokens))];
    case "list":
      return [list(token)];
    case "table":
      return [table(token)];
    case "hr":
      return [element("hr")];
    case "br":
      return [element("br")];
    case "codespan":
      return [element("code", [token.text])];
    case "checkbox":
      return [token.checked ? "☑ " : "☐ "];
    case "link":
    case "image":
      return link(token);
    case "html":
      return token.block ? [element("p", [token.raw.trim()], { class: "as-is" })] : [token.raw];
    default:
      return INLINE[token.type] ? [element(INLINE[token.type], nodes(token.tokens))] : [token.raw];
  }
}

/** Where a long paragraph may be cut: behind its last sentence, or word, outside of any markup. */
function cutOf(token) {
  const last = token.tokens.at(-1);
  if (last.type !== "text") return token.raw.length - last.raw.length;
  const [, sentences, words] = /^(?:([^]*[.!?]\s)|([^]*\s))?/.exec(last.raw.slice(0, -1));
  return token.raw.length - last.raw.length + (sentences ?? words ?? "").length;
}

/** The part of a long block that nothing can change any more, as a token; null if there is none. */
function finalPart(token) {
  if (token.type === "list" && token.items.length > 1) {
    const items = token.items.slice(0, -1);
    return { ...token, items, raw: items.map(({ raw }) => raw).join("") };
  }
  if (token.type !== "paragraph") return null;
  const raw = token.raw.slice(0, cutOf(token));
  const tokens = raw && lexed(raw);
  return tokens ? { ...tokens[0], raw } : null;
}

/** What ends the code behind such a fence, where a line begins, and what may become that; as marked has it. */
function closing(fence) {
  const mark = fence[0];
  return { ends: new RegExp(`\\n {0,3}${fence}${mark}* *(\n|$)`), mayEnd: new RegExp(`^ {0,3}${mark}* *$`) };
}

/** A text that grows. `append` is cheap; the page changes once a frame at most. */
export class GrowingText {
  #pending = "";
  #source = ""; // of the last block
  #last = null; // its elements' container
  #outline = []; // depths of the headings that the last block stands under
  #grows = null; // the text node of a block that is only added to ...
  #until = null; // ... and what ends it: `ends`, and `mayEnd` for the last line
  #frame = 0;

  /** @param {HTMLElement} root @param {{ plain: boolean, onDraw?: () => void }} options */
  constructor(root, { plain, onDraw = () => {} }) {
    this.root = root;
    this.plain = plain;
    this.onDraw = onDraw;
    if (plain) this.#grow("as-is", "", null);
  }

  append(text) {
    this.#pending += text;
    this.#frame ||= requestAnimationFrame(() => this.flush());
  }

  /** Put an element behind the text so far. */
  insert(note) {
    this.end();
    this.root.append(note);
    if (this.plain) this.#grow("as-is", "", null);
  }

  /** There is no more, or something else follows. */
  end() {
    this.flush();
    if (this.#grows) this.#endGrowing();
    else if (this.#source) this.#last?.replaceWith(...this.#last.childNodes);
    this.#last = this.#grows = null;
    this.#source = "";
  }

  flush() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const text = this.#pending;
    this.#pending = "";
    if (!text) return;
    if (this.plain) this.#grows.appendData(text);
    else this.#add(text.replaceAll("\r", ""));
    this.onDraw();
  }

  #add(text) {
    this.#source += text;
    if (this.#grows && !this.#addGrowing()) return;
    const tokens = lexed(this.#source);
    if (!tokens) {
      this.#grow("as-is", "", BLANK_LINE);
      return this.#add("");
    }
    let outline = this.#outline;
    for (const token of tokens)
      if (token.type === "heading") token.outline = outline = under(outline, token.depth);
    // Blank lines end nothing yet: a list may go on behind them.
    const isFinal = () => tokens.slice(1).some(({ type }) => type !== "space");
    while (isFinal() && this.#source.startsWith(tokens[0].raw)) this.#finish(tokens.shift());
    const fence = tokens[0]?.type === "code" && FENCE.exec(this.#source);
    if (fence && this.#grow("code", fence[0], closing(fence[1] ?? fence[2]))) return this.#add("");
    if (this.#source.length > LONG_CHARS && tokens.length && this.#shorten(tokens)) return this.#add("");
    this.#last ??= this.root.appendChild(element("div"));
    this.#last.replaceChildren(...nodes(tokens));
  }

  /** A block that nothing can change any more. */
  #finish(token) {
    this.#source = this.#source.slice(token.raw.length);
    this.#outline = token.outline ?? this.#outline;
    const made = nodes([token]);
    if (this.#last) this.#last.replaceWith(...made);
    else this.root.append(...made);
    this.#last = null;
  }

  /** Make less of the last block; false if that can't be done. */
  #shorten(tokens) {
    const blank = tokens.at(-1).type === "space" ? tokens.at(-1).raw : "";
    const part = finalPart(tokens[0]);
    if (blank.length > BLANK_CHARS) this.#source = `${this.#source.slice(0, -blank.length)}\n\n`;
    else if (part && this.#source.startsWith(part.raw)) this.#finish(part);
    else if (this.#source.length > TOO_LONG_CHARS) this.#grow("as-is", "", BLANK_LINE);
    else return false;
    return true;
  }

  /** From here on text is added to one node, until `until`. */
  #grow(kind, opening, until) {
    this.#last?.remove();
    this.#last = null;
    this.#source = this.#source.slice(opening.length);
    this.#grows = document.createTextNode("");
    this.#until = until;
    const block = kind === "code" ? element("code", [this.#grows]) : this.#grows;
    const attributes = kind === "code" ? { tabindex: "0" } : { class: kind };
    this.root.append(element(kind === "code" ? "pre" : "div", [block], attributes));
    return true;
  }

  /** Whether the block that is added to is over; a line that may become its end is held back. */
  #addGrowing() {
    const end = this.#findEnd();
    const isOver = end !== null && end.behind < this.#source.length;
    const held = end ? end.at : this.#heldFrom();
    this.#grows.appendData(this.#source.slice(0, held));
    this.#source = this.#source.slice(isOver ? end.behind : held);
    if (isOver) this.#grows = null;
    return isOver;
  }

  /** Directly behind its opening a block is at the start of a line, though no line end is to be seen. */
  get #isFresh() {
    return this.#grows.data === "";
  }

  #findEnd() {
    const start = this.#isFresh ? 1 : 0;
    const found = this.#until?.ends.exec("\n".repeat(start) + this.#source);
    if (!found) return null;
    const at = lineEndsFrom(this.#source, Math.max(0, found.index - start));
    return { at, behind: found.index + found[0].length - start };
  }

  /** Only the last line can, with more to come, become an end. */
  #heldFrom() {
    const at = this.#source.lastIndexOf("\n");
    const mayEnd = (at >= 0 || this.#isFresh) && this.#until.mayEnd.test(this.#source.slice(at + 1));
    return mayEnd ? lineEndsFrom(this.#source, Math.max(0, at)) : this.#source.length;
  }

  /** Nothing follows: an end needs no next line. */
  #endGrowing() {
    const end = this.#findEnd();
    this.#grows.appendData(this.#source.slice(0, end ? end.at : lineEndsFrom(this.#source)));
  }
}
