// Which answers end a stream and which are waited out: tests/client_rules.json, row by row. The
// Python client is held to the same table.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { createClient } from "../../pyserve/web/pyserve.js";
import { cut, END, event, head, recorder, scripted } from "./support.mjs";

const rules = JSON.parse(readFileSync(new URL("../client_rules.json", import.meta.url)));

/** The row's answer: pyserve's JSON error, or what a proxy would say. */
function answer(response, { status, reason, content_type: type, retry_after: retryAfter }) {
  const headers = { "Content-Type": reason ? "application/json" : (type ?? "text/plain") };
  if (retryAfter) headers["Retry-After"] = retryAfter;
  response.writeHead(status, headers);
  response.end(reason ? JSON.stringify({ error: { code: status, message: "no", reason } }) : "<p>no");
}

function begin(response) {
  head(response);
  response.write(event(10), () => cut(response));
}

function finish(response) {
  head(response);
  response.end(event(10) + event(20) + END);
}

for (const rule of rules)
  test(rule.name, async (t) => {
    const before = rule.when === "reattach" ? [begin] : [];
    const server = await scripted(t, ...before, (response) => answer(response, rule), finish);
    const client = createClient({ base: server.url, minDelayMs: 4, maxDelayMs: 20 });
    const seen = recorder();
    const handle = rule.when === "submit" ? client.submit({}, seen) : client.attach("x", seen);
    const { state, error } = await handle.done;
    const asked = before.length + 1;
    if (rule.then === "end") {
      assert.deepEqual([state, server.requests.length], [rule.js, asked]);
      assert.equal(error.status, rule.status);
      return;
    }
    assert.deepEqual([state, server.requests.length], ["completed", asked + 1]);
    const waits = seen.states.filter((status) => status.state === "retrying");
    const foreign = rule.status === 200 ? "not_event_stream" : `http_${rule.status}`;
    assert.equal(waits.at(-1).why, rule.reason ?? foreign);
    assert.deepEqual(seen.events.map(({ offset }) => offset), [10, 20]);
    const keys = server.requests.map(({ headers }) => headers["idempotency-key"]);
    assert.equal(new Set(keys).size, 1); // of a POST the one, of GETs none
  });
