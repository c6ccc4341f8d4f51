// Decodes logs with eventsource-parser: stdin holds a JSON array of logs, each an array of base64
// chunks; stdout gets, for each log, its events as [name, data, id].
import { createParser } from "eventsource-parser";

let input = "";
for await (const text of process.stdin) input += text;

const decoded = JSON.parse(input).map((chunks) => {
  const events = [];
  const parser = createParser({
    onEvent: ({ event, data, id }) => events.push([event ?? null, data, id ?? null]),
  });
  const utf8 = new TextDecoder("utf-8", { fatal: true });
  for (const chunk of chunks) {
    parser.feed(utf8.decode(Buffer.from(chunk, "base64"), { stream: true }));
  }
  return events;
});
process.stdout.write(JSON.stringify(decoded));
