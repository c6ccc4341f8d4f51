// What a screen reader is told: whole sentences, in any script.

import assert from "node:assert/strict";
import { test } from "node:test";

import { Announcer } from "../../pyserve/web/announcer.js";

function announcer(t) {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const said = [];
  globalThis.document = { createElement: () => ({}) };
  t.after(() => delete globalThis.document);
  const region = { append: ({ textContent }) => said.push(textContent), childElementCount: 0 };
  return { announcer: new Announcer(region), said, pause: () => t.mock.timers.tick(1500) };
}

for (const [script, text, sentences, rest] of [
  ["Latin", "One. Is it 1.5? Tw", "One. Is it 1.5?", "Tw"],
  ["Chinese", "你好。今天好吗？我很", "你好。今天好吗？", "我很"],
  ["Japanese", "彼は「はい！」と言", "彼は「はい！」", "と言"],
  ["lines", "- a\n- b", "- a", "- b"],
])
  test(`${script}: sentences are said when they are whole, the rest at the end`, (t) => {
    const { announcer: it, said, pause } = announcer(t);
    for (const character of text) it.add(character);
    pause();
    assert.deepEqual(said, [sentences]);
    it.add("!");
    it.end();
    assert.deepEqual(said, [sentences, `${rest}!`]);
  });
