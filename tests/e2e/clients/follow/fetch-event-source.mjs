// npm `@microsoft/fetch-event-source`: retries for ever, after a 204 or a 404 too, unless onopen
// says what is final and onerror passes that on.
import { tell } from "./tell.mjs";

// Made for browsers: this is all it uses of one. Node resolves its CommonJS half.
globalThis.window = globalThis;
globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} };
const { fetchEventSource } = await import("@microsoft/fetch-event-source");

class Final extends Error {}
let status;

const options = {
  async onopen(response) {
    status = response.status;
    if (status === 204 || (status >= 400 && status < 500)) throw new Final();
    if (status !== 200) throw new Error(`status ${status}`); // try again
  },
  onmessage: ({ id, data }) => tell({ id, data }),
  onerror(error) {
    if (error instanceof Final) throw error;
  },
};
if (process.argv[3] === "defaults") {
  // What it does without being told: for the test that the recipe above is needed.
  options.onopen = undefined;
  options.onerror = (error) => tell({ retried: error.message });
}
try {
  await fetchEventSource(process.argv[2], options);
} catch (error) {
  if (!(error instanceof Final)) throw error;
}
tell({ end: status });
