/** Who answers: a script, or a language model. Both yield sentences. */

import { sentences, sentencesOf } from "./sentences.js";
import { TalksplatError } from "./triton.js";

/** @typedef {{role: "user" | "assistant", content: string}} Message */
/**
 * The first rule whose regular expression `hears` matches answers; the last one matches all, and its last sentence says
 * that this is a script.
 * @typedef {{hears: string, says: string}} Rule
 */
/** @typedef {{answer: (messages: Message[], signal: AbortSignal) => AsyncGenerator<string>}} Responder */

const PROMPT =
  "You are a friendly talking avatar. What you write is spoken aloud: answer in one to three short sentences, " +
  "in plain words, without lists, markup or emoji.";

/**
 * @param {Rule[]} rules
 * @returns {Responder}
 */
export function script(rules) {
  return {
    async *answer(messages) {
      const text = messages.at(-1)?.content ?? "";
      const says = rules.find(({ hears }) => new RegExp(hears, "i").test(text))?.says ?? "";
      yield* sentences(says);
      const first = !messages.some(({ role }) => role === "assistant");
      if (first && !/\bscript\b/i.test(says)) yield* sentences(rules.at(-1)?.says ?? "").slice(-1); // says that it is one
    },
  };
}

/**
 * Any endpoint of OpenAI's kind.
 * @param {{url: string, model: string, key: string}} settings `url` as it is given to OpenAI's client: before /chat/completions
 * @returns {Responder}
 */
export function languageModel({ url, model, key }) {
  return { answer: (messages, signal) => sentencesOf(deltas(messages, signal)) };

  /**
   * @param {Message[]} messages
   * @param {AbortSignal} signal
   */
  async function* deltas(messages, signal) {
    const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
    const body = JSON.stringify({ model, stream: true, messages: [{ role: "system", content: PROMPT }, ...messages] });
    const address = `${url.replace(/\/+$/, "")}/chat/completions`;
    let response;
    try {
      response = await fetch(address, { method: "POST", headers, body, signal });
    } catch (error) {
      signal.throwIfAborted();
      throw new TalksplatError("failed", `The language model at ${url} can't be reached from this page (${error}).`);
    }
    if (!response.ok || !response.body) {
      const said = (await response.text()).slice(0, 200);
      throw new TalksplatError("failed", `The language model answered ${response.status}: ${said}`);
    }
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      let content;
      try {
        content = JSON.parse(data).choices?.[0]?.delta?.content;
      } catch {
        throw new TalksplatError("failed", `The language model's answer is no event stream of OpenAI's kind: ${data}`);
      }
      if (content) yield String(content);
    }
  }
}

/**
 * The data of server-sent events.
 * @param {ReadableStream<Uint8Array<ArrayBuffer>>} body
 */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? (done ? "\n" : ""))).split(/\r?\n/);
      rest = lines.pop() ?? "";
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
      if (done) return;
    }
  } finally {
    await reader.cancel();
  }
}
