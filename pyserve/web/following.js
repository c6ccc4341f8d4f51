// What the page shows and follows now: one conversation, and the one stream that it has.

import { follow } from "./answer.js";
import { lookup, newId, stop } from "./pyserve.js";
import { isLive, isOverdue, lacks, lastOf, liveOf, merge, settle } from "./store.js";
import { describe } from "./words.js";

const SAVE_MS = 1000;
const OTHER_TAB_MS = 10_000; // until an answer that another tab asked for is taken over
const LOOKUP_MS = 3000; // before the server is asked again what became of a question
const FIRST_STOP_MS = 500; // before the server is told again to stop ...
const LAST_STOP_MS = 10_000; // ... and at last

const isReading = ({ state }) => state === "streaming" || state === "reattached";

export const blank = (id) => ({ id, title: "", created: Date.now(), updated: Date.now(), messages: [] });

/** An answer to be. */
export const newAnswer = (changes) => ({
  id: newId(),
  role: "assistant",
  attempt: 0,
  key: newId(),
  sentAt: Date.now(),
  model: null,
  maxTokens: null,
  state: "sent",
  reason: null,
  error: null,
  finish: null,
  epoch: null,
  offset: 0,
  text: "",
  reasoning: "",
  gaps: [],
  ...changes,
});

export class Following {
  conversation = blank(newId());
  #message = null; // the answer that is followed ...
  #handle = null; // ... and pyserve.js's handle for it
  #reattachedAt = null;
  #savedAt = 0;
  #later = 0; // timer: who asked in another tab, or the server, had its time
  #wasLost = false; // the connection was
  #left = new Map(); // POSTs without an answer, of conversations that are not shown, by their id
  #stopAgain = null; // the server could not be told to stop: tell it now

