// @ts-check
/**
 * pyserve's streams in a browser (or Node 20): start one, follow it through every loss of the
 * connection, stop it.
 *
 *     import { submit } from "./pyserve.js";
 *     const stream = submit({ messages }, { onEvent: (event) => console.log(event.data) });
 *     const { state, reason } = await stream.done;
 *
 * The promise: every event of the log is given to `onEvent` once, in order, whatever happens to
 * the connection; or the state `gap` says how many bytes were lost. `pyserve.d.ts` documents the
 * interface. This file has no dependencies and can be copied.
 *
 * @import { Client, ClientOptions, Ending, FollowOptions, Handle, OutgoingRequest, Status,
 *   SubmitOptions } from "./pyserve.d.ts"
 * @typedef {RequestInit & { signal: AbortSignal }} Init
 * @typedef {(method: string, path: string, init: Init, query: Record<string, string>)
 *     => Promise<Response>} Send
 * @typedef {(signal: AbortSignal) => Promise<Response>} Post
 */

const DEFAULTS = {
  heartbeatMs: 1000, // the server's own; 3 missed ones are a stall
  hiddenMs: 10_000, // then a hidden tab gives its connection back
  minDelayMs: 250,
  maxDelayMs: 10_000,
  answerMs: 10_000, // until the head of an answer; the server holds it back for 2 s at most
};
const UPLOAD_BYTES_PER_MS = 10; // a slow link's: a large POST may take that much longer
const SLICE_BYTES = 32 * 1024; // a replay of megabytes is read in slices ...
const BUSY_MS = 8; // ... and the page gets its turn after so long
const CROWDED_MS = 500; // a request that waits so long may be waiting for hidden tabs' connections
const HIDDEN_STREAMS = 3; // so many hidden ones keep theirs for hiddenMs, or no new tab could load
const CLOSED = /** @type {Ending} */ ({ state: "closed", reason: null });
const CANCELLED = /** @type {Ending} */ ({ state: "cancelled", reason: null });
const CHANNEL = "pyserve.js: give way"; // says "", or the key of a stream that was hidden just now

/** An answer that is of no use; `reason` is pyserve's, or `http_<status>` where a proxy answered. */
export class PyserveError extends Error {
  /**
   * @param {number} status
   * @param {Record<string, any>} error the JSON error
   * @param {number | null} retryAfter seconds
   */
  constructor(status, error = {}, retryAfter = null) {
    super(error.message ?? `HTTP status ${status}`);
    this.name = "PyserveError";
    this.status = status;
    this.reason = String(error.reason ?? `http_${status}`);
    this.retryAfter = retryAfter;
    this.details = error;
  }

  /** @param {Response} response */
  static async from(response) {
    const body = await response.json().catch(() => null);
    const isBusy = response.status === 429 || response.status === 503;
    const seconds = isBusy ? Number.parseInt(response.headers.get("Retry-After") ?? "", 10) : NaN;
    return new PyserveError(response.status, body?.error ?? {}, seconds >= 0 ? seconds : null);
  }
}

/** An id nobody else has; `crypto.randomUUID` is missing on plain http:// addresses. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return crypto.randomUUID?.() ?? [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Server-sent events out of bytes that are cut anywhere: HTML standard, section 9.2.6. */
export class EventStreamDecoder {
  #text = new TextDecoder();
  #rest = ""; // of a line that has not ended
  #afterCr = false;
  /** @type {string[]} */
  #data = [];
  #type = "";
  #id = "";
  #inEvent = false; // a field has come, its blank line has not
  /** The last line, if it was a comment between two events, without its colon. @type {string | null} */
  lastComment = null;

