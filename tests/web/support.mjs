// A scripted server, and a real pyserve in front of a scripted upstream.

import { spawn } from "node:child_process";
import { once } from "node:events";
import http from "node:http";

export const END = ": end completed\n";

/** An event as pyserve's log has it; `offset` is where it ends. */
export const event = (offset, data = `{"n":${offset}}`) => `data: ${data}\nid: e1-${offset}\n\n`;

/** The head of a stream's answer. */
export function head(response, { epoch = "e1", offset = 0 } = {}) {
  response.writeHead(200, {
    "Content-Type": "text/event-stream; charset=utf-8",
    "X-Stream-Epoch": epoch,
    "X-Stream-Offset": String(offset),
  });
  response.flushHeaders();
}

export function refuse(response, status, reason, figures = {}, headers = {}) {
  response.writeHead(status, { "Content-Type": "application/json", ...headers });
  response.end(JSON.stringify({ error: { code: status, message: `it is ${reason}`, reason, ...figures } }));
}

/** Reset the connection, as pyserve does with a reader that lost bytes. */
export const cut = (response) => response.socket.resetAndDestroy();

/**
 * A server whose nth request is answered by `script[n]`, the last one ever after.
 * `requests` holds what came: method, path, query, headers, body.
 */
export async function scripted(t, ...script) {
  const requests = [];
  const server = http.createServer(async (request, response) => {
    const url = new URL(request.url, "http://localhost");
    let body = "";
    request.setEncoding("utf8");
    for await (const part of request) body += part;
    const { method, headers } = request;
    const query = Object.fromEntries(url.searchParams);
    requests.push({ method, path: url.pathname, query, headers, body });
    const answer = script[Math.min(requests.length, script.length) - 1];
    answer(response, requests.at(-1));
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => {
    server.close();
    server.closeAllConnections();
  });
  return { url: `http://127.0.0.1:${server.address().port}/`, requests };
}

/** Collects what a handle tells. */
export function recorder() {
  const events = [];
  const states = [];
  const waiting = new Set();
  const news = () => waiting.forEach((check) => check());
  return {
    events,
    states,
    names: () => states.map((status) => status.state),
    data: () => events.map((one) => one.data),
    onEvent: (one) => (events.push(one), news()),
    onState: (status) => (states.push(status), news()),
    /** Resolves once `condition()` holds after some event or state. */
    until: (condition) =>
      new Promise((resolve) => {
        const check = () => condition() && (waiting.delete(check), resolve());
        waiting.add(check);
        check();
      }),
  };
}

/** `pyserve serve` in front of `upstream`; `restart` starts it anew at the same address. */
export async function pyserve(t, upstream, ...options) {
  const python = process.env.PYSERVE_PYTHON ?? "python3";
  let child;
  const start = async (port) => {
    // An upstream of the tests takes every request for a question: it is not asked for its health.
    const fixed = ["--port", port, "--upstream", upstream, "--health-interval", "0"];
    const command = ["-m", "pyserve.cli", "serve", ...fixed, ...options];
    child = spawn(python, command, { stdio: ["ignore", "pipe", "inherit"] });
    let output = "";
    for await (const part of child.stdout) {
      output += part;
      const found = /listening on http:\/\/[^\s:]+:(\d+)\n/.exec(output);
      if (found) return found[1];
    }
    throw new Error(`pyserve did not start: ${output}`);
  };
  const kill = async () => {
    if (child.exitCode === null && child.signalCode === null) {
      child.kill("SIGKILL");
      await once(child, "exit");
    }
  };
  t.after(kill);
  const port = await start("0");
  return {
    url: `http://127.0.0.1:${port}/`,
    restart: async () => {
      await kill();
      await start(port);
    },
  };
}

/** An upstream whose tokens are written by the test. */
export async function upstream(t) {
  const live = [];
  const waiting = [];
  const server = await scripted(t, (response) => {
    response.writeHead(200, { "Content-Type": "text/event-stream" });
    response.flushHeaders();
    const generation = {
      write: (data) => response.write(`data: ${data}\n\n`),
      end: () => response.end("data: [DONE]\n\n"),
      closed: once(response, "close"),
    };
    const next = waiting.shift();
    if (next) next(generation);
    else live.push(generation);
  });
  return {
    ...server,
    /** The next generation that pyserve asks for. */
    next: () => new Promise((resolve) => (live.length ? resolve(live.shift()) : waiting.push(resolve))),
  };
}
