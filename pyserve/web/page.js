// The chat page. What it knows of streams it knows from pyserve.js.

import { Announcer } from "./announcer.js";
import { follow } from "./answer.js";
import { blank, Following, newAnswer } from "./following.js";
import { showList } from "./list.js";
import { lookup, newId } from "./pyserve.js";
import { StatusLine } from "./status.js";
import { isId, isOverdue, lastOf, liveOf, settle, Store } from "./store.js";
import { nameOf, Transcript } from "./transcript.js";
import { describeEnding, TROUBLES } from "./words.js";

const POLL_MS = 3000;
const HIDDEN_POLL_MS = 60_000; // well within the time that a finished stream is kept
const MODELS_MS = 10_000; // until the server has named its models
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
  onReturn: loadModels,
});
const finishing = new Set(); // other conversations whose rest is being fetched
let isLoadingModels = false;

// --- what is shown

function showState() {
  const { answer, conversation, isLive } = following;
  const last = lastOf(conversation);
  const focused = document.activeElement;
  $("stop").hidden = !isLive;
  $("send").hidden = isLive;
  $("retry").hidden = isLive || last?.role !== "assistant" || last.state === "completed" || !last.key;
  if (focused?.hidden) $("prompt").focus(); // or it would be nowhere
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
  if (stored && liveOf(stored)) following.stopFor(id);
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
  const live = store.list().filter(({ id, live }) => live && !following.hears(id));
  const found = live.length && (await lookup(live.map(({ id }) => id)).catch(() => null));
  if (found) {
    const running = new Set(found.filter((one) => !one.is_done).map((one) => one.conversation_id));
    for (const { id } of live) if (!running.has(id)) finish(id, found);
  }
  setTimeout(poll, document.hidden ? HIDDEN_POLL_MS : POLL_MS);
}

/** Read the rest of an answer that is over at the server, or learn that it is gone. */
function finish(id, found) {
  if (id === following.conversation.id) return following.follow(); // a new handle reads before it detaches
  const other = store.load(id);
  const message = other && liveOf(other);
  if (!message || finishing.has(id)) return;
  const done = () => {
    finishing.delete(id);
    store.save(other);
    showConversations();
  };
  if (isOverdue(message)) settle(other, message, found);
  if (message.state === "failed") return done();
  if (message.state !== "streaming") return; // another tab's
  finishing.add(id);
  follow(other, message, { onText() {}, onGap() {}, onState() {}, onEnd: done });
}

// --- the model

/** At first, and whenever it may be another server's. */
async function loadModels() {
  if (isLoadingModels) return;
  isLoadingModels = true;
  showModel(await firstModel());
  isLoadingModels = false;
}

/** As soon as the server tells; null if there is none. */
async function firstModel() {
  let wait = 2000;
  for (;;) {
    try {
      const response = await fetch(new URL("v1/models", import.meta.url), {
        cache: "no-store",
        signal: AbortSignal.timeout(MODELS_MS),
      });
      if (response.status === 404) return null;
      if (response.ok) return (await response.json()).data?.[0];
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

/** What is typed is there again after a reload. */
function onInput() {
  fitPrompt();
  store.draft = $("prompt").value;
}

function submitPrompt() {
  const text = $("prompt").value;
  if (!text.trim() || following.isLive) return;
  $("prompt").value = "";
  onInput();
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
  $("prompt").addEventListener("input", onInput);
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
  // Esc within an input method's composition is the method's.
  addEventListener("keydown", ({ key, isComposing }) => key === "Escape" && !isComposing && onEscape());
  $("new").addEventListener("click", openNew);
  $("open-sidebar").addEventListener("click", openSidebar);
  $("close-sidebar").addEventListener("click", () => {
    closeSidebar();
    $("open-sidebar").focus();
  });
  $("shade").addEventListener("click", closeSidebar);
  // The conversation that is shown is in the list, too; choosing it changes no address.
  $("conversations").addEventListener("click", ({ target }) => target.closest("a") && closeSidebar());
  $("options-form").addEventListener("change", onOptions);
  $("options-form").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("click", ({ target }) => {
    if (!$("options").contains(target)) $("options").open = false;
  });
  addEventListener("hashchange", () => open(idInUrl() ?? newId()));
  document.addEventListener("visibilitychange", () => document.hidden || loadModels());
  addEventListener("pagehide", () => following.saveLive());
}

/** Null, too, for what the server would not take. */
function idInUrl() {
  try {
    const id = decodeURIComponent(location.hash.slice(1));
    return isId(id) ? id : null;
  } catch {
    return null;
  }
}

const { plain, maxTokens, isDemo } = store.settings;
$("demo").hidden = !isDemo; // as it was last: nothing shall move when the server says so
$("plain").checked = plain;
$("max-tokens").value = maxTokens ?? "";
$("prompt").value = store.draft;
fitPrompt();
bind();
open(idInUrl() ?? newId());
loadModels();
setTimeout(poll, 0);
