/** One viewer's frames: the face at rest without end, and the voice that is put into it. */

import { Tape } from "./samples.js";
import { floats, integer, pause, string, TalksplatError } from "./triton.js";

const IN_FLIGHT = 3; // chunks that are requested and not there yet
const RESTING_AHEAD = 0.5; // seconds of frames kept ready at rest: few, since a voice makes them void
const SPEAKING_AHEAD = 1; // seconds, in speech
const URGENT = 0.16; // seconds before a chunk is due for which a voice that goes on is waited for
const ENOUGH = 4; // seconds of voice ahead of what is heard
const EAGERNESS = 0.5; // of the mean latency a voice begins after: a face at rest may be held a little, it is not seen
const SLOWNESS = 0.15; // weight of the latest chunk in the mean latency
const LISTENING_STEP = 0.5; // at most, from one chunk to the next

/** @typedef {{begin: number, end: number, sample: number}} Place the frames in which something is said; its first sample */
/**
 * What the stream wants of a player.
 * @typedef {Pick<import("./player.js").Player, "place" | "drop" | "hush" | "at" | "ahead" | "frameAfter" | "soundLead">} Screen
 */

/**
 * Frames by their index, chunk by chunk. The server keeps nothing, so a chunk that was lost is asked for again, and the
 * stream goes on at its frame. What was asked for and is not shown yet can be dropped and asked for anew, with other
 * sound: so a voice begins within a chunk of rest, and ends where it is interrupted.
 */
export class Stream {
  #triton;
  #clock;
  #screen;
  #look;
  #decode;
  #tape = new Tape(); // ends with the voice
  /** @type {Voice | null} */
  #voice = null;
  #next = 0; // chunk to be asked for
  #placed = 0; // chunk to be handed to the screen
  #end = 0; // frame after the last that the screen has
  /** @type {Map<number, AbortController>} */
  #calls = new Map();
  /** @type {Map<number, {first: number, pictures: ImageBitmap[], samples: Float32Array<ArrayBuffer>}>} */
  #ready = new Map();
  /** @type {Map<number, number>} how much the face listens at a chunk's end, 0 to 1 */
  #listened = new Map();
  #wake = () => {};
  #running = false;
  #latency = 0.1; // seconds from asking for a chunk that speaks to having its pictures
  #paused = false;
  #listening = 0; // how much the face is to listen, 0 to 1
  /** @type {number[]} ms, of the latest chunks */
  latenciesMs = [];

  /**
   * @param {import("./triton.js").Triton} triton
   * @param {import("./clock.js").Clock} clock
   * @param {Screen} screen
   * @param {{avatar: string, model: string, seed: number}} look `model` animates the avatar, as `preload` says
   * @param {(jpeg: Uint8Array<ArrayBuffer>) => Promise<ImageBitmap>} [decode]
   */
  constructor(
    triton,
    clock,
    screen,
    look,
    decode = jpeg => createImageBitmap(new Blob([jpeg], { type: "image/jpeg" })),
  ) {
    this.#triton = triton;
    this.#clock = clock;
    this.#screen = screen;
    this.#look = look;
    this.#decode = decode;
  }

  /**
   * Show the face until `stop`.
   * @throws {TalksplatError} the server does not want to go on
   */
  async run() {
    this.#running = true;
    const first = this.#screen.frameAfter(0);
    this.#next = this.#placed = Math.ceil(first / this.#clock.chunkFrames);
    this.#end = this.#next * this.#clock.chunkFrames;
    try {
      await new Promise((_, reject) => {
        this.#fail = reject;
        this.#pump().catch(reject);
      });
    } finally {
      this.stop();
    }
  }

  #fail = (/** @type {unknown} */ _error) => {};

  /** Drop everything that is not shown yet. */
  stop() {
    this.hush();
    this.#running = false;
    this.#abandon(0);
    this.#screen.drop(this.#soonest());
    this.#wake();
    this.#fail(new DOMException("stopped", "AbortError"));
  }

  /** Begin to speak; a voice that still speaks is broken off. */
  speak() {
    const voice = this.prepare(0);
    voice.release();
    return voice;
  }

