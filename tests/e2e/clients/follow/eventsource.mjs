// npm `eventsource`: reconnects by itself, with Last-Event-ID, until an answer isn't 200.
import { EventSource } from "eventsource";
import { tell } from "./tell.mjs";

// While it waits to reconnect it does not keep Node alive.
const awake = setInterval(() => {}, 60_000);
const source = new EventSource(process.argv[2]);
source.onmessage = (event) => tell({ id: event.lastEventId, data: event.data });
source.onerror = (error) => {
  if (source.readyState !== EventSource.CLOSED) return; // it tries again
  clearInterval(awake);
  tell({ end: error.code });
};