  /**
   * `onReturn`: the server is another one perhaps, the connection to it was lost.
   * @param {{ store, transcript, announcer, status, onChange(): void, onReturn(): void }} parts
   */
  constructor({ store, transcript, announcer, status, onChange, onReturn }) {
    Object.assign(this, { store, transcript, announcer, status, onChange, onReturn });
    addEventListener("online", () => this.#stopAgain?.());
  }

  /** The answer that the status line is about. */
  get answer() {
    return this.#message ?? liveOf(this.conversation) ?? lastOf(this.conversation);
  }

  get isLive() {
    return isLive(this.answer);
  }

  /** Whether what becomes of this conversation's answer will be heard here. */
  hears(id) {
    if (id !== this.conversation.id) return this.#left.has(id);
    return this.#handle?.state !== "hidden";
  }

  save(options) {
    this.#savedAt = Date.now();
    this.store.save(this.conversation, options);
  }

  /** How far the answer has come that is followed, if one is. */
  saveLive() {
    this.#savedAt = Date.now();
    if (this.#message) this.store.saveLive(this.conversation.id, this.#message);
  }

  show(conversation) {
    this.saveLive();
    this.#leave();
    this.#letGo();
    const left = this.#left.get(conversation.id);
    this.#left.delete(conversation.id);
    this.conversation = left ? merge(left.conversation, conversation) : conversation;
    this.redraw();
    if (left && liveOf(this.conversation) === left.message) return this.#take(left);
    left?.handle.close();
    this.follow();
  }

  /** Without the head of its answer nobody would know which stream is this question's. */
  #leave() {
    if (!this.#handle || this.#message.state !== "sent") return;
    const left = { conversation: this.conversation, message: this.#message, handle: this.#handle };
    this.#left.set(this.conversation.id, left);
    this.#handle = null;
  }

  /** What was left had news. */
  #onLeft(message) {
    const left = [...this.#left.values()].find((one) => one.message === message);
    if (!left || message.state === "sent") return;
    this.#left.delete(left.conversation.id);
    left.handle.close(); // whoever shows the list knows what to do
    this.store.save(left.conversation);
    this.onChange();
  }

  #take({ handle, message }) {
    this.#handle = handle;
    this.#message = message;
    this.onChange();
    this.#tell(handle.status);
  }

  /** A conversation is deleted: what answers it shall stop, and what is on its way shall not begin. */
  stopFor(id) {
    const handle = this.#left.get(id)?.handle ?? (id === this.conversation.id ? this.#handle : null);
    (handle ? handle.stop() : stop(id)).catch(() => {});
  }

  redraw() {
    this.transcript.show(this.conversation, this.store.settings.plain);
  }

  #letGo() {
    clearTimeout(this.#later);
    this.#stopAgain?.();
    this.#handle?.close();
    this.#handle = this.#message = this.#reattachedAt = null;
    this.announcer.clear();
  }

  /** Follow what is being answered, if anything is. */
  follow() {
    this.#letGo();
    const message = liveOf(this.conversation);
    if (!message) return this.onChange();
    if (isOverdue(message)) return this.#lookFor(message);
    this.#handle = follow(this.conversation, message, this.#listener(message));
    this.transcript.view(message).update();
    this.#message = message;
    this.onChange();
  }

  /** Nobody heard what came of this question. The server may have it all the same. */
  async #lookFor(message) {
    this.onChange();
    this.status.say("Asking what became of this …", "connecting");
    const found = await lookup([this.conversation.id]).catch(() => null);
    if (liveOf(this.conversation) !== message || this.#handle) return; // this is no longer what is shown
    if (!found) {
      this.status.say("Lost the connection. Trying again", "retrying");
      this.#later = setTimeout(() => this.follow(), LOOKUP_MS);
      return;
    }
    settle(this.conversation, message, found);
    this.save();
    this.transcript.view(message).update();
    this.follow();
  }

  #listener(message) {
    const view = () => this.transcript.view(message);
    const ours = (listen) => (told) => (this.#message === message ? listen(told) : this.#onLeft(message));
    return {
      onText: ours(({ text, reasoning }) => {
        view().add(text, reasoning);
        if (text) this.announcer.add(text);
        if (view().root.classList.contains("waiting")) view().update();
        if (Date.now() - this.#savedAt > SAVE_MS) this.saveLive();
      }),
      onGap: ours((gap) => view().gap(gap)),
      onState: ours((status) => {
        view().update();
        this.#tell(status);
      }),
      onEnd: ours(() => this.#end(message)),
    };
  }

  #tell(status) {
    if (status.state === "reattached") this.#reattachedAt = status.offset;
    const words = describe(status, this.#reattachedAt);
    if (words) this.status.say(words, status.state);
    this.status.countDown(status.state === "retrying" ? status.delayMs : 0);
    if (["streaming", "reattached", "retrying", "hidden"].includes(status.state)) this.save();
    if (isReading(status) && this.#wasLost) this.onReturn();
    this.#wasLost = status.state === "retrying" || (this.#wasLost && !isReading(status));
  }

  #end(message) {
    this.#handle = this.#message = null;
    if (message.state === "gone" || this.#wasLost) this.onReturn();
    this.#wasLost = false;
    this.save();
    this.transcript.view(message).end();
    if (message.state === "completed") this.announcer.end();
    else this.announcer.clear();
    this.#merge(this.store.load(this.conversation.id)); // another tab may have asked meanwhile
    this.#goOn();
  }

  /** Another tab has written. It may have asked, stopped or retried. */
  takeIn(stored) {
    const isChanged = this.#merge(stored);
    if (lacks(stored, this.conversation)) this.save();
    if (isChanged) this.#goOn();
  }

  #goOn() {
    if (this.#handle) this.onChange();
    else if (liveOf(this.conversation)?.state === "sent") this.#awaitOther();
    else this.follow();
  }

  /** Whether that changed anything. What this tab follows itself, it goes on following. */
  #merge(stored) {
    const mine = this.#message;
    const before = this.conversation.messages;
    const merged = merge(this.conversation, stored);
    const theirs = mine && merged.messages.find(({ id }) => id === mine.id);
    if (mine && theirs !== mine) {
      // What another tab has read of it, this one has read or is about to; what it has given up,
      // this one has not. A retry is another answer, and an end may be news.
      const isKept = isLive(theirs) || theirs.reason === "unsure" || isReading(this.#handle);
      if (isKept && theirs.attempt === mine.attempt)
        merged.messages = merged.messages.map((message) => (message === theirs ? mine : message));
      else this.#letGo();
    }
    const { messages } = merged;
    const isChanged = messages.length !== before.length || messages.some((message, i) => message !== before[i]);
    this.conversation = merged;
    if (isChanged) this.redraw();
    return isChanged;
  }

  /** The other tab's POST is on its way, and that tab will save what came of it; or it was closed. */
  #awaitOther() {
    this.#letGo();
    this.onChange();
    this.status.say("Asked in another tab …", "connecting");
    this.#later = setTimeout(() => this.follow(), OTHER_TAB_MS);
  }

  /** Ask something. @param {string} text @param {{ model: string?, maxTokens: number? }} options */
  ask(text, options) {
    const { messages } = this.conversation;
    const isNew = messages.length === 0;
    if (isNew) this.conversation.title = text.trim().split("\n")[0].slice(0, 80);
    // Behind all that is there, whatever the clock says.
    const sentAt = Math.max(Date.now(), ...messages.map((message) => (message.sentAt ?? 0) + 1));
    messages.push({ id: newId(), role: "user", sentAt, text }, newAnswer({ ...options, conflict: "reject" }));
    this.save({ isNew });
    this.redraw();
    this.transcript.toEnd();
    this.follow();
  }

  /** Ask once more for the last answer; the new one takes its place, in every tab. */
  retry(options) {
    const old = lastOf(this.conversation);
    if (old?.role !== "assistant" || this.isLive) return;
    const { id, attempt } = old;
    const answer = newAnswer({ ...options, id, attempt: attempt + 1, conflict: "replace" });
    this.conversation.messages.splice(-1, 1, answer);
    this.save();
    this.redraw();
    this.transcript.toEnd();
    this.follow();
  }

  /** Until the server has heard it: what is asked of it holds, however often the connection is lost. */
  async stop() {
    if (this.#stopAgain) return this.#stopAgain();
    this.status.say("Stopping …", "stopping");
    // Kept, so that a tab that is away just now finds the end, too.
    const handle = this.#handle;
    if (!handle) return stop(this.conversation.id, { keep: true }).catch(() => {}); // another tab asks
    for (let waitMs = FIRST_STOP_MS; this.#handle === handle; waitMs = Math.min(2 * waitMs, LAST_STOP_MS)) {
      try {
        return await handle.stop({ keep: true });
      } catch {
        if (this.#handle !== handle) return;
      }
      this.status.say("The server could not be told to stop. Trying again", "retrying");
      await new Promise((resolve) => {
        this.#stopAgain = resolve;
        setTimeout(resolve, waitMs);
      });
      this.#stopAgain = null;
    }
  }
}
