import assert from "node:assert/strict";
import { test } from "node:test";
import { sentences, sentencesOf } from "../../../client/web/sentences.js";

async function* pieces(text, size) {
  for (let begin = 0; begin < text.length; begin += size) yield text.slice(begin, begin + size);
}

test("a text is cut where a voice may pause", () => {
  assert.deepEqual(sentences('Hello, Dr. Ames! "Is it 3.5?" Yes.\nFine…  …'), [
    "Hello, Dr. Ames!",
    '"Is it 3.5?"',
    "Yes.",
    "Fine…",
  ]);
});

test("however a text comes, its sentences are the same", async () => {
  const text = "One moment, please. It is 3.5 m, e.g. by J. R. Smith! Really?\nYes (I think so.) And so on, etc. Done";
  for (const size of [1, 2, 7, 1000])
    assert.deepEqual(await Array.fromAsync(sentencesOf(pieces(text, size))), sentences(text));
});

test("a sentence is told as soon as the next one has begun", async () => {
  const told = [];
  async function* text() {
    yield "Hello there. ";
    assert.deepEqual(told, []);
    yield "How";
    yield " are";
    assert.deepEqual(told, ["Hello there."]);
    yield " you?";
  }
  for await (const sentence of sentencesOf(text())) told.push(sentence);
  assert.deepEqual(told, ["Hello there.", "How are you?"]);
});
