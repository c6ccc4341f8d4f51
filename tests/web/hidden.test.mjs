// A tab that is hidden, shown, asleep, or gets its network back.

import assert from "node:assert/strict";
import { once } from "node:events";
import { test } from "node:test";

import { createClient } from "../../pyserve/web/pyserve.js";
import { END, event, head, recorder, refuse, scripted } from "./support.mjs";

/** A document and a window, as far as pyserve.js looks at them. */
function page(t) {
  const page = new EventTarget();
  page.visibilityState = "visible";
  globalThis.document = page;
  globalThis.addEventListener = page.addEventListener.bind(page);
  globalThis.removeEventListener = page.removeEventListener.bind(page);
  t.after(() => {
    delete globalThis.document;
    delete globalThis.addEventListener;
    delete globalThis.removeEventListener;
  });
  return {
    become: (state) => {
      page.visibilityState = state;
      page.dispatchEvent(new Event("visibilitychange"));
    },
    fire: (name) => page.dispatchEvent(new Event(name)),
  };
}

const open = (response) => {
  head(response);
  response.write(event(10));
};
const rest = (response) => {
  head(response, { offset: 10 });
  response.end(event(20) + END);
};

test("a hidden tab gives its connection back and goes on when it is shown", async (t) => {
  const tab = page(t);
  const closed = [];
  const server = await scripted(t, (response) => (open(response), response.on("close", () => closed.push(1))), rest);
  const seen = recorder();
  const handle = createClient({ base: server.url, hiddenMs: 20 }).attach("x", seen);
  await seen.until(() => seen.events.length === 1);
  tab.become("hidden");
  await seen.until(() => handle.state === "hidden");
  while (!closed.length) await new Promise((resolve) => setTimeout(resolve, 5));
  assert.equal(server.requests.length, 1);
  tab.become("visible");
  assert.equal((await handle.done).state, "completed");
  assert.deepEqual(seen.events.map((one) => one.offset), [10, 20]);
  assert.ok(!seen.names().includes("retrying"));
});

test("a tab that is hidden for a moment keeps its connection", async (t) => {
  const tab = page(t);
  const server = await scripted(t, (response) => (open(response), setTimeout(() => response.end(END), 150)));
  const seen = recorder();
  const handle = createClient({ base: server.url, hiddenMs: 50 }).attach("x", seen);
  await seen.until(() => seen.events.length === 1);
  tab.become("hidden");
  tab.become("visible");
  assert.equal((await handle.done).state, "completed");
  assert.equal(server.requests.length, 1);
});

test("a hidden tab gives way at once to a visible one that gets no connection", async (t) => {
  const tab = page(t);
  const server = await scripted(t, open, rest);
  const crowded = await scripted(t, (response) => setTimeout(() => response.writeHead(204).end(), 900));
  const seen = recorder();
  const handle = createClient({ base: server.url, hiddenMs: 1e6 }).attach("x", seen);
  await seen.until(() => seen.events.length === 1);
  // One document plays both tabs: visible when it asks, hidden when it is asked.
  const asking = createClient({ base: crowded.url }).stop("y");
  const heard = new BroadcastChannel("pyserve.js: give way");
  globalThis.setTimeout(() => heard.postMessage(""), 0);
  tab.become("hidden");
  await seen.until(() => handle.state === "hidden");
  tab.become("visible");
  await new Promise((resolve) => (heard.onmessage = resolve)); // what stop() asks by itself
  heard.close();
  assert.equal(await asking, true);
  assert.equal((await handle.done).state, "completed");
});

test("close() ends a handle that is detached", async (t) => {
  const tab = page(t);
  const server = await scripted(t, open);
  const seen = recorder();
  const handle = createClient({ base: server.url, hiddenMs: 0 }).attach("x", seen);
  tab.become("hidden");
  await seen.until(() => handle.state === "hidden");
  handle.close();
  assert.equal((await handle.done).state, "closed");
});

test("a POST without an answer is waited for, hidden or not", async (t) => {
  const tab = page(t);
  const server = await scripted(
    t,
    (response) => setTimeout(() => (head(response), response.end(event(10) + END)), 100),
  );
  const seen = recorder();
  const handle = createClient({ base: server.url, hiddenMs: 0 }).submit({}, seen);
  tab.become("hidden");
  await seen.until(() => seen.states.length > 1);
  tab.become("visible");
  assert.equal((await handle.done).state, "completed");
  assert.equal(server.requests[0].method, "POST");
});

for (const name of ["online", "pageshow", "visibilitychange"])
  test(`${name} ends a back-off at once`, async (t) => {
    const tab = page(t);
    const server = await scripted(t, (response) => refuse(response, 503, "shutdown"), rest);
    const seen = recorder();
    const handle = createClient({ base: server.url, minDelayMs: 1e6, maxDelayMs: 1e6 }).attach("x", seen);
    await seen.until(() => handle.state === "retrying");
    tab.fire(name);
    assert.equal((await handle.done).state, "completed");
  });

test("a hidden tab gives way when three others were hidden after it, and not before", async (t) => {
  const tab = page(t);
  const server = await scripted(t, open, rest);
  const seen = recorder();
  const handle = createClient({ base: server.url, hiddenMs: 1e6 }).attach("x", seen);
  await seen.until(() => seen.events.length === 1);
  const others = new BroadcastChannel("pyserve.js: give way");
  const heard = new Promise((resolve) => (others.onmessage = resolve));
  tab.become("hidden");
  const { data: key } = await heard;
  assert.ok(key);
  const delivered = new BroadcastChannel("pyserve.js: give way");
  for (const other of ["a", "b", "a", "b"]) {
    const arrived = new Promise((resolve) => (delivered.onmessage = resolve));
    others.postMessage(other);
    await arrived;
  }
  delivered.close();
  assert.equal(handle.state, "streaming");
  others.postMessage("c");
  await seen.until(() => handle.state === "hidden");
  others.close();
  tab.become("visible");
  assert.equal((await handle.done).state, "completed");
});

test("a tab hidden while its POST had no answer lets go as soon as it has one", async (t) => {
  const tab = page(t);
  let answer;
  let closed;
  const post = (response) => {
    closed = once(response, "close");
    answer = () => open(response);
  };
  const server = await scripted(t, post, (response) => {
    head(response);
    response.end(event(10) + event(20) + END);
  });
  const seen = recorder();
  const handle = createClient({ base: server.url, hiddenMs: 0 }).submit({}, seen);
  while (!answer) await new Promise((resolve) => setTimeout(resolve, 5));
  tab.become("hidden");
  await new Promise((resolve) => setTimeout(resolve, 20));
  assert.equal(handle.state, "connecting");
  answer();
  await seen.until(() => handle.state === "hidden");
  await closed;
  assert.equal(handle.epoch, "e1");
  tab.become("visible");
  assert.equal((await handle.done).state, "completed");
  assert.deepEqual(seen.events.map((one) => one.offset), [10, 20]);
  assert.deepEqual(server.requests.map(({ method }) => method), ["POST", "GET"]);
});
