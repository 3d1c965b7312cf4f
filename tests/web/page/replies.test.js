import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { test } from "node:test";
import { languageModel, script } from "../../../client/web/replies.js";

const agreed = new URL("../../../client/talksplat_client/conversation.json", import.meta.url);
const { script: rules } = JSON.parse(await readFile(agreed, "utf8"));
const signal = new AbortController().signal;
const user = content => ({ role: "user", content });

function answered(responder, ...messages) {
  return Array.fromAsync(responder.answer(messages, signal));
}

test("the script answers whatever it hears, and says that it is one at first", async () => {
  for (const text of ["Hello.", "A large coffee, please!", "Thank you.", "The weather is fine.", ""]) {
    const said = await answered(script(rules), user(text));
    assert.match(said.join(" "), /\bscript\b/);
  }
});

test("later the script just answers", async () => {
  const said = await answered(script(rules), user("Hello"), { role: "assistant", content: "Hello!" }, user("Thanks"));
  assert.deepEqual(said, ["You are welcome."]);
});

/** An endpoint of OpenAI's kind. */
async function serving(respond, use) {
  const server = createServer(async (request, response) => {
    const body = JSON.parse(Buffer.concat(await Array.fromAsync(request)).toString());
    await respond(request, response, body);
  });
  await new Promise(resolve => server.listen(0, "127.0.0.1", resolve));
  try {
    await use(`http://127.0.0.1:${server.address().port}/v1`);
  } finally {
    server.closeAllConnections();
    server.close();
  }
}

test("a language model's answer is told sentence by sentence, while it still comes", () => {
  let heard = () => {};
  const first = new Promise(resolve => {
    heard = resolve;
  });
  return serving(
    async (request, response, body) => {
      assert.equal(request.url, "/v1/chat/completions");
      assert.equal(request.headers.authorization, "Bearer secret");
      assert.equal(body.model, "small");
      assert.equal(body.stream, true);
      assert.deepEqual(body.messages.at(-1), user("Hi"));
      const send = content => response.write(`data: ${JSON.stringify({ choices: [{ delta: { content } }] })}\r\n\r\n`);
      response.writeHead(200, { "content-type": "text/event-stream" });
      send("Hello the");
      send("re. How");
      send(" are");
      await first; // the rest comes once the first sentence was heard
      response.write('data: {"choices":[]}\n\n: a comment\n\n');
      send(" you?");
      response.end("data: [DONE]\n\n");
    },
    async url => {
      const said = [];
      const responder = languageModel({ url: `${url}/`, model: "small", key: "secret" });
      for await (const sentence of responder.answer([user("Hi")], signal)) {
        said.push(sentence);
        heard();
      }
      assert.deepEqual(said, ["Hello there.", "How are you?"]);
    },
  );
});

test("what is wrong with a language model is said", async () => {
  await serving(
    (_, response) => response.writeHead(404).end("no such model"),
    url =>
      assert.rejects(answered(languageModel({ url, model: "x", key: "" }), user("Hi")), /answered 404: no such model/),
  );
  await serving(
    (_, response) => response.end("data: <html>\n"),
    url => assert.rejects(answered(languageModel({ url, model: "x", key: "" }), user("Hi")), /no event stream/),
  );
  const nowhere = languageModel({ url: "http://127.0.0.1:9", model: "x", key: "" });
  await assert.rejects(answered(nowhere, user("Hi")), /can't be reached/);
});