  /**
   * @param {Uint8Array} bytes
   * @returns {{ id: string, type: string, data: string }[]} the events that are whole now
   */
  decode(bytes) {
    const events = [];
    let text = this.#text.decode(bytes, { stream: true });
    if (this.#afterCr && text) {
      if (text[0] === "\n") text = text.slice(1);
      this.#afterCr = false;
    }
    let start = 0;
    for (const found of text.matchAll(/\r\n|\n|\r/g)) {
      const event = this.#takeLine(this.#rest + text.slice(start, found.index));
      if (event) events.push(event);
      this.#rest = "";
      start = found.index + found[0].length;
      this.#afterCr = found[0] === "\r" && start === text.length;
    }
    this.#rest += text.slice(start);
    if (this.#rest) this.lastComment = null;
    return events;
  }

  /** @param {string} line */
  #takeLine(line) {
    this.lastComment = null;
    if (line === "") return this.#dispatch();
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + (line[colon + 1] === " " ? 2 : 1));
    if (colon !== 0) this.#inEvent = true;
    else if (!this.#inEvent) this.lastComment = value;
    if (name === "data") this.#data.push(value);
    else if (name === "event") this.#type = value;
    else if (name === "id" && !value.includes("\0")) this.#id = value;
    return null;
  }

  #dispatch() {
    const event = { id: this.#id, type: this.#type || "message", data: this.#data.join("\n") };
    const isEvent = this.#data.length > 0;
    this.#data = [];
    this.#type = "";
    this.#inEvent = false;
    return isEvent ? event : null;
  }
}

/**
 * One stream that is followed, through as many connections as it takes.
 *
 * `#follow` is the loop: connect, read, and when that broke wait and connect again; a connection
 * returns how the stream ended, or throws what broke it: a PyserveError, or a word for it.
 */
class Stream {
  /** @type {Status} */
  status = { state: "connecting", attempt: 0 };
  /** @type {string | null} */
  epoch = null;
  /** Where to go on: the end of the last event. */
  offset = 0;
  /** Go on at the oldest byte there is: the caller wants that, or what follows `offset` is lost. */
  #earliest = /** @type {"" | "wanted" | "lost"} */ ("");
  #attempt = 0; // connections that failed since the last progress
  #connected = false; // some connection got a stream
  #attachedAt = 0; // the present or last one did
  #heardAt = 0;
  #closed = false;
  #stopping = false;
  #keep = false;
  #hiddenLong = false;
  #key = newId();
  #hiddenLater = new Set(); // keys of other streams, hidden after this one
  /** @type {BroadcastChannel | null} */
  #channel = null;
  #connection = new AbortController();
  #wake = (_ = null) => {};
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #hiding;

  /**
   * @param {Client} client
   * @param {Send} send
   * @param {string} conversationId
   * @param {FollowOptions} options
   * @param {Post | null} post starts the stream; null: it is there already
   */
  constructor(client, send, conversationId, options, post = null) {
    this.client = client;
    this.send = send;
    this.conversationId = conversationId;
    this.options = { ...DEFAULTS, ...options };
    this.post = post;
    this.#takeFrom(options.from ?? 0);
    /** @type {Promise<Ending>} */
    this.done = Promise.resolve().then(() => this.#run()); // the caller has us by then
  }

  get state() {
    return this.status.state;
  }

  get lastEventId() {
    return this.epoch === null ? null : `${this.epoch}-${this.offset}`;
  }

  /** Stop following; the generation goes on. */
  close = () => {
    this.#closed = true;
    this.#connection.abort("closed");
    this.#wake();
  };

  /** Stop the generation; `done` follows when the server has said the end. @type {Handle["stop"]} */
  stop = async ({ keep = false } = {}) => {
    this.#stopping = true;
    this.#keep = keep;
    try {
      await this.client.stop(this.conversationId, { epoch: this.epoch, keep });
    } catch (error) {
      if (!this.post) this.#stopping = false;
      throw error;
    } finally {
      this.#wake();
    }
  };

  /** @param {number | string} from */
  #takeFrom(from) {
    const id = /^([0-9a-z]+)-(\d+)$/.exec(String(from));
    if (id) this.epoch = id[1];
    if (from === "earliest") this.#earliest = "wanted";
    else this.offset = Number(id ? id[2] : from);
  }

