// The chat page. What it knows of streams it knows from pyserve.js.

import { Announcer } from "./announcer.js";
import { follow } from "./answer.js";
import { lookup, newId, stop } from "./pyserve.js";
import { isLive, lastOf, merge, Store } from "./store.js";
import { nameOf, Transcript } from "./transcript.js";
import { describe, describeEnding, explain } from "./words.js";

const SAVE_MS = 1000;
const POLL_MS = 3000;
const HIDDEN_POLL_MS = 60_000; // well within the time that a finished stream is kept
const OTHER_TAB_MS = 10_000; // until an answer that another tab asked for is taken over
const DEMO_MODEL = "pyserve-demo";

const $ = (id) => document.getElementById(id);
const store = new Store(onOtherTab);
const transcript = new Transcript($("messages"), $("scroller"));
const announcer = new Announcer($("announcer"));

let conversation = blank(newId());
let handle = null; // follows the last answer of `conversation`
let model = null;
let reattachedAt = null;
let savedAt = 0;
let others = 0; // timer of an answer that another tab asked for
let again = 0; // timer of a retry that the server asked for
const finishing = new Set(); // other conversations whose rest is being fetched

function blank(id) {
  return { id, title: "", created: Date.now(), updated: Date.now(), messages: [] };
}

// --- the status line

function say(words, state) {
  $("status-line").dataset.state = state;
  document.body.dataset.state = state;
  if ($("status").textContent !== words) $("status").textContent = words;
}

let counting = 0;

/** The seconds until something, for the eye only: a screen reader hears the status once. */
function countDown(ms) {
  clearInterval(counting);
  const end = Date.now() + ms;
  const show = () => {
    const seconds = Math.ceil((end - Date.now()) / 1000);
    $("countdown").textContent = seconds > 0 ? `in ${seconds} s` : "";
    if (seconds <= 0) clearInterval(counting);
  };
  counting = setInterval(show, 250);
  show();
}

function showControls() {
  const last = lastOf(conversation);
  const live = isLive(last);
  $("stop").hidden = !live && !again;
  $("send").hidden = live || Boolean(again);
  $("retry").hidden = live || last?.role !== "assistant" || last.state === "completed" || !last.key;
  $("welcome").hidden = conversation.messages.length > 0;
  $("title").textContent = conversation.title || "New conversation";
  document.title = conversation.title ? `${conversation.title} – pyserve` : "pyserve";
  if (again) say(`${explain(last.reason, last.error)} Trying again`, "retrying");
  else if (!live && last?.role === "assistant") say(describeEnding(last), last.state);
  if (!last) say("", "idle");
  if (!live && !again) countDown(0);
}

function showList() {
  const items = store.list().map(({ id, title, live }) => {
    const link = document.createElement("a");
    const words = document.createElement("span");
    link.href = `#${encodeURIComponent(id)}`;
    words.textContent = title || "Untitled";
    if (id === conversation.id) link.setAttribute("aria-current", "page");
    const mark = document.createElement("span");
    mark.className = "spinner";
    mark.hidden = !live;
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", "is being answered");
    link.append(mark, words);
    const remove = document.createElement("button");
    remove.className = "icon remove";
    remove.textContent = "✕";
    remove.setAttribute("aria-label", `Delete ${title || "Untitled"}`);
    remove.addEventListener("click", () => (remove.dataset.sure ? removeConversation(id) : askAgain(remove)));
    const item = document.createElement("li");
    item.dataset.conversationId = id;
    item.dataset.live = live;
    item.append(link, remove);
    return item;
  });
  // Whoever is in the list with the keyboard stays where he is.
  const focused = document.activeElement?.closest?.("#conversations li")?.dataset.conversationId;
  $("conversations").replaceChildren(...items);
  if (focused) items.find((item) => item.dataset.conversationId === focused)?.firstChild.focus();
}

