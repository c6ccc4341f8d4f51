// pyserve.js against a real pyserve, whose upstream writes what the test says.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

import { attach, createClient, lookup, streamUrl } from "../../pyserve/web/pyserve.js";
import { pyserve, recorder, upstream } from "./support.mjs";

async function served(t, ...options) {
  const model = await upstream(t);
  const server = await pyserve(t, model.url, ...options);
  return { model, server, client: closing(t, createClient({ base: server.url, minDelayMs: 10, maxDelayMs: 100 })) };
}

/** `client`, whose streams are left when the test is over: they would try to get back for ever. */
function closing(t, client) {
  const over = new AbortController();
  t.after(() => over.abort());
  return {
    ...client,
    submit: (request, options) => client.submit(request, { signal: over.signal, ...options }),
    attach: (id, options) => client.attach(id, { signal: over.signal, ...options }),
  };
}

const text = (seen) => seen.data().filter((data) => data !== "[DONE]").join("");

test("started, left, taken up by its last event, and read again whole", async (t) => {
  const { model, client } = await served(t);
  const first = recorder();
  const started = client.submit({ messages: [] }, { conversationId: "日本/a b::m.gguf", ...first });
  const generation = await model.next();
  for (let i = 0; i < 50; i++) generation.write(`${i},`);
  await first.until(() => first.events.length === 50);
  const { lastEventId } = started;
  started.close();
  for (let i = 50; i < 99; i++) generation.write(`${i},`);
  const second = recorder();
  const resumed = client.attach("日本/a b::m.gguf", { from: lastEventId, ...second });
  await second.until(() => second.events.length > 0);
  generation.write("99");
  generation.end();
  assert.deepEqual(await resumed.done, { state: "completed", reason: null });
  const whole = recorder();
  await client.attach("日本/a b::m.gguf", whole).done;
  assert.equal(text(first) + text(second), text(whole));
  assert.equal(text(whole), [...Array(100).keys()].join(","));
});

test("a second reader follows, and Stop by one ends both and the upstream", async (t) => {
  const { model, client } = await served(t);
  const [one, two] = [recorder(), recorder()];
  const mine = client.submit({}, { conversationId: "x", ...one });
  const generation = await model.next();
  generation.write("a");
  await one.until(() => one.events.length === 1);
  const theirs = client.attach("x", two);
  await two.until(() => two.events.length === 1);
  await theirs.stop({ keep: true });
  assert.equal((await mine.done).state, "cancelled");
  assert.equal((await theirs.done).state, "cancelled");
  await generation.closed;
  assert.equal((await client.attach("x").done).state, "cancelled");
  await client.stop("x");
  assert.equal((await client.attach("x").done).state, "gone");
});

test("a repeated key attaches: one generation", async (t) => {
  const { model, client } = await served(t);
  const [one, two] = [recorder(), recorder()];
  const options = { conversationId: "x", idempotencyKey: "k" };
  const mine = client.submit({ n: 1 }, { ...options, ...one });
  const generation = await model.next();
  generation.write("a");
  await one.until(() => one.events.length === 1);
  const again = client.submit({ n: 1 }, { ...options, ...two });
  await two.until(() => two.events.length === 1);
  generation.end();
  await Promise.all([mine.done, again.done]);
  assert.equal(model.requests.length, 1);
  assert.deepEqual(two.data(), one.data());
});

test("a newer generation is told to who followed the older one", async (t) => {
  const { model, client } = await served(t);
  const seen = recorder();
  const old = client.submit({}, { conversationId: "x", ...seen });
  (await model.next()).write("a");
  await seen.until(() => seen.events.length === 1);
  const newer = client.submit({ n: 2 }, { conversationId: "x" });
  (await model.next()).end();
  assert.equal((await old.done).state, "cancelled");
  assert.equal((await newer.done).state, "completed");
  const ending = await client.attach("x", { from: old.lastEventId }).done;
  assert.deepEqual([ending.state, ending.epoch], ["replaced", newer.epoch]);
});

test("a dropped prefix is a gap of just the bytes that are lost", async (t) => {
  const { model, client } = await served(t, "--max-session-bytes", "4KiB");
  const seen = recorder();
  const handle = client.submit({}, { conversationId: "x", ...seen });
  const generation = await model.next();
  generation.write("first");
  await seen.until(() => seen.events.length === 1);
  const { lastEventId, offset } = handle;
  for (let i = 0; i < 100; i++) generation.write("x".repeat(100));
  generation.end();
  await handle.done;
  const late = recorder();
  assert.equal((await client.attach("x", { from: lastEventId, ...late }).done).state, "completed");
  const gap = late.states.find(({ state }) => state === "gap");
  assert.equal(gap.lostFrom, offset);
  const next = seen.events.find((event) => event.offset > gap.firstOffset);
  assert.equal(late.events[0].offset, next.offset);
  assert.equal(late.data().at(-1), "[DONE]");
});

test("a restarted server has nothing left: gone", async (t) => {
  const { model, server, client } = await served(t);
  const seen = recorder();
  const handle = client.submit({}, { conversationId: "x", ...seen });
  (await model.next()).write("a");
  await seen.until(() => seen.events.length === 1);
  await server.restart();
  assert.equal((await handle.done).state, "gone");
  assert.ok(seen.names().includes("retrying"));
});

test("lookup finds what runs, models of the same conversation included", async (t) => {
  const { model, client } = await served(t);
  const seen = recorder();
  client.submit({}, { conversationId: "a::m", ...seen });
  (await model.next()).write("a");
  await seen.until(() => seen.events.length === 1);
  const [found, ...others] = await client.lookup(["a", "b"]);
  assert.deepEqual(others, []);
  assert.deepEqual([found.conversation_id, found.is_done, found.state], ["a::m", false, "streaming"]);
  await client.stop("a::m");
});

test("the error an upstream gives has words and a status", async (t) => {
  const { client } = await served(t);
  const refused = createClient({ base: client.streamUrl("x").origin });
  const { state, error } = await refused.submit({}, { path: "/v1/no-such-route" }).done;
  assert.deepEqual([state, error.status, error.reason], ["failed", 404, "not_found"]);
});

test("without a page the ready-made functions say what is missing; nothing is tried for ever", () => {
  for (const use of [() => attach("x"), () => lookup(["x"]), () => streamUrl("x")])
    assert.throws(use, /give createClient a base/);
});

test("a bundle that does not know where it came from asks where its page is", async (t) => {
  const code = await readFile(new URL("../../pyserve/web/pyserve.js", import.meta.url), "utf8");
  const bundled = code.replaceAll("import.meta", "({})");
  globalThis.document = Object.assign(new EventTarget(), { baseURI: "https://example.org/some/page.html" });
  t.after(() => delete globalThis.document);
  const own = await import(`data:text/javascript,${encodeURIComponent(bundled)}`);
  assert.equal(own.streamUrl("x").href, "https://example.org/some/v1/stream?conv_id=x");
});
