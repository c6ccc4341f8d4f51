// Starting and stopping: one generation, whatever happens to its POST.

import assert from "node:assert/strict";
import { test } from "node:test";

import { createClient, PyserveError } from "../../pyserve/web/pyserve.js";
import { cut, END, event, head, recorder, refuse, scripted } from "./support.mjs";

const FAST = { minDelayMs: 4, maxDelayMs: 20 };
const client = (server, options) => createClient({ base: server.url, ...FAST, ...options });
const finish = (response) => {
  head(response);
  response.end(event(10) + END);
};

test("the POST's own answer is the first reader", async (t) => {
  const server = await scripted(t, finish);
  const seen = recorder();
  const handle = client(server).submit({ messages: [] }, { conversationId: "日本/1::m", conflict: "reject", ...seen });
  assert.equal((await handle.done).state, "completed");
  const [{ method, path, query, headers, body }] = server.requests;
  assert.deepEqual([method, path], ["POST", "/v1/chat/completions"]);
  assert.deepEqual(query, { conv_id: "日本/1::m" });
  assert.equal(headers["x-stream-conflict"], "reject");
  assert.match(headers["idempotency-key"], /^[0-9a-f-]{36}$/);
  assert.deepEqual(JSON.parse(body), { messages: [], stream: true });
  assert.equal(seen.events.length, 1);
});

test("ids are made where none is given, a new one each time", async (t) => {
  const server = await scripted(t, finish);
  const handles = [client(server).submit({}), client(server).submit({})];
  await Promise.all(handles.map((handle) => handle.done));
  const ids = handles.map((handle) => handle.conversationId);
  assert.equal(new Set(ids).size, 2);
  assert.match(ids[0], /^[0-9a-f-]{36}$/);
});

test("a POST without an answer is sent again with the same key and body", async (t) => {
  const server = await scripted(t, cut, cut, finish);
  const seen = recorder();
  assert.equal((await client(server).submit({ n: 1 }, seen).done).state, "completed");
  assert.equal(server.requests.length, 3);
  assert.equal(new Set(server.requests.map(({ headers }) => headers["idempotency-key"])).size, 1);
  assert.equal(new Set(server.requests.map(({ body, query }) => body + query.conv_id)).size, 1);
});

test("a POST whose head does not come in time is sent again", async (t) => {
  const server = await scripted(t, () => {}, finish);
  assert.equal((await client(server, { answerMs: 50, heartbeatMs: 40 }).submit({}).done).state, "completed");
  assert.equal(server.requests.length, 2);
});

test("a POST whose body breaks is followed by GET, not repeated", async (t) => {
  const server = await scripted(
    t,
    (response) => {
      head(response);
      response.write(event(10), () => cut(response));
    },
    (response) => {
      head(response, { offset: 10 });
      response.end(event(20) + END);
    },
  );
  const seen = recorder();
  assert.equal((await client(server).submit({}, seen).done).state, "completed");
  assert.deepEqual(server.requests.map(({ method }) => method), ["POST", "GET"]);
  assert.equal(server.requests[1].query.from, "e1-10");
  assert.deepEqual(seen.events.map((one) => one.offset), [10, 20]);
});

test("a body that breaks before its first event is followed from the start of that session", async (t) => {
  const server = await scripted(
    t,
    (response) => {
      head(response);
      setTimeout(cut, 20, response);
    },
    finish,
  );
  assert.equal((await client(server).submit({}).done).state, "completed");
  assert.equal(server.requests[1].query.from, "e1-0");
});

test("a POST's error is an ending: its status, reason, message and figures are there", async (t) => {
  const server = await scripted(t, (response) =>
    refuse(response, 502, "upstream_unreachable", { n_ctx: 7 }, { "Retry-After": "0" }),
  );
  const { state, reason, error } = await client(server).submit({}).done;
  assert.deepEqual([state, reason], ["failed", "upstream_unreachable"]);
  assert.ok(error instanceof PyserveError);
  assert.deepEqual([error.status, error.message, error.retryAfter], [502, "it is upstream_unreachable", null]);
  assert.equal(error.details.n_ctx, 7);
  assert.equal(server.requests.length, 1);
});

test("a POST that gets a proxy's page, or no event stream, has failed", async (t) => {
  const server = await scripted(
    t,
    (response) => response.writeHead(502).end("<html>"),
    (response) => response.writeHead(200, { "Content-Type": "application/json" }).end("{}"),
  );
  assert.equal((await client(server).submit({}).done).reason, "http_502");
  assert.equal((await client(server).submit({}).done).reason, "not_event_stream");
});

test("a POST to an address that is not there has failed; it is not gone", async (t) => {
  const server = await scripted(t, (response) => refuse(response, 404, "not_found"));
  assert.equal((await client(server).submit({}).done).state, "failed");
});

