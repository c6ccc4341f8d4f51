// One answer: asked for, or taken up again, and put together from its events.

import { attach, submit } from "./pyserve.js";
import { isLive } from "./store.js";

const UNANSWERED = ["stall", "connection_lost"];

/**
 * The request, the same bytes in every tab and after every reload, as its key demands. Questions
 * that were never answered are left out: many models want question and answer by turns.
 */
function requestFor(conversation, message) {
  const all = conversation.messages.slice(0, conversation.messages.indexOf(message));
  const before = all.filter((one, i) => one.role !== "user" || !all[i + 1] || all[i + 1].text);
  return {
    ...(message.model && { model: message.model }),
    ...(message.maxTokens && { max_tokens: message.maxTokens }),
    messages: before.filter(({ text }) => text).map(({ role, text }) => ({ role, content: text })),
  };
}

/** What an event of an OpenAI chat stream adds. */
function parse(data) {
  if (data === "[DONE]") return {};
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    return {};
  }
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  return {
    text: delta.content ?? choice?.text ?? "",
    reasoning: delta.reasoning_content ?? delta.reasoning ?? "",
    finish: choice?.finish_reason,
    error: chunk.error,
  };
}

/**
 * Follow the answer `message` to its end, and keep `message` up to date.
 *
 * @param {{ onText(added: { text: string, reasoning: string }): void, onGap(gap: object): void,
 *     onState(status: object): void, onEnd(): void }} listener
 * @returns pyserve.js's handle
 */
export function follow(conversation, message, listener) {
  const onEvent = ({ data, epoch, offset }) => {
    const { text = "", reasoning = "", finish, error } = parse(data);
    message.text += text;
    message.reasoning += reasoning;
    message.finish = finish ?? message.finish;
    if (error) message.error = { message: error.message, details: error };
    Object.assign(message, { epoch, offset, state: "streaming" });
    if (text || reasoning) listener.onText({ text, reasoning });
  };
  const onState = (status) => {
    if (status.state === "gap") {
      const gap = { at: message.text.length, bytes: status.firstOffset - status.lostFrom };
      message.gaps.push(gap);
      listener.onGap(gap);
    }
    if (handle.epoch && isLive(message))
      Object.assign(message, { epoch: handle.epoch, offset: handle.offset, state: "streaming" });
    // A POST that was refused has begun nothing: its key is as good as new.
    if (status.state === "retrying" && message.state === "sent" && !UNANSWERED.includes(status.why))
      message.sentAt = Date.now();
    listener.onState(status);
  };
  const handle = begin(conversation, message, { onEvent, onState });
  handle.done.then(({ state, reason, error }) => {
    if (state === "closed") return;
    Object.assign(message, { state, reason });
    if (error) message.error = { message: error.message, status: error.status, details: error.details };
    listener.onEnd();
  });
  return handle;
}

function begin(conversation, message, listeners) {
  if (message.epoch) return attach(conversation.id, { from: `${message.epoch}-${message.offset}`, ...listeners });
  if (!message.key) return attach(conversation.id, listeners); // somebody else's: only followed
  return submit(requestFor(conversation, message), {
    conversationId: conversation.id,
    idempotencyKey: message.key,
    conflict: message.conflict,
    ...listeners,
  });
}
