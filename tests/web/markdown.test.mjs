// Text that grows looks, at its end, as if it had come at once; and nothing in it is HTML.

import assert from "node:assert/strict";
import { test } from "node:test";

import { root } from "./dom.mjs";

const { lexer } = await import("../../pyserve/web/vendor/marked/marked.esm.js");
const { GrowingText } = await import("../../pyserve/web/markdown.js");

function grow(text, step = text.length, options = { plain: false }) {
  const target = root();
  const growing = new GrowingText(target, options);
  for (let start = 0; start < text.length; start += step) {
    growing.append(text.slice(start, start + step));
    growing.flush();
  }
  growing.end();
  return target;
}

// The box around the last block and the blank lines between blocks are not part of the text.
const shape = (target) => target.html.replace(/<\/?div>/g, "").replace(/\s+/g, " ");

const DOCUMENT = `# Heading

Some *text* with **bold**, \`code\` and a [link](https://example.org).

- one
- two
  - nested

1. a
2. b

| a | b |
|---|---|
| 1 | 2 |

\`\`\`python
print('<b>hi</b>')
\`\`\`

> quote &amp; &lt;

- [ ] open
- [x] done

an **unfinished end`;

test("cut anywhere, a document becomes the same elements", () => {
  const whole = shape(grow(DOCUMENT));
  for (const step of [1, 2, 3, 5, 7, 11, 64]) assert.equal(shape(grow(DOCUMENT, step)), whole);
  for (const name of ["h3", "em", "strong", "code", "a", "ul", "ol", "table", "pre", "blockquote"])
    assert.ok(whole.includes(`<${name}`), name);
});

test("HTML is shown as text, and links lead to http, https and mailto only", () => {
  const text = 'a <script>alert(1)</script>\n\n<img src=x onerror=alert(1)>\n\n[x](javascript:alert(1)) ![y](data:text/html,z)';
  const { html } = grow(text);
  assert.ok(!/<(script|img|a)\b/.test(html), html);
  assert.ok(html.includes("&lt;script>alert(1)&lt;/script>"));
  assert.match(grow("[x](https://a.b)").html, /<a href="https:\/\/a.b" rel="noopener noreferrer nofollow"/);
});

test("what only looks like a fence in the middle of a line ends no code block, wherever it is cut", () => {
  const opening = "```python\n";
  const code = `${"x = 1\n".repeat(900)}help = '''Example: `;
  const rest = ["```\n", "code\n", "'''\n", "  ```` \t\n", "```", "\n"];
  const target = root();
  const growing = new GrowingText(target, { plain: false });
  for (const chunk of [opening, code, ...rest, "\nAfter."]) {
    growing.append(chunk);
    growing.flush();
  }
  growing.end();
  assert.deepEqual(target.childNodes.map(({ name }) => name), ["pre", "p"]);
  assert.equal(target.childNodes[0].textContent, `${code}${rest.slice(0, 4).join("")}`.replace(/\n$/, ""));
});

test("code blocks are the same however they come, with fences of any kind, open or closed", () => {
  const pieces = ["```", "````", "~~~", "`", " ", "\t", "\n", "\n", "code", "js"];
  let seed = 7;
  const next = (below) => (seed = (seed * 16807) % 2147483647) % below;
  for (let round = 0; round < 3000; round++) {
    const mark = ["```", "~~~", "````"][next(3)];
    const inner = Array.from({ length: next(14) }, () => pieces[next(pieces.length)]).join("");
    const text = `${mark}js\n${inner}`;
    const [{ text: code, type }] = lexer(text);
    assert.equal(type, "code");
    const whole = grow(text);
    // Of the line ends at the end of a block marked keeps one, none or all.
    assert.equal(whole.childNodes[0].textContent, code.replace(/\n+$/, ""), text);
    for (const step of [1, 2, 3]) assert.equal(shape(grow(text, step)), shape(whole), `${text}, by ${step}`);
  }
});

test("while a code block grows, its element stays: focus, selection and scrolling with it", () => {
  const target = root();
  const growing = new GrowingText(target, { plain: false });
  growing.append("Text\n\n```js\nfirst();\n");
  growing.flush();
  const [, block] = target.childNodes;
  const code = block.childNodes[0].childNodes[0];
  growing.append("second();\n```\nmore");
  growing.flush();
  assert.equal(target.childNodes[1], block);
  assert.equal(block.childNodes[0].childNodes[0], code);
  assert.equal(block.textContent, "first();\nsecond();");
});

