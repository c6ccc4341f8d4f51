// The chat page. What it knows of streams it knows from pyserve.js.

import { Announcer } from "./announcer.js";
import { follow } from "./answer.js";
import { blank, Following, newAnswer } from "./following.js";
import { showList } from "./list.js";
import { lookup, newId, stop } from "./pyserve.js";
import { StatusLine } from "./status.js";
import { giveUpIfLost, lastOf, liveOf, Store } from "./store.js";
import { nameOf, Transcript } from "./transcript.js";
import { describeEnding, TROUBLES } from "./words.js";

const POLL_MS = 3000;
const HIDDEN_POLL_MS = 60_000; // well within the time that a finished stream is kept
const DEMO_MODEL = "pyserve-demo";

const $ = (id) => document.getElementById(id);
const store = new Store(onOtherTab, onTrouble);
const status = new StatusLine($);
const following = new Following({
  store,
  status,
  transcript: new Transcript($("messages"), $("scroller")),
  announcer: new Announcer($("announcer")),
  onChange: showState,
});
const finishing = new Set(); // other conversations whose rest is being fetched

// --- what is shown

function showState() {
  const { answer, conversation, isLive } = following;
  const last = lastOf(conversation);
  $("stop").hidden = !isLive;
  $("send").hidden = isLive;
  $("retry").hidden = isLive || last?.role !== "assistant" || last.state === "completed" || !last.key;
  $("welcome").hidden = conversation.messages.length > 0;
  $("title").textContent = conversation.title || "New conversation";
  document.title = conversation.title ? `${conversation.title} – pyserve` : "pyserve";
  if (!isLive) {
    status.countDown(0);
    if (answer?.role === "assistant") status.say(describeEnding(answer), answer.state);
    else status.say("", "idle");
  }
  showConversations();
}

function showConversations() {
  showList($("conversations"), store.list(), following.conversation.id, removeConversation);
}

/** This browser does not keep what it is given. */
function onTrouble(trouble) {
  $("trouble").hidden = !trouble;
  const words = TROUBLES[trouble] ?? "";
  if ($("trouble").textContent !== words) $("trouble").textContent = words;
}

// --- conversations

function open(id) {
  if (id === following.conversation.id && following.conversation.messages.length) return;
  following.show(store.load(id) ?? blank(id));
  closeSidebar();
  if (!following.conversation.messages.length) followForeign(id);
}

/** A stream that this browser did not start, such as one of curl's: it can be read all the same. */
async function followForeign(id) {
  const [found] = (await lookup([id]).catch(() => [])).filter((stream) => stream.conversation_id === id);
  const { conversation } = following;
  if (!found || conversation.id !== id || conversation.messages.length) return;
  conversation.title = id;
  conversation.messages.push(newAnswer({ id: `of ${id}`, key: null })); // in each tab the same
  following.save({ isNew: true });
  following.redraw();
  following.follow();
}

function openNew() {
  history.pushState(null, "", location.pathname + location.search);
  following.show(blank(newId()));
  closeSidebar();
  $("prompt").focus();
}

async function removeConversation(id) {
  const stored = store.load(id);
  store.remove(id);
  if (stored && liveOf(stored)) stop(id).catch(() => {});
  if (id === following.conversation.id) openNew();
  else showConversations();
  $("new").focus();
}

/** Another tab has written. It may have asked, stopped, retried or deleted. */
function onOtherTab({ chat, meta }) {
  if (meta) showConversations();
  if (chat !== following.conversation.id) return;
  const stored = store.load(chat);
  if (stored) following.takeIn(stored);
  else if (following.conversation.messages.length) openNew();
}

/** Which answers of other conversations are over? Their rest is fetched while it is kept. */
async function poll() {
  const isElsewhere = (id) => id !== following.conversation.id || following.isPaused;
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
  if (id === following.conversation.id) return following.follow(); // a new handle reads before it detaches
  const other = store.load(id);
  const message = other && liveOf(other);
  if (!message || finishing.has(id)) return;
  const done = () => {
    finishing.delete(id);
    store.save(other);
    showConversations();
  };
  if (giveUpIfLost(message)) return done();
  if (message.state !== "streaming") return; // another tab's
  finishing.add(id);
  follow(other, message, { onText() {}, onGap() {}, onState() {}, onEnd: done });
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

function showModel(model) {
  $("model").textContent = model ? nameOf(model.id) : "no model";
  $("model").title = model?.id ?? "";
  $("demo").hidden = model?.id !== DEMO_MODEL;
  const { settings } = store;
  if (settings.isDemo === !$("demo").hidden) return;
  store.settings = { ...settings, isDemo: !$("demo").hidden };
}

/** What a question is asked with. */
const options = () => ({ model: $("model").title || null, maxTokens: store.settings.maxTokens });

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
  if (!text.trim() || following.isLive) return;
  $("prompt").value = "";
  fitPrompt();
  history.replaceState(null, "", `#${encodeURIComponent(following.conversation.id)}`);
  following.ask(text, options());
}

function onOptions() {
  const limit = $("max-tokens").valueAsNumber;
  const plain = $("plain").checked;
  const wasPlain = store.settings.plain;
  store.settings = { ...store.settings, plain, maxTokens: limit >= 1 ? Math.floor(limit) : null };
  if (plain !== wasPlain) following.redraw();
}

function bindComposer() {
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
  $("stop").addEventListener("click", () => {
    following.stop();
    $("prompt").focus();
  });
  $("retry").addEventListener("click", () => {
    following.retry(options());
    $("prompt").focus();
  });
}

function onEscape() {
  if (document.body.classList.contains("sidebar-open")) {
    closeSidebar();
    $("open-sidebar").focus();
  } else if ($("options").open) {
    $("options").open = false;
    $("options").firstElementChild.focus();
  } else if (following.isLive) following.stop();
}

function bind() {
  bindComposer();
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // what stands behind # in the address is a conversation
    $("prompt").focus();
  });
  addEventListener("keydown", ({ key }) => key === "Escape" && onEscape());
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
  addEventListener("pagehide", () => following.isLive && following.save());
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
