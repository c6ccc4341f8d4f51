// What happens, in words.

const REASONS = {
  upstream_unreachable: "The server cannot reach the model's server. Is it running?",
  upstream_invalid: "The model's server gave an answer that makes no sense.",
  upstream_auth: "The model's server refused this server's key.",
  upstream_error: "The model's server reported an error.",
  upstream_not_sse: "The model's server did not answer with a stream.",
  upstream_lost: "The connection between the server and the model was lost.",
  upstream_timeout: "The model was silent for too long.",
  model_loading: "The model is still loading.",
  context_overflow: "The conversation is too long for the model's context. Begin a new one.",
  memory_budget: "The server has no memory left for another stream.",
  session_active: "This conversation is already being answered. Retry takes its place.",
  shutdown: "The server was shut down.",
  event_too_large: "A single piece of the answer was larger than the server may keep.",
  body_too_large: "The conversation is larger than the server takes.",
  authorize: "This page could not get its permission.",
  http_404: "The server has no such route: it may have no model.",
  not_found: "This server has no model to ask.",
  http_429: "Too many requests. Wait a little.",
  http_502: "A proxy could not reach the server.",
  http_503: "The server, or a proxy before it, is not available.",
  http_504: "A proxy did not wait long enough for the server.",
  http_401: "You are not logged in.",
  http_403: "You are not allowed to.",
  http_413: "The conversation is larger than a proxy takes.",
  not_event_stream: "The answer was not a stream.",
  unsure: "The page was closed before the server had answered, so it is not known whether the question arrived.",
};

/** What is wrong with this browser's storage. */
export const TROUBLES = {
  full: "This browser keeps nothing: its storage is full. Delete a conversation, or what is new here is lost with this tab.",
  denied: "This browser keeps nothing: it denies this page its storage. What is here is lost with this tab.",
};

const PASSING = {
  stall: "The connection went silent.",
  connection_lost: "Lost the connection.",
};

const number = (value) => value.toLocaleString("en");

/** Why something failed: our own words for what is known, and the server's, if they say more. */
export function explain(reason, error) {
  const known = REASONS[reason];
  const { n_prompt_tokens: tokens, n_ctx: context } = error?.details ?? {};
  if (reason === "context_overflow" && tokens && context)
    return `The conversation has ${number(tokens)} tokens, the model's context holds ${number(context)}. Begin a new one.`;
  const generic = !known || ["upstream_error"].includes(reason);
  if (generic && error?.message) return `${known ? `${known} ` : ""}${error.message}`;
  return known ?? `Reason: ${reason}.`;
}

/** The status line for what pyserve.js tells. `before` is the offset of the last reattach, if any. */
export function describe(status, before) {
  switch (status.state) {
    case "connecting":
      return status.attempt > 0 ? "Lost the connection. Trying again …" : "Connecting …";
    case "reattached":
      return `Streaming, reattached at byte ${number(status.offset)}`;
    case "streaming":
      return before ? `Streaming, reattached at byte ${number(before)}` : "Streaming";
    case "retrying":
      return `${PASSING[status.why] ?? REASONS[status.why] ?? "Lost the connection."} Trying again`;
    case "hidden":
      return "Paused while this tab is hidden; the server goes on";
    case "gap":
      return `${number(status.firstOffset - status.lostFrom)} bytes were no longer kept; going on behind them`;
    default:
      return "";
  }
}

/** The status line for an answer that is over. */
export function describeEnding(message) {
  switch (message.state) {
    case "completed":
      if (message.error) return `Ended with an error. ${explain(message.reason, message.error)}`;
      if (message.finish === "length") return "Complete: it reached the limit of tokens";
      return message.reason === "unterminated" ? "Complete, as far as the model's server told" : "Complete";
    case "cancelled":
      return "Stopped";
    case "failed":
      return `Failed. ${explain(message.reason, message.error)}`;
    case "gone":
      return "The server no longer has this answer: it was restarted, or the answer ended too long ago. What had arrived is kept.";
    case "replaced":
      return "A newer answer took this one's place";
    default:
      return "";
  }
}