test("endless spaces and line ends cost no more the longer they go on", () => {
  for (const [before, blank] of [
    [`\`\`\`json\n${"1,\n".repeat(2000)}`, " "],
    [`\`\`\`json\n${"1,\n".repeat(2000)}`, "\n"],
    ["Here it is:", " "],
    ["Here it is:", "\n"],
    ["- one", "\n"],
    ["", "\n"],
    ["> quoted", "\n"],
  ]) {
    const start = performance.now();
    const target = grow(before + blank.repeat(60_000) + "end", 100);
    const took = performance.now() - start;
    assert.match(target.textContent, /end$/);
    assert.ok(took < 3000, `${JSON.stringify([before.slice(0, 12), blank])}: ${took} ms for 600 frames`);
    assert.match(grow(before + blank.repeat(60_000) + "end").textContent, /end$/);
  }
});

test("a long code block grows in one element and ends at its fence", () => {
  const lines = Array.from({ length: 800 }, (_, i) => `let x${i} = \`\`"${i}";`);
  const text = `\`\`\`js\n${lines.join("\n")}\n\`\`\`\n\nafter *it*`;
  for (const step of [1, 2, 5, 333]) {
    const target = grow(text, step);
    assert.equal(target.childNodes[0].textContent, lines.join("\n"));
    assert.ok(target.html.endsWith("<p>after <em>it</em></p></main>"));
  }
});

test("a long list and a long paragraph are cut without losing a word or their markup", () => {
  const list = Array.from({ length: 700 }, (_, i) => `${i + 1}. item **${i}**`).join("\n");
  const { html } = grow(list, 6);
  assert.equal(html.match(/<li>/g).length, 700);
  assert.ok(!html.includes("**"));
  const words = Array.from({ length: 3000 }, (_, i) => (i % 50 ? `word${i}` : `**bold${i}**.`));
  const paragraph = grow(words.join(" "), 6).textContent;
  assert.deepEqual(paragraph.match(/(word|bold)\d+/g), words.map((word) => /\w+/.exec(word)[0]));
  assert.ok(!paragraph.includes("**"));
});

test("what can't be cut is shown as it is, and the next block is Markdown again", () => {
  const target = grow(`${"x".repeat(30_000)}\n\nafter *it*`, 7);
  assert.ok(target.textContent.startsWith("x".repeat(30_000)));
  assert.ok(target.html.endsWith("<p>after <em>it</em></p></main>"));
});

test("plain text is exactly the text", () => {
  const text = `${DOCUMENT}\r\n\u0000\ufeff 日本\n\n`;
  assert.equal(grow(text, 3, { plain: true }).textContent, text);
});

test("a note stands where the text was when it came", () => {
  const target = root();
  const growing = new GrowingText(target, { plain: false });
  growing.append("one **two");
  const note = document.createElement("note");
  growing.insert(note);
  growing.append("three");
  growing.end();
  assert.deepEqual(target.childNodes.map(({ name }) => name), ["p", "note", "p"]);
});

test("headings follow the page's own without leaving out a level, whatever they begin with", () => {
  const levels = (text, step) => [...grow(text, step).html.matchAll(/<(h\d)/g)].map(([, name]) => name);
  const text = (depths) => depths.map((depth) => `${"#".repeat(depth)} a *heading*\n\ntext\n\n`).join("");
  for (const step of [1, 3, 1000]) {
    assert.deepEqual(levels(text([1, 2, 3, 2]), step), ["h3", "h4", "h5", "h4"]);
    assert.deepEqual(levels(text([2, 3, 2]), step), ["h3", "h4", "h3"]);
    assert.deepEqual(levels(text([3, 1, 3]), step), ["h3", "h3", "h4"]);
    assert.deepEqual(levels(text([1, 2, 3, 4, 5, 6]), step), ["h3", "h4", "h5", "h6", "h6", "h6"]);
  }
});

test("what nests deeper than anyone writes is shown as it is, and the text goes on", () => {
  for (const nested of [">".repeat(5000), "> ".repeat(3000), "- ".repeat(3000) + "x", "*".repeat(9000)]) {
    const target = grow(`Before.\n\n${nested}\n\nAfter.\n\n**bold**`, 50);
    assert.match(target.html, /Before\./);
    assert.match(target.html, /After\./);
    assert.match(target.html, /<strong>bold<\/strong>/);
  }
});
