/** Draws each frame, and plays its sound, when its time on the audio clock comes. */

import { pause } from "./triton.js";

const PATIENCE = 1; // seconds that a sound card may take to begin
const REFRESH_AHEAD = 0.008; // seconds: what is drawn now is seen at the screen's next refresh
const MARGIN = 0.005; // seconds between scheduling a sound and its begin
const FADE = 0.015; // seconds in which a sound that is broken off falls silent
const KEPT = 10_000; // measurements

/**
 * A frame that waits for its time.
 * @typedef {{index: number, due: number, sounds: boolean, picture: ImageBitmap}} Entry
 */

/**
 * The clock is the sound card's: `now()` is what is heard at this moment, in seconds. Before a sound card may be used
 * (browsers want a gesture first) the computer's clock runs in its place; the change is no jump.
 *
 * Frame `index` is due at `epoch + index / fps`. Whatever comes too late is shown when it comes, and the epoch moves:
 * sound and picture are held together.
 */
export class Player {
  #canvas;
  #brush;
  #clock;
  /** @type {AudioContext | undefined} */
  #context;
  /** @type {GainNode | undefined} */
  #volume;
  #runs = false; // the sound card's clock
  #offset = 0; // from the running clock to now()
  #last = 0; // what now() said
  #epoch = 0;
  /** @type {Entry[]} */
  #queue = [];
  /** @type {{begin: number, end: number, source: AudioBufferSourceNode}[]} seconds of now() */
  #sounds = [];
  /** @type {{frame: number, cue: () => void}[]} */
  #cues = [];
  #drawn = -1; // the last frame
  framesDrawn = 0;
  framesMissed = 0; // that were not drawn, since the next one was due
  outOfOrder = 0;
  /** @type {number[]} ms from a frame's time to when it was drawn, either way, while sound plays */
  skewsMs = [];
  /** @type {number[]} ms of `performance.now()` */
  drawTimesMs = [];

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {import("./clock.js").Clock} clock of the server
   */
  constructor(canvas, clock) {
    this.#canvas = canvas;
    this.#brush = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { alpha: false }));
    this.#clock = clock;
    this.#last = performance.now() / 1e3;
    const draw = () => {
      this.#draw();
      requestAnimationFrame(draw);
    };
    requestAnimationFrame(draw);
  }

