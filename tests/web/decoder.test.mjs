// Bytes into events, cut anywhere.

import assert from "node:assert/strict";
import { test } from "node:test";

import { EventStreamDecoder } from "../../pyserve/web/pyserve.js";

const bytes = (text) => new TextEncoder().encode(text);

function decode(...parts) {
  const decoder = new EventStreamDecoder();
  const events = parts.flatMap((part) => decoder.decode(part));
  return { events, lastComment: decoder.lastComment };
}

const LOG = [
  ": ping\n",
  'retry: 1000\ndata: {"text":"日本 é 🦙"}\nid: e1-40\n\n',
  "event: error\r\ndata: one\r\ndata:two\r\nid: e1-60\r\n\r\n",
  "data\rid: e1-70\r\r",
  ": ping\n: another\n\n",
  "no-such-field: x\ndata:  two spaces\n\n",
  ": end completed\n",
].join("");

const EVENTS = [
  { id: "e1-40", type: "message", data: '{"text":"日本 é 🦙"}' },
  { id: "e1-60", type: "error", data: "one\ntwo" },
  { id: "e1-70", type: "message", data: "" },
  { id: "e1-70", type: "message", data: " two spaces" },
];

test("every split in two gives the same events", () => {
  const whole = bytes(LOG);
  for (let cut = 0; cut <= whole.length; cut++)
    assert.deepEqual(decode(whole.subarray(0, cut), whole.subarray(cut)), {
      events: EVENTS,
      lastComment: "end completed",
    });
});

test("byte by byte gives the same events", () => {
  const parts = [...bytes(LOG)].map((byte) => Uint8Array.of(byte));
  assert.deepEqual(decode(...parts).events, EVENTS);
});

test("an unfinished event is not given out", () => {
  assert.deepEqual(decode(bytes("data: whole\n\ndata: half\n")).events.length, 1);
});

test("a comment is the last line only while nothing follows it", () => {
  assert.equal(decode(bytes(": end completed\n")).lastComment, "end completed");
  assert.equal(decode(bytes(": end completed")).lastComment, null);
  assert.equal(decode(bytes(": end completed\ndata")).lastComment, null);
  assert.equal(decode(bytes(": end completed\ndata: x\n")).lastComment, null);
  assert.equal(decode(bytes(": end completed\r"), bytes("\n")).lastComment, "end completed");
});

test("a comment within an event is no last line", () => {
  for (const field of ["data: x", "event: x", "id: e1-5", "retry: 1000", "unknown"])
    assert.equal(decode(bytes(`${field}\n: end completed\n`)).lastComment, null, field);
  assert.equal(decode(bytes("data: x\n\n: end completed\n")).lastComment, "end completed");
});

test("an id that holds NUL is ignored", () => {
  assert.equal(decode(bytes("id: a\0b\ndata: x\n\n")).events[0].id, "");
});

test("a line of a megabyte that comes in small pieces is read in linear time", () => {
  const decoder = new EventStreamDecoder();
  const piece = bytes("x".repeat(256));
  decoder.decode(bytes("data: "));
  for (let i = 0; i < 4096; i++) decoder.decode(piece);
  assert.equal(decoder.decode(bytes("\n\n"))[0].data.length, 256 * 4096);
});