/** One press too many must not lose a conversation. */
function askAgain(button) {
  button.dataset.sure = "asked";
  button.textContent = "Delete?";
  setTimeout(() => {
    delete button.dataset.sure;
    button.textContent = "✕";
  }, 3000);
}

// --- following an answer

function save(options) {
  savedAt = Date.now();
  if (!store.save(conversation, options)) say("This browser's storage is full: delete a conversation", "failed");
}

/** Follow the last answer, if it isn't over. */
function followLast() {
  clearTimeout(others);
  handle?.close();
  handle = null;
  reattachedAt = null;
  announcer.clear();
  const message = lastOf(conversation);
  if (!isLive(message)) return showControls();
  const mine = conversation;
  const view = transcript.view(message);
  handle = follow(mine, message, {
    onText(text, reasoning) {
      view.add(text, reasoning);
      if (text) announcer.add(text);
      if (view.root.classList.contains("waiting")) view.update();
      if (Date.now() - savedAt > SAVE_MS) save();
    },
    onGap: (gap) => view.gap(gap),
    onState(status) {
      if (status.state === "reattached") reattachedAt = status.offset;
      view.update();
      const words = describe(status, reattachedAt);
      if (words) say(words, status.state);
      countDown(status.state === "retrying" ? status.delayMs : 0);
      if (["streaming", "reattached", "hidden"].includes(status.state)) save();
    },
    onEnd() {
      handle = null;
      save();
      settle(message);
    },
  });
  if (!handle) save();
  view.update();
  showControls();
  showList();
}

/** An answer of the shown conversation is over. */
function settle(message) {
  transcript.view(message).end();
  if (message.state === "completed") announcer.end();
  else announcer.clear();
  if (message.state === "failed" && message.reason === "model_loading")
    tryAgainIn((message.error?.retryAfter ?? 2) * 1000, message);
  const stored = store.load(conversation.id);
  if (message.state === "replaced" && lastOf(stored)?.attempt > message.attempt)
    return onOtherTab({ chat: conversation.id });
  showControls();
  showList();
}

/** The server said when to come back. */
function tryAgainIn(ms, message) {
  clearTimeout(again);
  again = setTimeout(() => {
    again = 0;
    if (lastOf(conversation) === message) retry();
  }, ms);
  countDown(ms);
}

function newAnswer(conflict) {
  return {
    role: "assistant",
    key: newId(),
    sentAt: Date.now(),
    model: model?.id ?? null,
    maxTokens: store.settings.maxTokens,
    conflict,
    state: "sent",
    reason: null,
    error: null,
    finish: null,
    epoch: null,
    offset: 0,
    text: "",
    reasoning: "",
    gaps: [],
  };
}

function send(text) {
  const isNew = conversation.messages.length === 0;
  if (isNew) conversation.title = text.trim().split("\n")[0].slice(0, 80);
  const question = { id: newId(), role: "user", text };
  const answer = { ...newAnswer("reject"), id: newId(), attempt: 0 };
  conversation.messages.push(question, answer);
  save({ isNew });
  history.replaceState(null, "", `#${encodeURIComponent(conversation.id)}`);
  transcript.add(question);
  transcript.add(answer);
  transcript.toEnd();
  followLast();
}

/** Ask once more for the last answer; the new one takes its place, in every tab. */
function retry() {
  clearTimeout(again);
  again = 0;
  const old = lastOf(conversation);
  if (old?.role !== "assistant" || isLive(old)) return;
  const answer = { ...newAnswer("replace"), id: old.id, attempt: old.attempt + 1 };
  conversation.messages[conversation.messages.length - 1] = answer;
  save();
  transcript.show(conversation, store.settings.plain);
  followLast();
}