  /**
   * Make ready to speak in so many seconds: what is said is animated, and shown once the voice is released.
   * @param {number} seconds
   */
  prepare(seconds) {
    this.hush();
    const due = this.#screen.frameAfter(seconds);
    this.#voice = new Voice(
      samples => this.#say(samples, due),
      this.#screen,
      () => {
        this.#place();
        this.#wake();
      },
      () => this.#ended(),
    );
    return this.#voice;
  }

  /**
   * At rest ask for nothing, since nobody looks.
   * @param {boolean} paused
   */
  set paused(paused) {
    this.#paused = paused;
    this.#wake();
  }

  /**
   * How much the face listens from now on, 0 to 1; while it speaks it does not.
   * @param {number} listening
   */
  set listening(listening) {
    if (listening === this.#listening) return;
    this.#listening = listening;
    if (this.#voice) return;
    const chunk = Math.ceil(this.#soonest(this.#latency) / this.#clock.chunkFrames);
    if (chunk < this.#next) this.#revise(chunk * this.#clock.chunkFrames);
  }

  /** Whether a voice is expected or not heard to its end yet. */
  get speaking() {
    return this.#voice !== null;
  }

  /** Fall silent now; the lips follow as soon as they can. */
  hush() {
    const voice = this.#voice;
    if (!voice) return;
    this.#voice = null;
    const spf = this.#clock.samplesPerFrame;
    const heard = this.#soonest();
    if (this.#tape.end > heard * spf) {
      const frame = this.#soonest(this.#latency);
      this.#screen.hush();
      this.#tape.endAt(Math.min(this.#tape.end, frame * spf));
      this.#revise(frame);
    }
    voice.settle(heard);
  }

  /**
   * The first frame that can still be another one than planned.
   * @param {number} [seconds] from now
   */
  #soonest(seconds = 0) {
    return Math.min(this.#screen.frameAfter(seconds), this.#end);
  }

  /**
   * Ask again for what is shown from this frame on.
   * @param {number} frame
   */
  #revise(frame) {
    this.#screen.drop(frame);
    this.#end = Math.min(this.#end, frame);
    const chunk = Math.floor(frame / this.#clock.chunkFrames);
    this.#abandon(chunk);
    this.#next = Math.min(this.#next, chunk);
    this.#placed = Math.min(this.#placed, chunk);
    this.#wake();
  }

  /**
   * Put samples into the stream, as soon as that can be or after those before them.
   * @param {Float32Array} samples
   * @param {number} due the first frame that may speak
   * @returns {Place}
   */
  #say(samples, due) {
    const spf = this.#clock.samplesPerFrame;
    const soonest = Math.max(this.#soonest(EAGERNESS * this.#latency), Math.min(due, this.#end));
    const begin = Math.max(this.#tape.end, soonest * spf);
    this.#tape.endAt(begin);
    this.#tape.append(samples);
    const frames = { begin: Math.floor(begin / spf), end: Math.floor(this.#tape.end / spf), sample: begin };
    if (begin < this.#next * this.#clock.chunk) this.#revise(frames.begin);
    this.#wake();
    return frames;
  }

  #ended() {
    const voice = this.#voice;
    this.#wake();
    const frame = Math.ceil(this.#tape.end / this.#clock.samplesPerFrame);
    this.#screen.at(frame, () => {
      if (this.#voice === voice) this.#voice = null;
      voice?.settle(frame);
    });
  }

  /** @param {number} chunk the first */
  #abandon(chunk) {
    for (const [each, call] of this.#calls) {
      if (each < chunk) continue;
      call.abort();
      this.#calls.delete(each);
    }
    for (const [each, { pictures }] of this.#ready) {
      if (each < chunk) continue;
      for (const picture of pictures) picture.close();
      this.#ready.delete(each);
    }
  }

  async #pump() {
    while (this.#running) {
      const wait = this.#wait();
      if (wait <= 0) this.#request(this.#next++);
      else {
        await new Promise(resolve => {
          const timer = setTimeout(resolve, Math.min(1e3 * wait, 1e3));
          this.#wake = () => {
            clearTimeout(timer);
            resolve(undefined);
          };
        });
      }
    }
  }

  /** Seconds until the next chunk is to be asked for; infinite while others are under way. */
  #wait() {
    const clock = this.#clock;
    if (this.#calls.size + this.#ready.size >= IN_FLIGHT) return Number.POSITIVE_INFINITY;
    const opening = Math.round((this.#voice?.begin ?? Number.POSITIVE_INFINITY) / clock.chunkFrames);
    if (this.#calls.has(opening)) return Number.POSITIVE_INFINITY; // a voice's first chunk comes sooner alone
    const ahead = this.#screen.ahead(this.#next * clock.chunkFrames);
    const window = clock.windowStart(this.#next);
    const voice = this.#tape.end;
    if (this.#paused && !this.#voice && voice <= window) return Number.POSITIVE_INFINITY;
    if (this.#voice?.open && Number.isFinite(this.#voice.begin) && voice < window + clock.window) {
      return ahead - URGENT - this.#latency - this.#screen.soundLead; // what it says next may come in time
    }
    return ahead - (voice > this.#next * clock.chunk ? SPEAKING_AHEAD : RESTING_AHEAD);
  }

  /** @param {number} chunk */
  #request(chunk) {
    const clock = this.#clock;
    const call = new AbortController();
    this.#calls.set(chunk, call);
    const begin = clock.windowStart(chunk);
    const window = this.#tape.read(begin, begin + clock.window);
    const samples = window.slice(clock.leftContext, clock.leftContext + clock.chunk);
    this.#tape.forget(clock.windowStart(Math.floor(this.#soonest() / clock.chunkFrames)));
    this.#ask(chunk, window, call.signal)
      .then(pictures => {
        if (call.signal.aborted) {
          for (const picture of pictures) picture.close();
          return;
        }
        this.#calls.delete(chunk);
        this.#ready.set(chunk, { first: chunk * clock.chunkFrames, pictures, samples });
        this.#place();
        this.#wake();
      })
      .catch(error => {
        if (!call.signal.aborted) this.#fail(error);
      });
  }

  /**
   * @param {number} chunk
   * @param {Float32Array} window
   * @param {AbortSignal} signal
   */
  async #ask(chunk, window, signal) {
    const asked = performance.now();
    const first = chunk * this.#clock.chunkFrames;
    const { avatar, model, seed } = this.#look;
    const inputs = [string("AVATAR", avatar, [1, 1]), integer("FRAME_INDEX", first, [1, 1])];
    const heard = window.some(value => value !== 0); // else there is nothing to compute
    if (heard) inputs.push(floats("AUDIO", window, [1, window.length]));
    const request = { what: first, inputs, outputs: ["FRAMES"], parameters: { seed, ...this.#listen(chunk) } };
    const terms = { signal, recovery: Number.POSITIVE_INFINITY, insist: this.latenciesMs.length > 0 };
    const answer = await this.#triton.infer(heard ? model : "rasterizer", request, terms);
    const jpegs = answer.strings("FRAMES");
    if (jpegs.length !== this.#clock.chunkFrames) {
      throw new TalksplatError("failed", `The server answered with ${jpegs.length} frames.`);
    }
    const pictures = await Promise.all(jpegs.map(this.#decode));
    const seconds = (performance.now() - asked) / 1e3;
    if (heard && seconds < 1) this.#latency += SLOWNESS * (seconds - this.#latency); // else the server was away
    this.latenciesMs.push(1e3 * seconds);
    if (this.latenciesMs.length > 100) this.latenciesMs.shift();
    return pictures;
  }

  /**
   * Parameters: how much the face listens from a chunk's start to its end, without a jump; of a chunk that is shown in
   * part, as before.
   * @param {number} chunk
   * @returns {Record<string, number>}
   */
  #listen(chunk) {
    const before = this.#listened.get(chunk - 1) ?? 0;
    const shown = this.#end > chunk * this.#clock.chunkFrames ? this.#listened.get(chunk) : undefined;
    const wanted = this.#tape.end > chunk * this.#clock.chunk ? 0 : this.#listening;
    const step = Math.min(LISTENING_STEP, Math.max(-LISTENING_STEP, wanted - before));
    const after = shown ?? before + step;
    this.#listened.set(chunk, after);
    this.#listened.delete(chunk - 50);
    return before || after ? { listening_before: Math.round(100 * before), listening: Math.round(100 * after) } : {};
  }

  /** Hand over what is there and not held, in order. */
  #place() {
    const spf = this.#clock.samplesPerFrame;
    const limit = this.#voice?.held ? this.#voice.begin : Number.POSITIVE_INFINITY;
    for (;;) {
      const ready = this.#ready.get(this.#placed);
      if (!ready) return;
      const skipped = Math.max(0, this.#end - ready.first); // the screen has them, or has shown them
      for (const picture of ready.pictures.splice(0, skipped)) picture.close();
      const first = ready.first + skipped;
      const pictures = ready.pictures.splice(0, Math.max(0, limit - first));
      const rest = (skipped + pictures.length) * spf;
      if (pictures.length) this.#screen.place(first, pictures, ready.samples.slice(skipped * spf, rest));
      this.#end = ready.first = first + pictures.length;
      ready.samples = ready.samples.slice(rest);
      if (ready.pictures.length) return; // held
      this.#ready.delete(this.#placed++);
    }
  }
}

/** What is being said. */
export class Voice {
  #say;
  #screen;
  #show;
  #end;
  #settle = (/** @type {number} */ _frame) => {};
  open = true; // more may come
  held = true; // nothing is shown
  begin = Number.POSITIVE_INFINITY; // its first frame

  /**
   * @param {(samples: Float32Array) => Place} say
   * @param {Screen} screen
   * @param {() => void} show
   * @param {() => void} end
   */
  constructor(say, screen, show, end) {
    this.#say = say;
    this.#screen = screen;
    this.#show = show;
    this.#end = end;
    /** @type {Promise<number>} resolved with the frame at which it had ended, or was broken off */
    this.done = new Promise(resolve => {
      this.#settle = resolve;
    });
  }

  /**
   * Say this next.
   * @param {Float32Array} samples at the server's rate
   * @param {() => void} [heard] called when its first frame is drawn
   * @returns the sample of the stream at which it begins, when more is wanted; nothing, if it is too late for that
   */
  async push(samples, heard) {
    if (!this.open || !samples.length) return;
    const { begin, end, sample } = this.#say(samples);
    this.begin = Math.min(this.begin, begin);
    if (heard) this.#screen.at(begin, heard);
    const excess = this.#screen.ahead(end) - ENOUGH;
    if (excess > 0) await Promise.race([this.done, pause(excess)]);
    return sample;
  }

  /** Nothing more will come. */
  end() {
    if (!this.open) return;
    this.open = false;
    this.#end();
  }

  /** It may be shown. */
  release() {
    this.held = false;
    this.#show();
  }

  /**
   * It was heard to its end, or is broken off.
   * @param {number} frame
   */
  settle(frame) {
    this.open = false;
    this.#settle(frame);
  }
}
