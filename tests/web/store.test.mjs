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
const { isId, isOverdue, lacks, liveOf, merge, settle, Store } = await import("../../pyserve/web/store.js");

const newStore = (onTrouble = () => {}) => new Store(() => {}, onTrouble);

beforeEach(() => {
  Object.defineProperty(globalThis, "localStorage", { value: new Storage(), configurable: true });
});

const question = { id: "q", role: "user", sentAt: 1, text: "?" };
const answer = (changes) => ({ id: "a", role: "assistant", attempt: 0, state: "streaming", offset: 0, text: "", ...changes });
const chat = (...messages) => ({ id: "x", title: "T", created: 1, updated: 1, messages });
const winner = (mine, theirs) => merge(chat(question, mine), chat(question, theirs)).messages[1];

test("the version of an answer that came further is kept", () => {
  const order = [
    answer({ state: "sent" }),
    answer({ state: "failed", reason: "unsure" }),
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
  const store = newStore();
  const mine = chat(question, answer({ offset: 10 }));
  store.save(mine, { isNew: true });
  store.save(chat(question, answer({ state: "completed", offset: 30 }), { id: "q2", role: "user", sentAt: 2, text: "!" }));
  store.save(mine);
  assert.deepEqual(store.load("x").messages.map(({ id }) => id), ["q", "a", "q2"]);
  assert.equal(store.load("x").messages[1].offset, 30);
});

test("how far an answer has come is stored without the history before it, and found with it", () => {
  const store = newStore();
  store.save(chat(question, answer({ offset: 10 })), { isNew: true });
  const whole = () => Object.entries(localStorage).find(([key]) => key.includes(":chat:"))[1];
  const before = whole();
  store.saveLive("x", answer({ offset: 20, text: "more" }));
  assert.equal(whole(), before);
  assert.deepEqual(newStore().load("x").messages.map(({ offset }) => offset), [undefined, 20]);
  store.save(chat(question, answer({ offset: 15 }))); // of a tab that is behind
  assert.equal(newStore().load("x").messages[1].text, "more");
  store.save(chat(question, answer({ state: "completed", offset: 30 })));
  assert.ok(!Object.keys(localStorage).some((key) => key.includes(":live:")));
  store.remove("x");
  store.saveLive("x", answer({ offset: 40 }));
  assert.equal(Object.keys(localStorage).length, 0);
});

test("a conversation that was deleted is not brought back by a tab that still follows it", () => {
  const store = newStore();
  const mine = chat(question, answer());
  store.save(mine, { isNew: true });
  store.remove("x");
  store.save(mine);
  assert.deepEqual(store.list(), []);
  assert.equal(store.load("x"), null);
});

test("the list shows the newest first, and what is being answered", () => {
  const store = newStore();
  store.save(chat(question, answer()), { isNew: true });
  store.save({ ...chat(question, answer({ state: "completed" })), id: "y", created: 2 }, { isNew: true });
  assert.deepEqual(store.list().map(({ id, live }) => [id, live]), [["y", false], ["x", true]]);
});

test("two tabs that ask at the same moment come to the same order, each answer with its question", () => {
  const turn = (name, sentAt) => [{ ...question, id: `q${name}`, sentAt }, answer({ id: `a${name}` })];
  for (const [sentAt, order] of [
    [7, ["q", "q1", "a1", "q2", "a2"]],
    [4, ["q", "q2", "a2", "q1", "a1"]],
    [5, ["q", "q1", "a1", "q2", "a2"]], // the same millisecond: by the id
  ]) {
    const one = chat(question, ...turn(1, 5));
    const other = chat(question, ...turn(2, sentAt));
    assert.deepEqual(merge(one, other).messages.map(({ id }) => id), order);
    assert.deepEqual(merge(other, one).messages.map(({ id }) => id), order);
  }
});

test("what another tab overwrote is noticed: a question, a retry, an ending; how far it has read is not", () => {
  const mine = (changes) => chat(question, answer(changes));
  assert.equal(lacks(chat(question), mine({})), true);
  assert.equal(lacks(mine({}), mine({ attempt: 1 })), true);
  assert.equal(lacks(mine({}), mine({ state: "completed" })), true);
  assert.equal(lacks(mine({ offset: 5 }), mine({ offset: 10 })), false);
  assert.equal(lacks(mine({ state: "completed" }), mine({})), false);
  assert.equal(lacks(mine({}), chat(question)), false);
});

test("a conversation is live while any of its answers is, and what is read comes before what was sent", () => {
  const [first, second] = [answer({ id: "a1" }), answer({ id: "a2", state: "sent" })];
  assert.equal(liveOf(chat(first, second)), first);
  first.state = "completed";
  assert.equal(liveOf(chat(first, second)), second);
  second.state = "failed";
  assert.equal(liveOf(chat(first, second)), undefined);
});

const sent = (ageMs) => answer({ state: "sent", key: "k", sentAt: Date.now() - ageMs });

test("a question nobody has an answer to is overdue after its key's life, and not before", () => {
  assert.equal(isOverdue(sent(50_000)), false);
  assert.equal(isOverdue(sent(61_000)), true);
  assert.equal(isOverdue({ ...sent(61_000), state: "streaming" }), false);
  assert.equal(isOverdue({ ...sent(61_000), key: null }), false);
});

test("what the server began since a question was sent is its answer; else nobody is sure", () => {
  const settled = (...streams) => {
    const message = sent(61_000);
    const all = streams.map(([secondsAfter, epoch, id = "x"]) => ({
      conversation_id: id,
      epoch,
      started_at: Math.floor(message.sentAt / 1000 + secondsAfter),
    }));
    settle(chat(question, answer({ id: "a0", state: "completed", epoch: "e0" }), message), message, all);
    return [message.state, message.reason, message.epoch];
  };
  assert.deepEqual(settled([0, "e1"]), ["streaming", undefined, "e1"]);
  assert.deepEqual(settled([30, "e1"]), ["streaming", undefined, "e1"]);
  for (const other of [[-2, "e1"], [5, "e0"], [5, "e1", "x::model"]])
    assert.deepEqual(settled(other), ["failed", "unsure", undefined]);
  assert.deepEqual(settled(), ["failed", "unsure", undefined]);
});

test("what the server would not take as an id is none", () => {
  for (const id of ["", ".", "..", "a\nb", "\u007f", "\u0085", "x".repeat(256), "日".repeat(86)]) assert.ok(!isId(id), id);
  for (const id of ["...", "a/b c::m", "x".repeat(255), "日".repeat(85)]) assert.ok(isId(id), id);
});

test("what a full storage does not take stays in this tab, is told, and is stored when there is room", () => {
  const told = [];
  const store = newStore((trouble) => told.push(trouble));
  store.save(chat(question), { isNew: true });
  localStorage.setItem("full", "yes");
  const asked = chat(question, answer({ offset: 10 }));
  store.save(asked);
  assert.deepEqual(store.load("x"), asked);
  assert.deepEqual(store.list().map(({ id, live }) => [id, live]), [["x", true]]);
  assert.equal(newStore().load("x").messages.length, 1); // another tab knows less
  localStorage.removeItem("full");
  store.settings = { plain: true };
  assert.deepEqual(newStore().load("x"), asked);
  assert.deepEqual([...new Set(told)], ["", "full"]);
  assert.equal(told.at(-1), "");
});

test("a storage that is denied is told at once, and all works without it", () => {
  Object.defineProperty(globalThis, "localStorage", {
    get: () => {
      throw new Error("SecurityError");
    },
    configurable: true,
  });
  const told = [];
  const store = newStore((trouble) => told.push(trouble));
  assert.deepEqual(told, ["denied"]);
  store.save(chat(question), { isNew: true });
  store.settings = { ...store.settings, plain: true };
  assert.deepEqual([store.load("x").messages, store.list().length, store.settings.plain], [[question], 1, true]);
  store.remove("x");
  assert.deepEqual([store.load("x"), store.list()], [null, []]);
  assert.equal(told.at(-1), "denied");
});
