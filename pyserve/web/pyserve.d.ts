/**
 * Types of pyserve.js, written by hand.
 *
 * Which answers end a stream, and which are waited out (state `retrying`):
 * - 408, 425, 429, 5xx and lost connections pass: a GET is repeated for as long as it takes.
 * - Once there was a stream, only pyserve's own words end it: its last line, or an error with a
 *   `reason`. A proxy's 401, 404 or login page is waited out. At the very first connection of an
 *   `attach` such an answer is an end: nothing says that there is a pyserve.
 * - A POST that was not answered is repeated with its Idempotency-Key. One that was answered is
 *   repeated only at a 429 or 503 with `Retry-After` in seconds.
 * - What `authorize` throws ends it: `failed`, reason `authorize`. A TypeError, which is how its own
 *   `fetch` says that there is no network, passes like any lost connection.
 */

/** One server-sent event. */
export interface StreamEvent {
  /** `<epoch>-<offset>`, or "" where the server sent none. */
  id: string;
  /** "message" unless the event has a name. */
  type: string;
  /** What stood in its `data:` lines: JSON, or `[DONE]`. */
  data: string;
  epoch: string | null;
  /** Where the log goes on behind this event. */
  offset: number;
}

/** How following a stream ended. */
export interface Ending {
  state:
    | "completed"
    | "failed" // reason: the server's, or an error of the request
    | "cancelled" // somebody pressed Stop, or a newer generation took its place
    | "gone" // pyserve's 404: unknown, expired, dropped by a Stop, or the server was restarted
    | "replaced" // 409: the conversation holds a newer stream; attach to it with from `<epoch>-0`
    | "closed"; // by close() or the signal: the generation goes on
  reason: string | null;
  /** Of `replaced`: the newer stream's, where the server named it. */
  epoch?: string | null;
  /** The answer that said so, if it was one; its `cause` is what `authorize` threw. */
  error?: PyserveError;
}

/** What is going on, for `onState`. The last one is the ending. */
export type Status =
  | { state: "connecting"; attempt: number } // attempt 0: the first
  | { state: "streaming" }
  | { state: "reattached"; offset: number } // reading again, from this byte on
  | { state: "retrying"; delayMs: number; attempt: number; why: string } // "stall", "connection_lost", or a reason
  | { state: "hidden" } // detached while the tab is hidden
  | { state: "gap"; lostFrom: number; firstOffset: number } // those bytes are lost; goes on behind
  | Ending;

/** How soon things happen. All in milliseconds. */
export interface Timing {
  /** The server's `--heartbeat-interval`; a silence of 3.5 of them is a stall. Default 1000. */
  heartbeatMs?: number;
  /**
   * A tab that was hidden for so long detaches until it is shown; at once, when a visible tab of
   * the same origin gets no connection, of which browsers have six for a host, or when three other
   * streams were hidden after it. Default 10000; Infinity: only then.
   */
  hiddenMs?: number;
  /** The first delay before a reconnect; it doubles, less a random part of up to half. Default 250. */
  minDelayMs?: number;
  /** Its bound. Default 10000. */
  maxDelayMs?: number;
  /**
   * Until the head of an answer. Default 10000, and for a POST more by its size; the first
   * reconnects wait less, for 3.5 heartbeats. `stop` and `lookup` reject with a `TimeoutError` then.
   */
  answerMs?: number;
}

export interface FollowOptions extends Timing {
  /**
   * An offset, an event id `<epoch>-<offset>`, or "earliest" for whatever is still there.
   * Default 0. Whoever goes on from stored events should give the last one's id.
   */
  from?: number | string;
  onEvent?: (event: StreamEvent) => void;
  onState?: (status: Status) => void;
  /** Closes the handle. */
  signal?: AbortSignal;
}

export interface SubmitOptions extends Omit<FollowOptions, "from"> {
  /** Default: a new one. */
  conversationId?: string;
  /** Route of the server, below its base. Default "v1/chat/completions". */
  path?: string;
  /** When the conversation has a live stream. Default, the server's: "replace". */
  conflict?: "replace" | "reject" | "attach";
  /** Give a stored one to take up a submit after a reload: it attaches, or starts it. */
  idempotencyKey?: string;
}

