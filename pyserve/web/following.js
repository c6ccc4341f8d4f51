// What the page shows and follows now: one conversation, and the one stream that it has.

import { follow } from "./answer.js";
import { newId, stop } from "./pyserve.js";
import { isLive, lacks, lastOf, liveOf, merge } from "./store.js";
import { describe } from "./words.js";

const SAVE_MS = 1000;
const OTHER_TAB_MS = 10_000; // until an answer that another tab asked for is taken over

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
  #takingOver = 0; // timer of an answer that another tab asked for

  /** @param {{ store, transcript, announcer, status, onChange(): void }} parts */
  constructor({ store, transcript, announcer, status, onChange }) {
    Object.assign(this, { store, transcript, announcer, status, onChange });
  }

  /** The answer that the status line is about. */
  get answer() {
    return this.#message ?? liveOf(this.conversation) ?? lastOf(this.conversation);
  }

  get isLive() {
    return isLive(this.answer);
  }

  get isPaused() {
    return this.#handle?.state === "hidden";
  }

  save(options) {
    this.#savedAt = Date.now();
    this.store.save(this.conversation, options);
  }

  show(conversation) {
    if (this.isLive) this.save();
    this.#letGo();
    this.conversation = conversation;
    this.redraw();
    this.follow();
  }

  redraw() {
    this.transcript.show(this.conversation, this.store.settings.plain);
  }

  #letGo() {
    clearTimeout(this.#takingOver);
    this.#handle?.close();
    this.#handle = this.#message = this.#reattachedAt = null;
    this.announcer.clear();
  }

  /** Follow what is being answered, if anything is. */
  follow() {
    this.#letGo();
    const message = liveOf(this.conversation);
    if (!message) return this.onChange();
    this.#handle = follow(this.conversation, message, this.#listener(message));
    this.transcript.view(message).update();
    if (!this.#handle) return this.save(), this.onChange(); // it was given up
    this.#message = message;
    this.onChange();
  }

  #listener(message) {
    const view = () => this.transcript.view(message);
    const ours = (listen) => (told) => this.#message === message && listen(told);
    return {
      onText: ours(({ text, reasoning }) => {
        view().add(text, reasoning);
        if (text) this.announcer.add(text);
        if (view().root.classList.contains("waiting")) view().update();
        if (Date.now() - this.#savedAt > SAVE_MS) this.save();
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
  }

  #end(message) {
    this.#handle = this.#message = null;
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
    this.#takingOver = setTimeout(() => this.follow(), OTHER_TAB_MS);
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

  async stop() {
    this.status.say("Stopping …", "stopping");
    // Kept, so that a tab that is away just now finds the end, too.
    if (!this.#handle) return stop(this.conversation.id, { keep: true }).catch(() => {}); // another tab asks
    try {
      await this.#handle.stop({ keep: true });
    } catch {
      if (this.isLive) this.status.say("The server could not be told to stop. Try again", "retrying");
    }
  }
}