  /** Begin to use the sound card; to be called in a gesture. Where there is none, it goes on without. */
  async unlock() {
    if (!this.#context) {
      // at the server's rate, so that consecutive sounds join without a seam
      this.#context = new AudioContext({ sampleRate: this.#clock.sampleRate, latencyHint: "interactive" });
      this.#volume = new GainNode(this.#context);
      this.#volume.connect(this.#context.destination);
    }
    if (this.#context.state !== "running") {
      await Promise.race([this.#context.resume(), pause(PATIENCE)]).catch(() => {});
    }
  }

  /** Seconds; never goes back. */
  now() {
    const context = this.#context;
    const runs = context?.state === "running";
    const time = runs ? context.currentTime - this.#latency : performance.now() / 1e3;
    if (runs !== this.#runs) {
      this.#runs = runs;
      this.#offset = this.#last - time;
    }
    this.#last = Math.max(this.#last, time + this.#offset);
    return this.#last;
  }

  /** Seconds that sound must be scheduled before it is to be heard. */
  get soundLead() {
    return this.#runs ? this.#latency + MARGIN : 0;
  }

  /**
   * The first frame that is not due within so many seconds.
   * @param {number} seconds
   */
  frameAfter(seconds) {
    const frame = Math.ceil((this.now() + seconds - this.#epoch) * this.#clock.fps);
    return Math.max(frame, this.#drawn + 1);
  }

  /**
   * Seconds until a frame is due.
   * @param {number} frame
   */
  ahead(frame) {
    return this.#epoch + frame / this.#clock.fps - this.now();
  }

  /**
   * Take the next frames, and the sound that belongs to them.
   * @param {number} first index
   * @param {ImageBitmap[]} pictures
   * @param {Float32Array<ArrayBuffer>} samples of as many frames
   */
  place(first, pictures, samples) {
    const sounds = samples.some(value => value !== 0);
    const late = (sounds ? this.soundLead : 0) - this.ahead(first);
    if (late > 0) this.#epoch += this.#wholeSamples(late);
    for (const [number, picture] of pictures.entries()) {
      const index = first + number;
      this.#queue.push({ index, due: this.#epoch + index / this.#clock.fps, sounds, picture });
    }
    if (sounds) this.#play(samples, this.#epoch + first / this.#clock.fps);
    if (document.hidden) this.#draw(); // nobody else does
  }

  /**
   * Drop what waits from this frame on, and its sound.
   * @param {number} frame
   */
  drop(frame) {
    for (const { picture } of this.#queue.filter(({ index }) => index >= frame)) picture.close();
    this.#queue = this.#queue.filter(({ index }) => index < frame);
    const end = this.#epoch + frame / this.#clock.fps;
    for (const sound of this.#sounds.filter(each => each.end > end)) {
      sound.source.stop(Math.max(0, end - this.#offset));
      sound.end = end;
    }
  }

  /** Silence, now; nobody is called back. */
  hush() {
    this.#cues = [];
    const context = this.#context;
    if (!context || !this.#volume) return;
    const silenced = this.#volume;
    silenced.gain.setTargetAtTime(0, context.currentTime, FADE / 3);
    setTimeout(() => silenced.disconnect(), 1e3 * (FADE + this.#latency) + 100);
    this.#volume = new GainNode(context);
    this.#volume.connect(context.destination);
    const now = this.now();
    for (const sound of this.#sounds) sound.end = Math.min(sound.end, now);
  }

  /**
   * Call back when a frame is drawn, or one after it.
   * @param {number} frame
   * @param {() => void} cue
   */
  at(frame, cue) {
    this.#cues.push({ frame, cue });
  }

  get #latency() {
    return this.#context?.outputLatency || this.#context?.baseLatency || 0; // Safari knows the second alone
  }

  /** @param {number} seconds */
  #wholeSamples(seconds) {
    return Math.ceil(seconds * this.#clock.sampleRate) / this.#clock.sampleRate;
  }

  /**
   * @param {Float32Array<ArrayBuffer>} samples
   * @param {number} begin seconds of now()
   */
  #play(samples, begin) {
    if (!this.#context || !this.#volume || !this.#runs) return; // no gesture yet, so no sound
    const rate = this.#clock.sampleRate;
    const buffer = new AudioBuffer({ length: samples.length, sampleRate: rate });
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.#context, { buffer });
    source.connect(this.#volume);
    source.start(Math.max(0, Math.round((begin - this.#offset) * rate) / rate));
    const now = this.now();
    this.#sounds = this.#sounds.filter(({ end }) => end > now - 1);
    this.#sounds.push({ begin, end: begin + samples.length / rate, source });
  }

  #draw() {
    const now = this.now();
    const due = (/** @type {Entry | undefined} */ entry) => entry && entry.due <= now + REFRESH_AHEAD;
    while (due(this.#queue[1]) && (this.#queue[0]?.due ?? now) < now - 1 / this.#clock.fps) {
      this.#queue.shift()?.picture.close(); // a frame's time late: the screen was not refreshed for so long
      this.framesMissed++;
    }
    const entry = due(this.#queue[0]) && this.#queue.shift();
    if (!entry) return;
    const { index, sounds, picture } = entry;
    if (this.#canvas.width !== picture.width || this.#canvas.height !== picture.height) {
      this.#canvas.width = picture.width;
      this.#canvas.height = picture.height;
    }
    this.#brush.drawImage(picture, 0, 0);
    picture.close();
    if (index <= this.#drawn) this.outOfOrder++;
    this.#drawn = index;
    this.framesDrawn++;
    keep(this.drawTimesMs, performance.now());
    if (sounds && this.#runs) keep(this.skewsMs, 1e3 * Math.abs(now - entry.due));
    const cues = this.#cues.filter(({ frame }) => frame <= index);
    this.#cues = this.#cues.filter(({ frame }) => frame > index);
    for (const { cue } of cues) cue();
  }
}

/**
 * @param {number[]} measurements
 * @param {number} value
 */
function keep(measurements, value) {
  measurements.push(value);
  if (measurements.length > KEPT) measurements.splice(0, KEPT / 10);
}
