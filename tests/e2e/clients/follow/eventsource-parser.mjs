// npm `eventsource-parser` only parses: asking again, and from where, is up to its user.
import { createParser } from "eventsource-parser";
import { tell } from "./tell.mjs";

let lastEventId = "";
let retryMs = 1000;
const parser = createParser({
  onId: (id) => (lastEventId = id),
  onRetry: (ms) => (retryMs = ms),
  onEvent: ({ id, data }) => tell({ id, data }),
});

// The end of a whole answer is the end; a connection that is lost makes the body throw.
async function readOn() {
  const headers = lastEventId ? { "Last-Event-ID": lastEventId } : {};
  const answer = await fetch(process.argv[2], { headers });
  if (answer.status === 200) {
    const decoder = new TextDecoder();
    for await (const bytes of answer.body) parser.feed(decoder.decode(bytes, { stream: true }));
  }
  return answer.status;
}

for (;;) {
  try {
    tell({ end: await readOn() });
    break;
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // fetch's way to tell a lost connection
    parser.reset(); // half an event is read again
    await new Promise((resolve) => setTimeout(resolve, retryMs));
  }
}