async function stopAnswer() {
  if (again) {
    clearTimeout(again);
    again = 0;
    return showControls();
  }
  say("Stopping …", "stopping");
  if (!handle) return stop(conversation.id, { keep: true }).catch(() => {}); // another tab asks
  try {
    // Kept, so that a tab that is away just now finds the end, too.
    await handle.stop({ keep: true });
  } catch {
    if (isLive(lastOf(conversation))) say("The server could not be told to stop. Try again", "retrying");
  }
}

// --- conversations

/** The conversation that is shown is about to be another one. */
function leave() {
  clearTimeout(again);
  again = 0;
  if (isLive(lastOf(conversation))) save();
}

function open(id) {
  if (id === conversation.id && conversation.messages.length) return;
  leave();
  conversation = store.load(id) ?? blank(id);
  transcript.show(conversation, store.settings.plain);
  followLast();
  showList();
  closeSidebar();
  if (!conversation.messages.length) followForeign(id);
}

/** A stream that this browser did not start, such as one of curl's: it can be read all the same. */
async function followForeign(id) {
  const [found] = (await lookup([id]).catch(() => [])).filter((stream) => stream.conversation_id === id);
  if (!found || conversation.id !== id || conversation.messages.length) return;
  conversation.title = id;
  conversation.messages.push({ ...newAnswer(), key: null, model: null, id: newId(), attempt: 0 });
  save({ isNew: true });
  transcript.show(conversation, store.settings.plain);
  followLast();
}

function openNew() {
  history.pushState(null, "", location.pathname + location.search);
  handle?.close();
  leave();
  conversation = blank(newId());
  transcript.show(conversation, store.settings.plain);
  followLast();
  showList();
  closeSidebar();
  $("prompt").focus();
}

async function removeConversation(id) {
  const stored = store.load(id);
  store.remove(id);
  if (isLive(stored && lastOf(stored))) stop(id).catch(() => {});
  if (id === conversation.id) openNew();
  else showList();
  $("new").focus();
}

/** Another tab has written. It may have asked, stopped, retried or deleted. */
function onOtherTab({ chat, meta }) {
  if (meta) showList();
  if (chat !== conversation.id) return;
  const stored = store.load(chat);
  if (!stored) return conversation.messages.length && openNew();
  const mine = lastOf(conversation);
  const merged = merge(conversation, stored);
  const last = lastOf(merged);
  if (last === mine) return;
  const isSame = last.id === mine?.id && last.attempt === mine.attempt;
  // Both tabs follow it: what the other has saved, this one has read or is about to.
  if (isSame && handle && (isLive(last) || isReading(handle))) return;
  conversation = merged;
  transcript.show(conversation, store.settings.plain);
  if (last.state === "sent") awaitOther();
  else followLast();
}

const isReading = ({ state }) => state === "streaming" || state === "reattached";

/** The other tab's POST is on its way, and that tab will save what came of it; or it was closed. */
function awaitOther() {
  handle?.close();
  handle = null;
  showControls();
  say("Asked in another tab …", "connecting");
  others = setTimeout(followLast, OTHER_TAB_MS);
}

/** Which answers of other conversations are over? Their rest is fetched while it is kept. */
async function poll() {
  const isElsewhere = (id) => id !== conversation.id || handle?.state === "hidden";
  const live = store.list().filter(({ id, live }) => live && isElsewhere(id));
  const found = live.length && (await lookup(live.map(({ id }) => id)).catch(() => null));
  if (found) {
    const running = new Set(found.filter((one) => !one.is_done).map((one) => one.conversation_id));
    for (const { id } of live) if (!running.has(id)) finish(id);
  }
  setTimeout(poll, document.hidden ? HIDDEN_POLL_MS : POLL_MS);
}

/** Read the rest of an answer that is over at the server, or learn that it is gone. */
function finish(id) {
  if (id === conversation.id) return followLast(); // hidden: a new handle reads before it detaches
  const other = store.load(id);
  const message = other && lastOf(other);
  if (message?.state !== "streaming" || finishing.has(id)) return; // "sent" is another tab's
  const done = () => {
    finishing.delete(id);
    store.save(other);
    showList();
  };
  finishing.add(id);
  if (!follow(other, message, { onText() {}, onGap() {}, onState() {}, onEnd: done })) done();
}