  async #run() {
    const over = new AbortController();
    const until = { signal: over.signal };
    const wake = () => this.#lookAround();
    globalThis.document?.addEventListener("visibilitychange", wake, until);
    globalThis.addEventListener?.("online", wake, until);
    globalThis.addEventListener?.("pageshow", wake, until);
    if (globalThis.document && globalThis.BroadcastChannel) this.#channel = new BroadcastChannel(CHANNEL);
    if (this.#channel) this.#channel.onmessage = ({ data }) => isHidden() && this.#giveWay(data);
    this.options.signal?.addEventListener("abort", this.close, until);
    if (this.options.signal?.aborted) this.close();
    this.#lookAround();
    try {
      const ending = await this.#follow();
      this.#tell(ending);
      return ending;
    } finally {
      clearTimeout(this.#hiding);
      this.#channel?.close();
      over.abort();
    }
  }

  /** @returns {Promise<Ending>} */
  async #follow() {
    for (;;) {
      if (this.#isDetached()) {
        this.#tell({ state: "hidden" });
        while (this.#isDetached() && !this.#closed) await this.#sleep(null);
      }
      if (this.#closed) return CLOSED;
      if (this.#stopping && this.post) {
        // Stopped while its POST had no answer: it may still have been read.
        await this.client.stop(this.conversationId, { keep: this.#keep }).catch(() => {});
        return CANCELLED;
      }
      this.#tell({ state: "connecting", attempt: this.#attempt });
      try {
        return await this.#connect();
      } catch (why) {
        const ending = await this.#recover(why);
        if (ending) return ending;
      }
    }
  }

  /** What follows a connection that broke: an ending, or null for the next. @param {unknown} why */
  async #recover(why) {
    if (this.#closed) return CLOSED;
    if (why === "hidden") return null;
    if (isLost(why) && !this.#earliest) {
      this.#earliest = "lost";
      return null;
    }
    if (why instanceof PyserveError && !this.#isPassing(why)) return this.#refused(why);
    if (this.#stopping && this.post) return null;
    if (this.#attachedAt && Date.now() - this.#attachedAt > 5 * this.options.heartbeatMs) this.#attempt = 0;
    this.#attachedAt = 0;
    await this.#backOff(why);
    return null;
  }

  /** One connection, from its request to its end. @returns {Promise<Ending>} */
  async #connect() {
    const connection = new AbortController();
    this.#connection = connection;
    if (this.#closed) connection.abort("closed"); // by onState
    this.#heardAt = Date.now();
    let limitMs = this.#answerLimitMs();
    const watch = setInterval(() => {
      if (Date.now() - this.#heardAt > limitMs) connection.abort("stall");
    }, this.options.heartbeatMs / 4);
    try {
      const post = this.post;
      const response = await (post ? post(connection.signal) : this.#get(connection.signal));
      await checkHead(response);
      this.post = null;
      this.#heardAt = Date.now();
      limitMs = 3.5 * this.options.heartbeatMs;
      if (response.status === 204) return await this.#lookUpEnding();
      const replaced = this.#start(response.headers);
      if (replaced) return replaced;
      if (post && this.#stopping) await this.stop({ keep: this.#keep }); // it came before its start
      if (this.#isDetached()) throw "hidden"; // meanwhile, and the POST had to be waited for
      return await this.#read(response);
    } catch (error) {
      if (connection.signal.aborted) throw connection.signal.reason;
      throw error instanceof PyserveError || error === "hidden" ? error : "connection_lost";
    } finally {
      clearInterval(watch);
      connection.abort("over"); // closes the connection, whatever was left of it
    }
  }

  /**
   * A GET is answered at once. Where it isn't, the browser may have taken a connection that died
   * while it was idle, and may have more of them; or the network is slow.
   */
  #answerLimitMs() {
    const { answerMs, heartbeatMs } = this.options;
    if (this.post) return answerMs;
    return Math.min(answerMs, 3.5 * heartbeatMs * 2 ** Math.max(0, this.#attempt - 3));
  }

  /** @param {AbortSignal} signal */
  #get(signal) {
    const from = this.#earliest ? "earliest" : (this.lastEventId ?? String(this.offset));
    return this.send("GET", "v1/stream", { signal }, { conv_id: this.conversationId, from });
  }

  /** What the head of an answer says. @param {Headers} headers @returns {Ending | null} */
  #start(headers) {
    const epoch = headers.get("X-Stream-Epoch");
    const startsAt = Number(headers.get("X-Stream-Offset") ?? this.offset);
    if (this.epoch && epoch && epoch !== this.epoch)
      return { state: "replaced", reason: "stream_replaced", epoch };
    this.epoch = epoch ?? this.epoch;
    if (startsAt > this.offset) {
      if (this.#earliest !== "wanted")
        this.#tell({ state: "gap", lostFrom: this.offset, firstOffset: startsAt });
      this.offset = startsAt;
    }
    this.#earliest = "";
    const again = this.#connected || this.offset > 0;
    this.#connected = true;
    this.#attachedAt = Date.now();
    this.#tell(again ? { state: "reattached", offset: this.offset } : { state: "streaming" });
    return null;
  }

  /** @param {Response} response @returns {Promise<Ending>} */
  async #read(response) {
    const decoder = new EventStreamDecoder();
    const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      let turnAt = Date.now();
      for (let start = 0; start < value.length; start += SLICE_BYTES) {
        this.#heardAt = Date.now();
        for (const event of decoder.decode(value.subarray(start, start + SLICE_BYTES))) {
          if (this.#closed) throw new Error("closed");
          this.#deliver(event);
        }
        if (Date.now() - turnAt <= BUSY_MS) continue;
        await pause();
        turnAt = Date.now();
      }
    }
    // Only the log's last line ends a stream: a body that ends without it was cut by someone.
    const end = /^end (completed|failed|cancelled)(?: (.*))?$/.exec(decoder.lastComment ?? "");
    if (!end) throw new Error("The answer ended before its stream");
    return { state: /** @type {"completed"} */ (end[1]), reason: end[2] ?? null };
  }

  /** @param {{ id: string, type: string, data: string }} event */
  #deliver({ id, type, data }) {
    const [, epoch = null, digits = null] = /^([0-9a-z]+)-(\d+)$/.exec(id) ?? [];
    if (epoch !== null) {
      if (epoch === this.epoch && Number(digits) <= this.offset) return; // had it
      this.epoch = epoch;
      this.offset = Number(digits);
    }
    this.#attempt = 0;
    if (this.state !== "streaming") this.#tell({ state: "streaming" });
    call(this.options.onEvent, { id, type, data, epoch, offset: this.offset });
  }

  /** A 204: over, and without an event. @returns {Promise<Ending>} */
  async #lookUpEnding() {
    const found = await this.client.lookup([this.conversationId], { signal: this.#connection.signal });
    const mine = found.find((stream) => stream.conversation_id === this.conversationId);
    if (!mine) return { state: "gone", reason: "stream_not_found" };
    if (!mine.is_done) throw new Error("Replaced meanwhile");
    return { state: /** @type {"completed"} */ (mine.state), reason: mine.reason };
  }

  /**
   * Whether the same request may be answered otherwise in a while. A POST that was answered is
   * repeated only if the server says when; once there was a stream, only pyserve's word ends it.
   * @param {PyserveError} error
   */
  #isPassing(error) {
    const { status, retryAfter, details } = error;
    if (this.post) return retryAfter !== null;
    if (status >= 500 || [408, 425, 429].includes(status) || isLost(error)) return true;
    return this.#connected && !details.reason;
  }

  /** An answer that trying again would not change. @param {PyserveError} error @returns {Ending} */
  #refused(error) {
    const { reason, details } = error;
    const isGone = reason === "stream_not_found";
    if (this.#stopping && (isGone || reason === "cancelled")) return CANCELLED;
    if (reason === "cancelled" && this.post) return { state: "cancelled", reason, error };
    if (isGone) return { state: "gone", reason, error };
    if (reason === "stream_replaced" || reason === "replaced")
      return { state: "replaced", reason, epoch: details.epoch ?? null, error };
    return { state: "failed", reason, error };
  }

  /** @param {unknown} why */
  async #backOff(why) {
    const { minDelayMs, maxDelayMs } = this.options;
    const ceiling = Math.min(maxDelayMs, minDelayMs * 2 ** this.#attempt++);
    const [word, askedS] =
      why instanceof PyserveError ? [why.reason, why.retryAfter ?? 0] : [String(why), 0];
    const delayMs = Math.max(ceiling * (0.5 + Math.random() / 2), Math.min(askedS * 1000, 60_000));
    this.#tell({ state: "retrying", delayMs, attempt: this.#attempt, why: word });
    await this.#sleep(delayMs);
  }

  /** Until `#wake`, at most `ms`. @param {number | null} ms */
  async #sleep(ms) {
    const timer = ms === null ? undefined : setTimeout(() => this.#wake(), ms);
    if (!this.#closed) await new Promise((resolve) => (this.#wake = resolve));
    clearTimeout(timer);
  }

  /** The page was shown or hidden, came back from sleep, or has a network again. */
  #lookAround() {
    clearTimeout(this.#hiding);
    if (isHidden()) {
      const { hiddenMs } = this.options; // setTimeout takes Infinity for 0
      if (Number.isFinite(hiddenMs)) this.#hiding = setTimeout(() => this.#hide(), hiddenMs);
      this.#channel?.postMessage(this.#key);
      return;
    }
    this.#hiddenLong = false;
    this.#hiddenLater.clear();
    this.#wake();
  }

  /** Another tab lacks a connection, or was hidden, too. @param {string} key */
  #giveWay(key) {
    if (key) this.#hiddenLater.add(key);
    if (!key || this.#hiddenLater.size >= HIDDEN_STREAMS) this.#hide();
  }

  #hide() {
    this.#hiddenLong = true;
    if (!this.post) this.#connection.abort("hidden"); // an unanswered POST is waited for
  }

  #isDetached() {
    return this.#hiddenLong && !this.post;
  }

  /** @param {Status} status */
  #tell(status) {
    this.status = status;
    call(this.options.onState, status);
  }
}

/** Whether this begins a stream, or says that there is none. @param {Response} response */
async function checkHead(response) {
  if (!response.ok) throw await PyserveError.from(response);
  const type = response.headers.get("Content-Type") ?? "";
  if (response.status === 204 || /^text\/event-stream\b/i.test(type)) return;
  throw Object.assign(new PyserveError(response.status), { reason: "not_event_stream" });
}

const isHidden = () => globalThis.document?.visibilityState === "hidden";

/** Ask hidden tabs of this origin for their connections: a browser has six for a host, for all. */
function askForWay() {
  if (isHidden() || !globalThis.document || !globalThis.BroadcastChannel) return;
  const channel = new BroadcastChannel(CHANNEL);
  channel.postMessage("");
  channel.close();
}

const isLost = (/** @type {any} */ why) => why instanceof PyserveError && why.reason === "offset_lost";

/** What a caller's function throws is reported as uncaught, and breaks no stream. */
function call(/** @type {Function | undefined} */ listener, /** @type {unknown} */ value) {
  try {
    listener?.(value);
  } catch (error) {
    if ("reportError" in globalThis) reportError(error);
    else Promise.reject(error);
  }
}

/** Give the page its turn. @returns {Promise<unknown>} */
function pause() {
  const scheduler = /** @type {any} */ (globalThis).scheduler;
  return scheduler?.yield?.() ?? new Promise((resolve) => setTimeout(resolve, 0));
}

/** @param {URL} root @param {string} path @param {Record<string, string>} query */
function address(root, path, query) {
  const url = new URL(path, root);
  for (const [name, value] of Object.entries(query)) url.searchParams.set(name, value);
  return url;
}

/** @param {URL} root @param {Pick<ClientOptions, "authorize" | "fetch">} hooks @returns {Send} */
function sender(root, { authorize, fetch = (...request) => globalThis.fetch(...request) }) {
  /** @param {OutgoingRequest} request @param {AbortSignal} signal */
  const ask = async (request, signal) => {
    const aborted = new Promise((_, reject) => signal.addEventListener("abort", reject));
    try {
      signal.throwIfAborted();
      await Promise.race([aborted, (async () => authorize?.(request))()]);
    } catch (cause) {
      signal.throwIfAborted();
      if (cause instanceof TypeError) throw cause; // as fetch says that there is no network
      const message = cause instanceof Error ? cause.message : String(cause);
      throw Object.assign(new PyserveError(0, { reason: "authorize", message }), { cause });
    }
  };
  return async (method, path, init, query) => {
    const url = address(root, path, query);
    const request = { method, url, headers: new Headers(init.headers), query };
    await ask(request, init.signal);
    const waiting = setTimeout(askForWay, CROWDED_MS);
    try {
      return await fetch(request.url, { cache: "no-store", ...init, method, headers: request.headers });
    } finally {
      clearTimeout(waiting);
    }
  };
}

/** A submit's request, at each try the same. @param {Send} send @param {object} request @param {SubmitOptions} options */
function poster(send, request, { conversationId = newId(), path = "v1/chat/completions", ...options }) {
  const headers = new Headers({ "Content-Type": "application/json" });
  headers.set("Idempotency-Key", options.idempotencyKey ?? newId());
  if (options.conflict) headers.set("X-Stream-Conflict", options.conflict);
  const body = JSON.stringify({ ...request, stream: true });
  const answerMs = DEFAULTS.answerMs + body.length / UPLOAD_BYTES_PER_MS;
  const query = { conv_id: conversationId };
  /** @type {Post} */
  const post = (signal) => send("POST", path.replace(/^\/+/, ""), { headers, body, signal }, query);
  return { conversationId, post, answerMs };
}

/** @param {ClientOptions} [options] @returns {Client} */
export function createClient({ base = "./", authorize, fetch, ...defaults } = {}) {
  const root = new URL(base, globalThis.location?.href);
  if (!root.pathname.endsWith("/")) root.pathname += "/";
  const send = sender(root, { ...(authorize && { authorize }), ...(fetch && { fetch }) });
  const timeLimit = () => AbortSignal.timeout(defaults.answerMs ?? DEFAULTS.answerMs);

  /** @type {Client} */
  const client = {
    attach: (conversationId, options = {}) =>
      new Stream(client, send, conversationId, { ...defaults, ...options }),

    submit(request, options = {}) {
      const { conversationId, post, answerMs } = poster(send, request, options);
      return new Stream(client, send, conversationId, { answerMs, ...defaults, ...options, from: 0 }, post);
    },

    async stop(conversationId, { epoch, keep = false } = {}) {
      const headers = new Headers(epoch ? { "If-Match": `"${epoch}"` } : {});
      const init = { headers, keepalive: true, signal: timeLimit() };
      const query = { conv_id: conversationId, ...(keep && { keep: "true" }) };
      const response = await send("DELETE", "v1/stream", init, query);
      if (response.ok || response.status === 412) return response.ok;
      throw await PyserveError.from(response);
    },

    async lookup(conversationIds, { signal = timeLimit() } = {}) {
      const body = JSON.stringify({ conversation_ids: conversationIds });
      const init = { headers: { "Content-Type": "application/json" }, body, signal };
      const response = await send("POST", "v1/streams/lookup", init, {});
      if (!response.ok) throw await PyserveError.from(response);
      return response.json();
    },

    streamUrl: (conversationId, from) =>
      address(root, "v1/stream", { conv_id: conversationId, ...(from !== undefined && { from: `${from}` }) }),
  };
  return client;
}

/** @type {Client | undefined} */
let own;

/** Where this file was served from there is a pyserve, whatever prefix a proxy has put before it. */
function ownClient() {
  // A bundle may not know where it came from: then it is where its page is.
  const known = [import.meta.url, globalThis.document?.baseURI].find((url) => /^https?:/.test(url ?? ""));
  if (!known) throw new Error("pyserve.js does not know where its server is: give createClient a base");
  return (own ??= createClient({ base: new URL(".", known) }));
}

/** @template {keyof Client} Name @param {Name} name @returns {Client[Name]} */
const ofOwn = (name) => /** @type {any} */ ((/** @type {any[]} */ ...given) => /** @type {any} */ (ownClient())[name](...given));

export const attach = ofOwn("attach");
export const submit = ofOwn("submit");
export const stop = ofOwn("stop");
export const lookup = ofOwn("lookup");
export const streamUrl = ofOwn("streamUrl");