/** A stream that is followed. */
export interface Handle {
  readonly conversationId: string;
  readonly state: Status["state"];
  readonly status: Status;
  readonly epoch: string | null;
  /** The end of the last event that was given out. */
  readonly offset: number;
  /** `<epoch>-<offset>`, to be stored together with what was made of the events so far. */
  readonly lastEventId: string | null;
  /** Always fulfilled, never rejected. */
  readonly done: Promise<Ending>;
  /** Stop following. The generation goes on. */
  close(): void;
  /** Stop the generation, for everybody. Rejects if the server can't be told. */
  stop(options?: { keep?: boolean }): Promise<void>;
}

/** A session as `POST /v1/streams/lookup` describes it. */
export interface StreamInfo {
  conversation_id: string;
  is_done: boolean;
  total_bytes: number;
  started_at: number;
  completed_at: number;
  state: "queued" | "streaming" | "completed" | "failed" | "cancelled";
  epoch: string;
  first_offset: number;
  readers: number;
  reason: string | null;
}

/** A request that is about to be sent; `authorize` may change `url` and `headers`. */
export interface OutgoingRequest {
  method: string;
  url: URL;
  headers: Headers;
  /** What was put into the URL: `conv_id`, `from`, `keep`. */
  query: Record<string, string>;
}

export interface ClientOptions extends Timing {
  /** Where pyserve's routes are, relative to the page. Default "./". */
  base?: string | URL;
  /**
   * Called for each connection, so that a token can be a new one. What it throws ends the stream:
   * whoever fetches a token tries again himself when the network is away.
   */
  authorize?: (request: OutgoingRequest) => void | Promise<void>;
  fetch?: typeof globalThis.fetch;
}

export interface Client {
  /** Follow the stream of a conversation. */
  attach(conversationId: string, options?: FollowOptions): Handle;
  /** Start a stream and follow it. `request` is the route's JSON; `"stream": true` is added. */
  submit(request: object, options?: SubmitOptions): Handle;
  /**
   * Stop whatever runs under the conversation id.
   * @param options `epoch`: only that session; `keep`: it can still be read, until its TTL
   * @returns false if the conversation holds another session than `epoch`
   */
  stop(conversationId: string, options?: { epoch?: string | null; keep?: boolean }): Promise<boolean>;
  /** The sessions whose id is one of these or begins with one and `::`. */
  lookup(conversationIds: string[], options?: { signal?: AbortSignal }): Promise<StreamInfo[]>;
  /** A URL for an EventSource, or for a link. */
  streamUrl(conversationId: string, from?: number | string): URL;
}

export function createClient(options?: ClientOptions): Client;

/**
 * Of a client whose base is the folder that pyserve.js came from. In a bundle that does not know it
 * is the page's folder; where there is no page (Node), use `createClient` with a `base`: these throw.
 */
export const attach: Client["attach"];
export const submit: Client["submit"];
export const stop: Client["stop"];
export const lookup: Client["lookup"];
export const streamUrl: Client["streamUrl"];

/** An id nobody else has. */
export function newId(): string;

/** An answer that is an error, or what `authorize` threw. */
export class PyserveError extends Error {
  constructor(status: number, error?: Record<string, unknown>, retryAfter?: number | null);
  /** 0 where `authorize` threw. */
  readonly status: number;
  /** One of pyserve's reasons; `http_<status>` or `not_event_stream` where something else answered; `authorize`. */
  readonly reason: string;
  /** Seconds, of a 429 or 503. */
  readonly retryAfter: number | null;
  /** The JSON error, with its figures. */
  readonly details: Record<string, any>;
}

/** Server-sent events out of bytes that are cut anywhere. */
export class EventStreamDecoder {
  decode(bytes: Uint8Array): { id: string; type: string; data: string }[];
  /** The last line, if that was a comment between two events. pyserve's last is `end completed` or the like. */
  readonly lastComment: string | null;
}
