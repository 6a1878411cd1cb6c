#!/usr/bin/env bash
# fetch of Node 20.20.2 (undici 6.24.1 in it), and of undici 7.16.0.
#
# A chunked answer (RFC 9112, 7.1) is cut: the connection closes before the last chunk.
# RFC 9112, section 8: such an answer is incomplete, whatever `Connection` says.
# Guess before looking: the body rejects, with and without `Connection: close`.
# Seen: without it "TypeError: terminated"; with `Connection: close` the body ends as if all
# had come: the header makes undici take the end of the connection for that of the answer.
# So a server of event streams must not send `Connection: close` with a chunked stream, or
# programs on Node take the fragment of an answer for the whole.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
npm install --silent --no-audit --no-fund --prefix "$folder" node@20.20.2 undici@7.16.0
cat > "$folder/look.mjs" <<'END'
import assert from "node:assert";
import net from "node:net";
import { fetch as newer } from "undici";

const event = "data: one\n\n";
const listen = (more) =>
  new Promise((resolve) => {
    const server = net.createServer((socket) => {
      socket.on("error", () => {});
      socket.once("data", () => {
        socket.write(
          "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" +
            `Transfer-Encoding: chunked\r\n${more}\r\n`,
        );
        socket.end(`${event.length.toString(16)}\r\n${event}\r\n`);
      });
    });
    server.listen(0, "127.0.0.1", () => resolve(server));
  });

const seen = async (get, more) => {
  const server = await listen(more);
  try {
    const answer = await get(`http://127.0.0.1:${server.address().port}/`);
    return `ended, ${JSON.stringify(await answer.text())}`;
  } catch (error) {
    return `${error.name}: ${error.message}`;
  } finally {
    server.close();
  }
};

for (const [name, get] of [["Node's fetch", fetch], ["undici's fetch", newer]]) {
  const kept = await seen(get, "");
  const closed = await seen(get, "Connection: close\r\n");
  console.log(`${name}: ${kept}; with Connection: close: ${closed}`);
  assert.equal(kept, "TypeError: terminated");
  assert.equal(closed, 'ended, "data: one\\n\\n"');
}
END
cd "$folder"
node_modules/.bin/node look.mjs
