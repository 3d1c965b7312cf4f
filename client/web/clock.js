/** How samples, frames and chunks relate. The server says so; nothing of it is written down here. */

import { TalksplatError } from "./triton.js";

export class Clock {
  /**
   * @param {Record<string, {string_value?: string}>} parameters of the config of the model `animate`
   * @throws {TalksplatError} one is missing or makes no sense
   */
  constructor(parameters) {
    const number = (/** @type {string} */ name) => {
      const value = Number(parameters[name]?.string_value ?? Number.NaN);
      if (!Number.isInteger(value) || value < 0) {
        throw new TalksplatError("failed", `The server's model animate says nothing about ${name}: is it talksplat's?`);
      }
      return value;
    };
    this.sampleRate = number("sample_rate"); // Hz
    this.fps = number("fps");
    this.chunkFrames = number("chunk_frames");
    this.leftContext = number("left_context"); // samples
    this.lookAhead = number("look_ahead"); // samples
    this.maxUtteranceSeconds = number("max_utterance_seconds"); // of one request for a transcript
    if (!this.fps || !this.chunkFrames || this.sampleRate % this.fps) {
      throw new TalksplatError("failed", "The server's clock makes no sense.");
    }
  }

  /** Samples of one frame. */
  get samplesPerFrame() {
    return this.sampleRate / this.fps;
  }

  /** Samples of one chunk. */
  get chunk() {
    return this.chunkFrames * this.samplesPerFrame;
  }

  /** Samples of one window: left context, chunk, look-ahead. */
  get window() {
    return this.leftContext + this.chunk + this.lookAhead;
  }

  /**
   * First sample of the window of a chunk.
   * @param {number} chunk
   */
  windowStart(chunk) {
    return chunk * this.chunk - this.leftContext;
  }
}
