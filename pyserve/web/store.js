// Conversations in this browser's localStorage, shared by its tabs.
//
// Each has two keys: `chat:<id>`, everything, and `meta:<id>`, what the list shows. There is no
// index, so two tabs that save at once lose nothing. An answer's text is stored together with the
// event id it reaches to, in one write: what a reload finds always fits together.
//
// conversation: { id, title, updated, messages }
// message:      { id, role: "user", text }
//               { id, role: "assistant", attempt, key, sentAt, model, maxTokens, conflict,
//                 state, reason, error, finish, epoch, offset, text, reasoning, gaps: [{ at, bytes }] }
// state:        "sent" (no answer to the POST yet), "streaming", or an ending of pyserve.js

// Two pyserves under two prefixes of one origin share the storage, not the conversations.
const PREFIX = `pyserve:${new URL(".", import.meta.url).pathname}:`;

export const isLive = (message) => message?.state === "sent" || message?.state === "streaming";
export const lastOf = (conversation) => conversation.messages.at(-1);

/** Which of two versions of a message has come further: a retry, an ending, more text. */
function further(one, other) {
  if (!one || !other) return one ?? other;
  const stage = ({ state }) => ["sent", "streaming"].indexOf(state) + 1 || 3;
  const rank = (message) => [message.attempt ?? 0, stage(message), message.offset ?? 0];
  const [a, b] = [rank(one), rank(other)];
  const at = a.findIndex((value, i) => value !== b[i]);
  return at < 0 || a[at] > b[at] ? one : other;
}

/** Both tabs' messages, each in its furthest version. `mine` keeps its objects. */
export function merge(mine, stored) {
  if (!stored) return mine;
  const theirs = new Map(stored.messages.map((message) => [message.id, message]));
  const merged = mine.messages.map((message) => further(message, theirs.get(message.id)));
  const known = new Set(mine.messages.map((message) => message.id));
  merged.push(...stored.messages.filter((message) => !known.has(message.id)));
  return { ...mine, updated: Math.max(mine.updated, stored.updated), messages: merged };
}

export class Store {
  /** @param {(what: { chat?: string, meta?: boolean }) => void} onChange by another tab */
  constructor(onChange) {
    addEventListener("storage", ({ key }) => {
      if (key === null) return onChange({ meta: true });
      if (key.startsWith(`${PREFIX}meta:`)) onChange({ meta: true });
      if (key.startsWith(`${PREFIX}chat:`)) onChange({ chat: key.slice(`${PREFIX}chat:`.length) });
    });
  }

  #read(name) {
    try {
      return JSON.parse(localStorage.getItem(PREFIX + name));
    } catch {
      return null;
    }
  }

  /** @returns {boolean} whether there was room */
  #write(name, value) {
    try {
      localStorage.setItem(PREFIX + name, JSON.stringify(value));
      return true;
    } catch {
      return false;
    }
  }

  /** What the list shows, newest first. */
  list() {
    const begin = `${PREFIX}meta:`;
    return Object.keys(localStorage)
      .filter((key) => key.startsWith(begin))
      .map((key) => ({ id: key.slice(begin.length), ...this.#read(key.slice(PREFIX.length)) }))
      .sort((a, b) => b.created - a.created);
  }

  load(id) {
    return this.#read(`chat:${id}`);
  }

  /** Stores what this tab knows together with what others stored; false if there is no room. */
  save(conversation, { isNew = false } = {}) {
    const stored = this.load(conversation.id);
    if (!stored && !isNew) return true; // deleted in another tab
    conversation.updated = Date.now();
    const merged = merge(conversation, stored);
    const meta = { title: merged.title, created: merged.created, live: isLive(lastOf(merged)) };
    return this.#write(`chat:${merged.id}`, merged) && this.#write(`meta:${merged.id}`, meta);
  }

  remove(id) {
    localStorage.removeItem(`${PREFIX}chat:${id}`);
    localStorage.removeItem(`${PREFIX}meta:${id}`);
  }

  get settings() {
    return { plain: false, maxTokens: null, ...this.#read("settings") };
  }

  set settings(settings) {
    this.#write("settings", settings);
  }
}
