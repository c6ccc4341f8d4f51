// Conversations in this browser's localStorage, shared by its tabs.
//
// Each has two keys: `chat:<id>`, everything, and `meta:<id>`, what the list shows. While an answer
// is read, `live:<id>` holds how far it has come: a long history isn't written anew each second.
// There is no index, so two tabs that save at once lose nothing. An answer's text is stored together with the
// event id it reaches to, in one write: what a reload finds always fits together. What the browser
// does not take (it is full, or keeps nothing for this page) stays in this tab's memory.
//
// conversation: { id, title, created, updated, messages }
// message:      { id, role: "user", sentAt, text }
//               { id, role: "assistant", attempt, key, sentAt, model, maxTokens, conflict,
//                 state, reason, error, finish, epoch, offset, text, reasoning, gaps: [{ at, bytes }] }
// state:        "sent" (no answer to the POST yet), "streaming", or an ending of pyserve.js

// Two pyserves under two prefixes of one origin share the storage, not the conversations.
const PREFIX = `pyserve:${new URL(".", import.meta.url).pathname}:`;

// A question whose POST was never answered is asked again with its key only while the server
// would know the key; later that might answer it twice.
export const KEY_LIFE_MS = 60_000;
const ROUNDED_MS = 1000; // the server tells when a stream began in whole seconds

/** Whether the server takes this as a conversation's id. */
export const isId = (id) =>
  id !== "" && id !== "." && id !== ".." && !/\p{Cc}/u.test(id) && new TextEncoder().encode(id).length <= 255;

export const isLive = (message) => message?.state === "sent" || message?.state === "streaming";
export const lastOf = (conversation) => conversation.messages.at(-1);

/** What is being answered: a conversation has one stream, but two tabs may have asked at once. */
export const liveOf = ({ messages }) =>
  messages.findLast(({ state }) => state === "streaming") ?? messages.findLast(isLive);

/** The tab that asked was closed before it had an answer, and nobody will ask with that key. */
export const isOverdue = (message) =>
  message?.state === "sent" && Boolean(message.key) && Date.now() - message.sentAt > KEY_LIFE_MS;

/** An overdue message after a lookup: what the server began since, and no answer here is, is its answer. */
export function settle(conversation, message, found) {
  const known = new Set(conversation.messages.map(({ epoch }) => epoch));
  const isAnswer = (stream) =>
    stream.conversation_id === conversation.id &&
    !known.has(stream.epoch) &&
    stream.started_at * 1000 > message.sentAt - ROUNDED_MS;
  const answer = found.find(isAnswer);
  Object.assign(message, answer ? { state: "streaming", epoch: answer.epoch } : { state: "failed", reason: "unsure" });
}

/** Which of two versions of a message has come further: a retry, an ending, more text. */
function further(one, other) {
  if (!one || !other) return one ?? other;
  const stages = ["sent", "unsure", "streaming"]; // who is unsure knows less than who reads
  const stage = ({ state, reason }) => stages.indexOf(reason === "unsure" ? reason : state) + 1 || 4;
  const rank = (message) => [message.attempt ?? 0, stage(message), message.offset ?? 0];
  const [a, b] = [rank(one), rank(other)];
  const at = a.findIndex((value, i) => value !== b[i]);
  return at < 0 || a[at] > b[at] ? one : other;
}

/** Questions in the order in which they were asked, the same in every tab, each with its answer. */
function inOrder(messages) {
  const turns = [];
  for (const message of messages) {
    if (message.role === "user" || !turns.length) turns.push([]);
    turns.at(-1).push(message);
  }
  const compare = ([a], [b]) => a.sentAt - b.sentAt || (a.id < b.id ? -1 : 1);
  return turns.sort(compare).flat();
}

/** Both tabs' messages, each in its furthest version. `mine` keeps its objects. */
export function merge(mine, stored) {
  if (!stored) return mine;
  const theirs = new Map(stored.messages.map((message) => [message.id, message]));
  const merged = mine.messages.map((message) => further(message, theirs.get(message.id)));
  const known = new Set(mine.messages.map((message) => message.id));
  merged.push(...stored.messages.filter((message) => !known.has(message.id)));
  return { ...mine, updated: Math.max(mine.updated, stored.updated), messages: inOrder(merged) };
}

