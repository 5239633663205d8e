// Follows one task with npm's `eventsource`, and prints what it is given: one JSON text per line.
//
//     node follow.mjs URL EVENT…
//
// It never closes the stream itself: it ends when the server's answer makes the EventSource give up.

import { EventSource } from "eventsource";

const [url, ...names] = process.argv.slice(2);
const source = new EventSource(url);

const print = (value) => process.stdout.write(`${JSON.stringify(value)}\n`);

for (const name of names) {
  source.addEventListener(name, ({ type, data, lastEventId }) => print({ type, id: lastEventId, data }));
}
source.addEventListener("error", ({ code, message, data }) => {
  if (data === undefined) print({ trouble: message ?? "", code: code ?? 0, closed: source.readyState === 2 });
});
