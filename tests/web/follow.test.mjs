// What a handle does when the connection, or the server's answer, is not what one hopes for.

import assert from "node:assert/strict";
import { test } from "node:test";

import { createClient } from "../../pyserve/web/pyserve.js";
import { cut, END, event, head, recorder, refuse, scripted } from "./support.mjs";

const FAST = { minDelayMs: 4, maxDelayMs: 20 };
const client = (server, options) => createClient({ base: server.url, ...FAST, ...options });

test("a whole stream: every event, its place, and the end", async (t) => {
  const server = await scripted(t, (response) => {
    head(response);
    response.end(event(10) + ": ping\n" + event(25) + END);
  });
  const seen = recorder();
  const handle = client(server).attach("a/b c::é日本", seen);
  assert.deepEqual(await handle.done, { state: "completed", reason: null });
  assert.deepEqual(seen.names(), ["connecting", "streaming", "completed"]);
  assert.deepEqual(seen.events[1], { id: "e1-25", type: "message", data: '{"n":25}', epoch: "e1", offset: 25 });
  assert.equal(handle.lastEventId, "e1-25");
  assert.deepEqual(server.requests[0].query, { conv_id: "a/b c::é日本", from: "0" });
});

for (const [name, breaking] of [
  ["is reset", cut],
  ["ends cleanly without the stream's last line", (response) => response.end()],
  ["ends cleanly after half an event", (response) => response.end("data: half")],
])
  test(`a body that ${name} is a loss: it goes on behind the last event`, async (t) => {
    const server = await scripted(
      t,
      (response) => {
        head(response);
        response.write(event(10) + event(20), () => setTimeout(breaking, 20, response));
      },
      (response) => {
        head(response, { offset: 20 });
        response.end(event(30) + END);
      },
    );
    const seen = recorder();
    const { state } = await client(server).attach("x", seen).done;
    assert.equal(state, "completed");
    assert.deepEqual(seen.events.map((one) => one.offset), [10, 20, 30]);
    assert.equal(server.requests[1].query.from, "e1-20");
    const names = ["connecting", "streaming", "retrying", "connecting", "reattached", "streaming", "completed"];
    assert.deepEqual(seen.names(), names);
    assert.equal(seen.states[4].offset, 20);
  });

test("an event that is sent again is not given out again", async (t) => {
  const server = await scripted(
    t,
    (response) => {
      head(response);
      response.end(event(10) + event(20));
    },
    (response) => {
      head(response);
      response.end(event(10) + event(20) + event(30) + END);
    },
  );
  const seen = recorder();
  await client(server).attach("x", seen).done;
  assert.deepEqual(seen.events.map((one) => one.offset), [10, 20, 30]);
});

test("silence is a stall: the connection is given up and made anew", async (t) => {
  const server = await scripted(
    t,
    (response) => {
      head(response);
      response.write(event(10));
    },
    (response) => {
      head(response, { offset: 10 });
      response.end(END);
    },
  );
  const seen = recorder();
  const { state } = await client(server, { heartbeatMs: 20 }).attach("x", seen).done;
  assert.equal(state, "completed");
  assert.equal(seen.states.find((status) => status.state === "retrying").why, "stall");
});

test("heartbeats keep a silent stream alive", async (t) => {
  const server = await scripted(t, (response) => {
    head(response);
    let beats = 0;
    const beating = setInterval(() => {
      response.write(": ping\n");
      if (++beats < 30) return;
      clearInterval(beating);
      response.end(event(10) + END);
    }, 40);
  });
  const seen = recorder();
  await client(server, { heartbeatMs: 200 }).attach("x", seen).done;
  assert.deepEqual(seen.names(), ["connecting", "streaming", "completed"]);
});

for (const [reason, line] of [
  [null, ": end cancelled\n"],
  ["upstream_lost", ": end failed upstream_lost\n"],
])
  test(`the log's last line is taken at its word: ${line.trim()}`, async (t) => {
    const server = await scripted(t, (response) => {
      head(response);
      response.end(event(10) + line);
    });
    const ending = await client(server).attach("x").done;
    assert.deepEqual(ending, { state: line.split(" ")[2].trim(), reason });
  });

test("a 404 is gone, and says so once", async (t) => {
  const server = await scripted(t, (response) => refuse(response, 404, "stream_not_found"));
  const seen = recorder();
  const { state, error } = await client(server).attach("x", seen).done;
  assert.equal(state, "gone");
  assert.equal(error.message, "it is stream_not_found");
  assert.equal(server.requests.length, 1);
  assert.deepEqual(seen.names(), ["connecting", "gone"]);
});