test("a repeated key whose log lost its start is told as a gap", async (t) => {
  const server = await scripted(t, (response) => {
    head(response, { offset: 40 });
    response.end(event(50) + END);
  });
  const seen = recorder();
  await client(server).submit({}, { idempotencyKey: "k", ...seen }).done;
  assert.deepEqual(seen.states[1], { state: "gap", lostFrom: 0, firstOffset: 40 });
});

test("stop names the session, and says false when another one is there", async (t) => {
  const server = await scripted(
    t,
    (response) => response.writeHead(204).end(),
    (response) => refuse(response, 412, "epoch_mismatch"),
    (response) => refuse(response, 401, "unauthorized"),
  );
  assert.equal(await client(server).stop("x/é", { epoch: "e1", keep: true }), true);
  assert.deepEqual(server.requests[0].query, { conv_id: "x/é", keep: "true" });
  assert.equal(server.requests[0].headers["if-match"], '"e1"');
  assert.equal(await client(server).stop("x", { epoch: "e1" }), false);
  await assert.rejects(client(server).stop("x"), { status: 401, reason: "unauthorized" });
});

test("stop() while the POST has no answer stops what that POST starts", async (t) => {
  let answerPost;
  const ended = [];
  const server = await scripted(t, (response, { method, headers }) => {
    if (method === "POST") answerPost = () => head(response, { epoch: "e7" });
    else {
      response.writeHead(204).end();
      ended.push(headers["if-match"]);
      if (ended.length === 1) answerPost();
    }
    if (ended.length === 2) server.finish();
  });
  const seen = recorder();
  const handle = client(server).submit({}, seen);
  server.finish = () => handle.close();
  await seen.until(() => seen.states.length > 0);
  while (!answerPost) await new Promise((resolve) => setTimeout(resolve, 5));
  await handle.stop();
  await handle.done;
  assert.deepEqual(ended, [undefined, '"e7"']);
});

test("stop() while the POST is lost never starts it again", async (t) => {
  const server = await scripted(t, cut, (response) => response.writeHead(204).end());
  const seen = recorder();
  const handle = client(server, { minDelayMs: 60_000, maxDelayMs: 60_000 }).submit({}, seen);
  await seen.until(() => handle.state === "retrying");
  await handle.stop();
  assert.equal((await handle.done).state, "cancelled");
  assert.equal(server.requests.filter(({ method }) => method === "POST").length, 1);
});

test("stop() while a refused POST waits for its time never starts it", async (t) => {
  const server = await scripted(
    t,
    (response) => refuse(response, 503, "model_loading", {}, { "Retry-After": "50" }),
    (response) => response.writeHead(204).end(),
  );
  const seen = recorder();
  const handle = client(server).submit({}, seen);
  await seen.until(() => handle.state === "retrying");
  assert.deepEqual([handle.status.delayMs, handle.status.why], [50_000, "model_loading"]);
  await handle.stop();
  assert.equal((await handle.done).state, "cancelled");
  assert.equal(server.requests.filter(({ method }) => method === "POST").length, 1);
});

test("stop() and lookup() that get no answer end by themselves", async (t) => {
  const server = await scripted(t, () => {});
  const hasty = client(server, { answerMs: 30 });
  await assert.rejects(hasty.stop("x"), { name: "TimeoutError" });
  await assert.rejects(hasty.lookup(["x"]), { name: "TimeoutError" });
});

test("an authorize that throws ends what it was asked for, and nothing is sent", async (t) => {
  const server = await scripted(t, finish);
  const broken = client(server, {
    authorize: () => {
      throw new Error("no token");
    },
  });
  for (const handle of [broken.attach("x"), broken.submit({})]) {
    const { state, reason, error } = await handle.done;
    assert.deepEqual([state, reason, error.message, error.cause.message], ["failed", "authorize", "no token", "no token"]);
  }
  await assert.rejects(broken.stop("x"), { reason: "authorize" });
  assert.equal(server.requests.length, 0);
});

test("an authorize that finds no network is asked again", async (t) => {
  const server = await scripted(t, finish);
  let calls = 0;
  const authorize = () => {
    if (++calls === 1) throw new TypeError("Failed to fetch");
  };
  const seen = recorder();
  const handle = client(server, { authorize }).attach("x", seen);
  assert.equal((await handle.done).state, "completed");
  assert.equal(seen.states.find(({ state }) => state === "retrying").why, "connection_lost");
});

test("an authorize that never answers is waited for no longer than a server", async (t) => {
  const server = await scripted(t, finish);
  let calls = 0;
  const authorize = () => (++calls === 1 ? new Promise(() => {}) : undefined);
  const seen = recorder();
  const handle = client(server, { authorize, heartbeatMs: 20 }).attach("x", seen);
  assert.equal((await handle.done).state, "completed");
  assert.equal(seen.states.find(({ state }) => state === "retrying").why, "stall");
});
