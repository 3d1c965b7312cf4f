/** What the page asks of the models, besides frames. */

import { floats, integer, string, TalksplatError } from "./triton.js";

/** @import { Triton } from "./triton.js" */

const LONG = 60; // seconds that a transcript or a preload may take
const PROMPT = { timeout: 2, recovery: 2 }; // seconds: what was said two seconds ago interrupts nobody

/**
 * The avatars that this viewer may use.
 * @param {Triton} triton
 * @returns {Promise<{id: string, loaded: boolean}[]>}
 */
export async function avatars(triton) {
  return (await operation(triton, "list", "")).avatars;
}

/**
 * Have an avatar ready; tells which model animates it.
 * @param {Triton} triton
 * @param {string} avatar
 * @returns {Promise<{model: string, width: number, height: number, milliseconds: number}>}
 */
export function preload(triton, avatar) {
  return operation(triton, "preload", avatar);
}

/**
 * @param {Triton} triton
 * @param {string} name
 * @param {string} avatar
 */
async function operation(triton, name, avatar) {
  const inputs = [string("AVATAR", avatar, [1, 1])];
  const request = { what: name, inputs, outputs: ["REPORT"], parameters: { operation: name } };
  const answer = await triton.infer("rasterizer", request, { timeout: LONG });
  return JSON.parse(answer.text("REPORT"));
}

/**
 * Probability of speech in each of the latest frames.
 * @param {Triton} triton
 * @param {Float32Array} window that ends now
 * @param {AbortSignal} signal
 */
export async function detectSpeech(triton, window, signal) {
  const request = { what: "vad", inputs: [floats("AUDIO", window, [1, window.length])], outputs: ["LATEST"] };
  return (await triton.infer("vad", request, { ...PROMPT, signal })).floats("LATEST");
}

/**
 * The text of an utterance.
 * @param {Triton} triton
 * @param {Float32Array} samples no more than one request takes
 * @param {AbortSignal} signal
 */
export async function transcribe(triton, samples, signal) {
  const request = { what: "transcribe", inputs: [floats("AUDIO", samples)], outputs: ["TEXT"] };
  return (await triton.infer("transcribe", request, { timeout: LONG, signal })).text("TEXT").trim();
}

/**
 * A sentence, spoken: pieces of sound as they come.
 * @param {Triton} triton
 * @param {string} sentence
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Float32Array>}
 * @throws {TalksplatError} `invalid`: the server can't speak this text; the message says why
 */
export async function* synthesize(triton, sentence, signal) {
  let start = 0;
  for (;;) {
    const inputs = [string("TEXT", sentence, [1]), integer("START", start, [1])];
    const answer = await triton.infer("tts", { what: "tts", inputs, outputs: ["AUDIO", "SAMPLES"] }, { signal });
    const piece = answer.floats("AUDIO");
    if (piece.length) yield piece;
    start += piece.length;
    if (start >= answer.integer("SAMPLES")) return;
    if (!piece.length) throw new TalksplatError("failed", "The server's voice stopped in mid-sentence.");
  }
}
