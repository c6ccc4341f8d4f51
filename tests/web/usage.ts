// What others write against pyserve.d.ts: it is compiled, never run.
import { attach, createClient, lookup, PyserveError, stop, streamUrl, submit } from "../../pyserve/web/pyserve.js";
import type { Ending, Handle, Status, StreamInfo } from "../../pyserve/web/pyserve.js";

const client = createClient({
  base: new URL("https://example.org/llm/"),
  authorize: async (request) => {
    request.headers.set("Authorization", "Bearer key");
    request.url.searchParams.set("token", "token");
  },
  hiddenMs: Infinity,
});

const handle: Handle = client.submit(
  { messages: [{ role: "user", content: "Hi" }] },
  { conversationId: "a/b::model", conflict: "reject", onEvent: (event) => JSON.parse(event.data).choices },
);
const ending: Ending = await handle.done;
if (ending.error instanceof PyserveError && ending.error.status === 503) ending.error.retryAfter?.toFixed();

function words(status: Status): string {
  switch (status.state) {
    case "retrying":
      return `${status.why} ${status.delayMs}`;
    case "gap":
      return `${status.firstOffset - status.lostFrom} bytes`;
    case "reattached":
      return `${status.offset}`;
    default:
      return status.state;
  }
}
const controller = new AbortController();
attach("id", { from: "earliest", onState: (status) => words(status), signal: controller.signal }).close();
attach("id", { from: handle.lastEventId ?? 0 });
await handle.stop({ keep: true });
const stopped: boolean = await stop("id", { epoch: "abc" });
const found: StreamInfo[] = await lookup(["id"]);
new EventSource(streamUrl("id", "earliest"));
submit({}).close();
void [stopped, found];

// @ts-expect-error: a conversation id is a string
attach(7);
// @ts-expect-error: there is no such mode
submit({}, { conflict: "ignore" });
// @ts-expect-error: submit begins at the start
submit({}, { from: 5 });