test("a 409 is replaced, with the new epoch", async (t) => {
  const server = await scripted(t, (response) => refuse(response, 409, "stream_replaced", { epoch: "e2" }));
  const ending = await client(server).attach("x", { from: "e1-10" }).done;
  assert.equal(ending.state, "replaced");
  assert.equal(ending.epoch, "e2");
});

test("another stream's epoch in a good answer is replaced too", async (t) => {
  const server = await scripted(
    t,
    (response) => refuse(response, 400, "offset_lost", { first_offset: 50, epoch: "e1" }),
    (response) => {
      head(response, { epoch: "e2", offset: 0 });
      response.end(event(10) + END);
    },
  );
  const seen = recorder();
  const ending = await client(server).attach("x", { from: "e1-10", ...seen }).done;
  assert.deepEqual(ending, { state: "replaced", reason: "stream_replaced", epoch: "e2" });
  assert.deepEqual(seen.events, []);
});

test("a lost prefix is told as a gap, then it goes on at the oldest byte", async (t) => {
  const server = await scripted(
    t,
    (response) => refuse(response, 400, "offset_lost", { first_offset: 50, epoch: "e1" }),
    (response) => {
      head(response, { offset: 60 }); // 10 more were dropped meanwhile
      response.end(event(70) + END);
    },
  );
  const seen = recorder();
  const { state } = await client(server).attach("x", { from: "e1-10", ...seen }).done;
  assert.equal(state, "completed");
  assert.deepEqual(server.requests.map(({ query }) => query.from), ["e1-10", "earliest"]);
  const gap = seen.states.find((status) => status.state === "gap");
  assert.deepEqual(gap, { state: "gap", lostFrom: 10, firstOffset: 60 });
});

test("who asks for the earliest byte is told of no gap", async (t) => {
  const server = await scripted(t, (response) => {
    head(response, { offset: 60 });
    response.end(event(70) + END);
  });
  const seen = recorder();
  await client(server).attach("x", { from: "earliest", ...seen }).done;
  assert.deepEqual(seen.names(), ["connecting", "reattached", "streaming", "completed"]);
});

test("errors that pass are waited out, with Retry-After, and others end it", async (t) => {
  const server = await scripted(
    t,
    (response) => refuse(response, 503, "memory_budget", {}, { "Retry-After": "0" }),
    (response) => response.writeHead(502).end("<html>Bad gateway</html>"),
    (response) => refuse(response, 401, "unauthorized"),
  );
  const seen = recorder();
  const { state, reason, error } = await client(server).attach("x", seen).done;
  assert.deepEqual([state, reason, error.status], ["failed", "unauthorized", 401]);
  const retries = seen.states.filter((status) => status.state === "retrying");
  assert.deepEqual(retries.map(({ why }) => why), ["memory_budget", "http_502"]);
});

test("delays double up to their bound and begin anew after an event", async (t) => {
  const failing = (response) => cut(response);
  const server = await scripted(
    t,
    failing,
    failing,
    failing,
    failing,
    (response) => {
      head(response);
      response.write(event(10), () => cut(response));
    },
    (response) => refuse(response, 404, "stream_not_found"),
  );
  const seen = recorder();
  await createClient({ base: server.url, minDelayMs: 8, maxDelayMs: 32 }).attach("x", seen).done;
  const delays = seen.states.filter(({ state }) => state === "retrying").map(({ delayMs }) => delayMs);
  [8, 16, 32, 32, 8].forEach((ceiling, i) => assert.ok(delays[i] >= ceiling / 2 && delays[i] <= ceiling, `${delays}`));
});

test("a 204 is an ending without events: the lookup says which", async (t) => {
  const server = await scripted(
    t,
    (response) => response.writeHead(204).end(),
    (response) =>
      response.end(
        JSON.stringify([
          { conversation_id: "x::model", is_done: true, state: "completed", reason: null },
          { conversation_id: "x", is_done: true, state: "cancelled", reason: "cancelled" },
        ]),
      ),
  );
  assert.deepEqual(await client(server).attach("x").done, { state: "cancelled", reason: "cancelled" });
  assert.deepEqual(JSON.parse(server.requests[1].body), { conversation_ids: ["x"] });
});