// --- the model

async function loadModels() {
  let wait = 2000;
  for (;;) {
    try {
      const response = await fetch(new URL("v1/models", import.meta.url), { cache: "no-store" });
      if (response.status === 404) return ($("model").textContent = "no model");
      if (response.ok) return showModel((await response.json()).data?.[0]);
    } catch {
      // the server is away: it is asked again
    }
    $("model").textContent = "model not ready";
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(wait * 1.5, 15_000);
  }
}

function showModel(found) {
  model = found ?? null;
  $("model").textContent = model ? nameOf(model.id) : "no model";
  $("model").title = model?.id ?? "";
  $("demo").hidden = model?.id !== DEMO_MODEL;
  const { settings } = store;
  if (settings.isDemo === !$("demo").hidden) return;
  store.settings = { ...settings, isDemo: !$("demo").hidden };
}

// --- the page itself

function closeSidebar() {
  document.body.classList.remove("sidebar-open");
  $("shade").hidden = true;
  $("open-sidebar").setAttribute("aria-expanded", "false");
}

function openSidebar() {
  document.body.classList.add("sidebar-open");
  $("shade").hidden = false;
  $("open-sidebar").setAttribute("aria-expanded", "true");
  $("close-sidebar").focus();
}

function fitPrompt() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 200)}px`;
}

function submitPrompt() {
  const text = $("prompt").value;
  if (!text.trim() || isLive(lastOf(conversation)) || again) return;
  $("prompt").value = "";
  fitPrompt();
  send(text);
}

function onOptions() {
  const limit = $("max-tokens").valueAsNumber;
  const plain = $("plain").checked;
  const wasPlain = store.settings.plain;
  store.settings = { ...store.settings, plain, maxTokens: limit >= 1 ? Math.floor(limit) : null };
  if (plain === wasPlain) return;
  save();
  transcript.show(conversation, plain);
  if (isLive(lastOf(conversation))) followLast();
}

function bind() {
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // what stands behind # in the address is a conversation
    $("prompt").focus();
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submitPrompt();
  });
  $("prompt").addEventListener("input", fitPrompt);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submitPrompt();
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (document.body.classList.contains("sidebar-open")) {
      closeSidebar();
      $("open-sidebar").focus();
    } else if ($("options").open) {
      $("options").open = false;
      $("options").firstElementChild.focus();
    } else if (isLive(lastOf(conversation)) || again) stopAnswer();
  });
  $("stop").addEventListener("click", () => {
    stopAnswer();
    $("prompt").focus();
  });
  $("retry").addEventListener("click", () => {
    retry();
    $("prompt").focus();
  });
  $("new").addEventListener("click", openNew);
  $("open-sidebar").addEventListener("click", openSidebar);
  $("close-sidebar").addEventListener("click", () => {
    closeSidebar();
    $("open-sidebar").focus();
  });
  $("shade").addEventListener("click", closeSidebar);
  $("options-form").addEventListener("change", onOptions);
  $("options-form").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("click", ({ target }) => {
    if (!$("options").contains(target)) $("options").open = false;
  });
  addEventListener("hashchange", () => open(idInUrl() ?? newId()));
  addEventListener("pagehide", () => isLive(lastOf(conversation)) && save());
}

function idInUrl() {
  try {
    return decodeURIComponent(location.hash.slice(1)) || null;
  } catch {
    return null;
  }
}

const { plain, maxTokens, isDemo } = store.settings;
$("demo").hidden = !isDemo; // as it was last: nothing shall move when the server says so
$("plain").checked = plain;
$("max-tokens").value = maxTokens ?? "";
bind();
open(idInUrl() ?? newId());
loadModels();
setTimeout(poll, 0);
