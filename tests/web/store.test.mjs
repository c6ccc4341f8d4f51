// Two tabs, one storage: whoever writes last takes nothing away.

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

// Keys as own properties, methods on the prototype: as a browser's Storage has them.
class Storage {
  getItem(key) {
    return Object.hasOwn(this, key) ? this[key] : null;
  }
  setItem(key, value) {
    if (this.getItem("full")) throw new Error("QuotaExceededError");
    this[key] = String(value);
  }
  removeItem(key) {
    delete this[key];
  }
}
globalThis.addEventListener = () => {};
const { merge, Store } = await import("../../pyserve/web/store.js");

beforeEach(() => {
  globalThis.localStorage = new Storage();
});

const question = { id: "q", role: "user", text: "?" };
const answer = (changes) => ({ id: "a", role: "assistant", attempt: 0, state: "streaming", offset: 0, text: "", ...changes });
const chat = (...messages) => ({ id: "x", title: "T", created: 1, updated: 1, messages });
const winner = (mine, theirs) => merge(chat(question, mine), chat(question, theirs)).messages[1];

test("the version of an answer that came further is kept", () => {
  const order = [
    answer({ state: "sent" }),
    answer({ offset: 10 }),
    answer({ offset: 20 }),
    answer({ state: "cancelled", offset: 15 }),
    answer({ attempt: 1, state: "sent" }),
    answer({ attempt: 1, state: "failed" }),
  ];
  for (let i = 1; i < order.length; i++) {
    assert.equal(winner(order[i - 1], order[i]), order[i], `${i}`);
    assert.equal(winner(order[i], order[i - 1]), order[i], `${i}`);
  }
});

test("of two that came equally far, this tab's object stays", () => {
  const mine = answer({ offset: 10 });
  assert.equal(winner(mine, answer({ offset: 10 })), mine);
});

test("saving keeps what another tab has asked meanwhile", () => {
  const store = new Store(() => {});
  const mine = chat(question, answer({ offset: 10 }));
  store.save(mine, { isNew: true });
  store.save(chat(question, answer({ state: "completed", offset: 30 }), { id: "q2", role: "user", text: "!" }));
  store.save(mine);
  assert.deepEqual(store.load("x").messages.map(({ id }) => id), ["q", "a", "q2"]);
  assert.equal(store.load("x").messages[1].offset, 30);
});

test("a conversation that was deleted is not brought back by a tab that still follows it", () => {
  const store = new Store(() => {});
  const mine = chat(question, answer());
  store.save(mine, { isNew: true });
  store.remove("x");
  store.save(mine);
  assert.deepEqual(store.list(), []);
  assert.equal(store.load("x"), null);
});

test("the list shows the newest first, and what is being answered", () => {
  const store = new Store(() => {});
  store.save(chat(question, answer()), { isNew: true });
  store.save({ ...chat(question, answer({ state: "completed" })), id: "y", created: 2 }, { isNew: true });
  assert.deepEqual(store.list().map(({ id, live }) => [id, live]), [["y", false], ["x", true]]);
});

test("a full storage is told, and breaks nothing", () => {
  const store = new Store(() => {});
  localStorage.setItem("full", "yes");
  assert.equal(store.save(chat(question), { isNew: true }), false);
});