test("close() and an AbortSignal end the following, not the stream", async (t) => {
  const server = await scripted(t, (response) => head(response));
  const controller = new AbortController();
  const [one, other] = [recorder(), recorder()];
  const closed = client(server).attach("x", one);
  const aborted = client(server).attach("x", { ...other, signal: controller.signal });
  await one.until(() => closed.state === "streaming");
  await other.until(() => aborted.state === "streaming");
  closed.close();
  controller.abort();
  assert.equal((await closed.done).state, "closed");
  assert.equal((await aborted.done).state, "closed");
  assert.ok(server.requests.every(({ method }) => method === "GET"));
  assert.equal((await client(server).attach("x", { signal: AbortSignal.abort() }).done).state, "closed");
});

test("close() ends a back-off at once", async () => {
  const seen = recorder();
  const handle = createClient({ base: "http://127.0.0.1:1/", minDelayMs: 1e6, maxDelayMs: 1e6 }).attach("x", seen);
  await seen.until(() => handle.state === "retrying");
  handle.close();
  assert.equal((await handle.done).state, "closed");
});

test("authorize is asked for each connection and may change the URL and the headers", async (t) => {
  const server = await scripted(
    t,
    (response) => cut(response),
    (response) => {
      head(response);
      response.end(END);
    },
    (response) => response.writeHead(204).end(),
  );
  let calls = 0;
  const authorized = client(server, {
    authorize: async ({ url, headers, method }) => {
      headers.set("Authorization", `Bearer ${method}`);
      url.searchParams.set("token", String(++calls));
    },
  });
  await authorized.attach("x").done;
  await authorized.stop("x");
  assert.deepEqual(server.requests.map(({ query }) => query.token), ["1", "2", "3"]);
  assert.equal(server.requests[2].headers.authorization, "Bearer DELETE");
});

test("a listener that throws is reported and does not end the stream", async (t) => {
  const server = await scripted(t, (response) => {
    head(response);
    response.end(event(10) + event(20) + END);
  });
  const reported = new Promise((resolve) => (globalThis.reportError = resolve)); // as browsers have it
  t.after(() => delete globalThis.reportError);
  let seen = 0;
  const onEvent = () => {
    if (++seen === 1) throw new Error("mine");
  };
  const { state } = await client(server).attach("x", { onEvent }).done;
  assert.deepEqual([state, seen, (await reported).message], ["completed", 2, "mine"]);
});

test("a head that is slow is waited for longer and longer, until it comes", async (t) => {
  const server = await scripted(t, (response) => {
    const answering = setTimeout(() => {
      head(response);
      response.end(event(10) + END);
    }, 200);
    response.on("close", () => clearTimeout(answering));
  });
  const seen = recorder();
  const slow = createClient({ base: server.url, heartbeatMs: 20, minDelayMs: 1, maxDelayMs: 1000 });
  const { state } = await slow.attach("x", seen).done;
  assert.equal(state, "completed");
  // 70 ms four times, then 140, then 280.
  const waits = seen.states.filter((status) => status.state === "retrying");
  assert.deepEqual(waits.map(({ attempt, why }) => `${why} ${attempt}`), [1, 2, 3, 4, 5].map((n) => `stall ${n}`));
});

test("a connection that held for long is a good one, though no event came", async (t) => {
  const holdFor = (ms) => (response) => {
    head(response);
    const beating = setInterval(() => response.write(": ping\n"), 10);
    setTimeout(cut, ms, response);
    response.on("close", () => clearInterval(beating));
  };
  const server = await scripted(t, cut, cut, holdFor(10), holdFor(300), (response) => {
    head(response);
    response.end(event(10) + END);
  });
  const seen = recorder();
  await createClient({ base: server.url, heartbeatMs: 40, minDelayMs: 1 }).attach("x", seen).done;
  const waits = seen.states.filter((status) => status.state === "retrying");
  assert.deepEqual(waits.map(({ attempt }) => attempt), [1, 2, 3, 1]);
});

test("what looks like the end in the middle of an event is none", async (t) => {
  const server = await scripted(
    t,
    (response) => {
      head(response);
      response.end(event(10) + "data: half\n" + END);
    },
    (response) => {
      head(response, { offset: 10 });
      response.end(event(20) + END);
    },
  );
  const seen = recorder();
  assert.equal((await client(server).attach("x", seen).done).state, "completed");
  assert.deepEqual(seen.events.map(({ offset }) => offset), [10, 20]);
});