/** Whether `stored` has not heard of something in `mine`: two tabs that write at once overwrite each other. */
export const lacks = (stored, mine) =>
  mine.messages.some((message) => {
    const theirs = stored.messages.find(({ id }) => id === message.id);
    return !theirs || theirs.attempt < message.attempt || (isLive(theirs) && !isLive(message));
  });

const parse = (text) => {
  try {
    return JSON.parse(text ?? null);
  } catch {
    return null; // somebody else's
  }
};

export class Store {
  #unkept = new Map(); // what the browser did not take, by key
  #onTrouble;

  /**
   * @param {(what: { chat?: string, meta?: boolean }) => void} onChange by another tab
   * @param {(trouble: "" | "full" | "denied") => void} onTrouble whether the browser keeps all
   */
  constructor(onChange, onTrouble) {
    this.#onTrouble = onTrouble;
    this.#keep();
    addEventListener("storage", ({ key }) => {
      if (key === null) return onChange({ meta: true });
      if (key.startsWith(`${PREFIX}meta:`)) onChange({ meta: true });
      if (key.startsWith(`${PREFIX}chat:`)) onChange({ chat: key.slice(`${PREFIX}chat:`.length) });
    });
  }

  /** The browser's, or nothing where it has none for this page: then the mere name throws. */
  get #kept() {
    try {
      return localStorage;
    } catch {
      return null;
    }
  }

  #read(name) {
    return parse(this.#unkept.get(name) ?? this.#kept?.getItem(PREFIX + name));
  }

  #write(name, value) {
    this.#unkept.set(name, JSON.stringify(value));
    this.#keep();
  }

  /** Give the browser what it did not take before: there may be room now. */
  #keep() {
    const kept = this.#kept;
    for (const [name, text] of this.#unkept) {
      try {
        kept.setItem(PREFIX + name, text);
        this.#unkept.delete(name);
      } catch {
        // it stays where it is
      }
    }
    this.#onTrouble(!kept ? "denied" : this.#unkept.size ? "full" : "");
  }

  #names() {
    const kept = Object.keys(this.#kept ?? {}).filter((key) => key.startsWith(PREFIX));
    return new Set([...kept.map((key) => key.slice(PREFIX.length)), ...this.#unkept.keys()]);
  }

  /** What the list shows, newest first. */
  list() {
    return [...this.#names()]
      .filter((name) => name.startsWith("meta:"))
      .map((name) => ({ id: name.slice("meta:".length), ...this.#read(name) }))
      .sort((a, b) => b.created - a.created);
  }

  load(id) {
    const unkept = parse(this.#unkept.get(`chat:${id}`));
    const kept = parse(this.#kept?.getItem(`${PREFIX}chat:${id}`));
    const stored = unkept ? merge(unkept, kept) : kept;
    const live = this.#read(`live:${id}`);
    if (stored && live)
      stored.messages = stored.messages.map((message) => (message.id === live.id ? further(live, message) : message));
    return stored;
  }

  /** Stores what this tab knows together with what others stored. */
  save(conversation, { isNew = false } = {}) {
    const stored = this.load(conversation.id);
    if (!stored && !isNew) return; // deleted in another tab
    conversation.updated = Date.now();
    const merged = merge(conversation, stored);
    const meta = { title: merged.title, created: merged.created, live: Boolean(liveOf(merged)) };
    this.#write(`chat:${merged.id}`, merged);
    this.#write(`meta:${merged.id}`, meta);
    this.#remove(`live:${merged.id}`);
  }

  /** Stores how far this answer of a stored conversation has come. */
  saveLive(id, message) {
    const name = `chat:${id}`;
    if (this.#unkept.has(name) || (this.#kept && PREFIX + name in this.#kept)) this.#write(`live:${id}`, message);
  }

  remove(id) {
    for (const kind of ["chat", "meta", "live"]) this.#remove(`${kind}:${id}`);
    this.#keep();
  }

  #remove(name) {
    this.#unkept.delete(name);
    this.#kept?.removeItem(PREFIX + name);
  }

  /** What is typed in this tab and not sent. */
  get draft() {
    try {
      return sessionStorage.getItem(`${PREFIX}draft`) ?? "";
    } catch {
      return "";
    }
  }

  set draft(text) {
    try {
      sessionStorage.setItem(`${PREFIX}draft`, text);
    } catch {
      // it is lost with a reload
    }
  }

  get settings() {
    return { plain: false, maxTokens: null, ...this.#read("settings") };
  }

  set settings(settings) {
    this.#write("settings", settings);
  }
}
