/**
 * Somebody speaks, the avatar answers: speech is detected, recognised as a guess while its end is still being confirmed,
 * answered, spoken sentence by sentence. Whoever interrupts the avatar silences it at once.
 */

import { detectSpeech, synthesize, transcribe } from "./models.js";
import { cutInPauses, Tape } from "./samples.js";
import { sentences } from "./sentences.js";
import { pause, TalksplatError } from "./triton.js";
import { Turns } from "./turns.js";

/** @import { Clock } from "./clock.js" */
/** @import { Message, Responder } from "./replies.js" */
/** @import { Stream } from "./stream.js" */
/** @import { Triton } from "./triton.js" */

/** @typedef {"idle" | "listening" | "thinking" | "speaking"} State */
/**
 * Milliseconds, of the latest turn. `endOfSpeech`: from the last of the user's speech until it was clear that it is the
 * last; `recognition`: of the request; `reply`: from the text to the answer's first sentence; `voice`: from there to its
 * first sound; `firstFrame`: from when all of that was there to the frame in which it is heard; `answer`: from the last
 * of the user's speech to that frame; `interruption`: from the first of the user's speech to silence.
 * @typedef {{endOfSpeech?: number, recognition?: number, reply?: number, voice?: number, firstFrame?: number,
 *   answer?: number, interruption?: number}} Stages
 */
/** @typedef {{samples: Float32Array, caption?: string | undefined}} Piece of what the avatar says */
/**
 * @typedef {object} Listener
 * @property {(state: State) => void} state
 * @property {(who: "you" | "avatar", text: string, final: boolean) => void} caption
 * @property {(stages: Stages) => void} stages
 * @property {(error: unknown) => void} problem
 */

const CAPTION_SECONDS = 10; // of a file that are recognised, and captioned, at a time
const DEAF_SECONDS = 1; // after speech could not be detected
const BACKLOG_CHUNKS = 4; // of sound that was not looked at yet; what is older is given up

export class Conversation {
  #triton;
  #clock;
  #stream;
  #settings;
  #responder;
  #tell;
  #turns;
  #tape = new Tape(); // of the microphone
  #heardAt = 0; // ms: when the tape's end was heard
  #seen = 0; // samples of which it is known whether they are speech
  #attending = false;
  #turnBegin = 0; // sample
  #speechEnd = 0; // sample
  /** @type {Guess | null} */
  #guess = null;
  /** @type {AbortController | null} of what the avatar says */
  #saying = null;
  /** @type {Message[]} */
  #messages = [];
  /** @type {State} */
  #state = "idle";
  /** @type {Stages} */
  #stages = {};
  #closed = new AbortController();

  /**
   * @param {Triton} triton
   * @param {Clock} clock
   * @param {Stream} stream
   * @param {import("./turns.js").EndOfSpeech} settings
   * @param {() => Responder} responder who answers the next turn
   * @param {Listener} tell
   */
  constructor(triton, clock, stream, settings, responder, tell) {
    this.#triton = triton;
    this.#clock = clock;
    this.#stream = stream;
    this.#settings = settings;
    this.#responder = responder;
    this.#tell = tell;
    this.#turns = new Turns(settings, clock.fps, clock.maxUtteranceSeconds);
  }

  /** End it. */
  close() {
    this.interrupt();
    this.#drop();
    this.#closed.abort();
  }

  /**
   * Sound of the microphone.
   * @param {Float32Array} samples at the server's rate
   */
  hear(samples) {
    this.#tape.append(samples);
    this.#heardAt = performance.now();
    if (this.#attending) return;
    this.#attending = true;
    this.#attend()
      .catch(error => {
        if (this.#closed.signal.aborted) return;
        if (!(error instanceof TalksplatError) || error.kind !== "unavailable") this.#fail(error); // else it is known
        this.deafen(); // nobody knows whether the turn goes on
        return pause(DEAF_SECONDS);
      })
      .finally(() => {
        this.#attending = false;
      });
  }

  /** The microphone is off: what was begun is over. */
  deafen() {
    this.#drop();
    this.#turns = new Turns(this.#settings, this.#clock.fps, this.#clock.maxUtteranceSeconds);
    this.#seen = this.#tape.end;
    this.#stream.listening = 0;
    if (this.#state === "listening") this.#become("idle");
  }

  /**
   * Have the avatar say a text.
   * @param {string} text
   */
  say(text) {
    const abort = this.#begin();
    return this.#speak(this.#spoken(each(sentences(text)), abort.signal), abort);
  }

  /**
   * Have the avatar speak with a recorded voice.
   * @param {Float32Array} samples at the server's rate
   */
  play(samples) {
    const abort = this.#begin();
    return this.#speak(this.#captioned(samples, abort.signal), abort);
  }

  /** Silence the avatar. */
  interrupt() {
    this.#silence();
    if (this.#state === "speaking" || this.#state === "thinking") this.#become("idle");
  }

  #silence() {
    this.#saying?.abort();
    this.#saying = null;
    this.#stream.hush();
  }

  /** What takes the place of what the avatar says. */
  #begin() {
    this.#silence();
    this.#saying = new AbortController();
    this.#become("thinking");
    return this.#saying;
  }

  /** Look at what was heard and not looked at, up to a chunk at a time. */
  async #attend() {
    const { samplesPerFrame, chunk, chunkFrames, window } = this.#clock;
    while (this.#tape.end - this.#seen >= samplesPerFrame && !this.#closed.signal.aborted) {
      this.#seen = Math.max(this.#seen, this.#tape.end - BACKLOG_CHUNKS * chunk);
      this.#tape.forget(Math.min(this.#seen - window, this.#turns.inTurn ? this.#turnBegin : this.#seen));
      const frames = Math.min(chunkFrames, Math.floor((this.#tape.end - this.#seen) / samplesPerFrame));
      const end = this.#seen + frames * samplesPerFrame;
      const sound = this.#tape.read(end - window, end);
      const turns = this.#turns;
      const probabilities = await detectSpeech(this.#triton, sound, this.#closed.signal);
      if (turns !== this.#turns) continue; // deafened meanwhile
      this.#seen = end;
      for (const [number, probability] of probabilities.slice(-frames).entries()) {
        const position = end - (frames - 1 - number) * samplesPerFrame;
        if (probability > this.#settings.speech) this.#speechEnd = position;
        this.#decide(turns.push(probability), position);
      }
    }
  }

  /**
   * @param {import("./turns.js").TurnEvent | null} event
   * @param {number} position sample
   */
  #decide(event, position) {
    if (event === "begin") {
      const began = position - Math.round(this.#settings.begin_seconds * this.#clock.sampleRate);
      this.#turnBegin = began - Math.round(this.#settings.run_in_seconds * this.#clock.sampleRate);
      if (this.#state === "speaking" || this.#state === "thinking") {
        this.#silence();
        this.#measure({ interruption: performance.now() - this.#heard(began) });
      }
      this.#stream.listening = 1;
      this.#become("listening");
    } else if (event === "recognise") {
      this.#recognise(position);
    } else if (event === "resume") {
      this.#drop();
    } else if (event === "end") {
      this.#answer();
    }
  }

  /**
   * Find out what was said so far, and begin to answer it.
   * @param {number} end sample
   */
  #recognise(end) {
    this.#drop();
    const guess = new Guess();
    this.#guess = guess;
    const { signal } = guess.abort;
    const began = performance.now();
    this.#textOf(this.#tape.read(this.#turnBegin, end), signal)
      .then(text => {
        if (signal.aborted) return;
        guess.text = text;
        guess.recognised = performance.now();
        this.#measure({ recognition: guess.recognised - began });
        if (text) {
          this.#tell.caption("you", text, false);
          const messages = [...this.#messages, { role: /** @type {const} */ ("user"), content: text }];
          guess.pieces = ahead(this.#spoken(this.#reply(messages, guess), signal, guess));
        }
        this.#decide(this.#turns.recognised(text), end);
      })
      .catch(error => {
        if (signal.aborted) return;
        this.#fail(error);
        this.deafen();
      });
  }

  /**
   * @param {Float32Array} samples
   * @param {AbortSignal} signal
   */
  async #textOf(samples, signal) {
    const { sampleRate, maxUtteranceSeconds } = this.#clock;
    const pieces = cutInPauses(samples, maxUtteranceSeconds * sampleRate, sampleRate);
    const texts = await Promise.all(pieces.map(piece => transcribe(this.#triton, piece, signal)));
    return texts.filter(Boolean).join(" ");
  }

  /** The turn is over. */
  #answer() {
    const guess = this.#guess;
    this.#guess = null;
    if (!guess?.pieces || !guess.text) {
      this.#stream.listening = 0;
      if (this.#state === "listening") this.#become("idle"); // a noise
      return;
    }
    const spoken = this.#heard(this.#speechEnd);
    this.#measure({ endOfSpeech: performance.now() - spoken });
    this.#messages.push({ role: "user", content: guess.text });
    this.#tell.caption("you", guess.text, true);
    this.#saying?.abort();
    this.#saying = guess.abort;
    this.#become("thinking");
    const confirmed = performance.now();
    this.#speak(guess.pieces, guess.abort, () => {
      const ready = Math.max(confirmed, guess.sounded);
      const now = performance.now();
      this.#measure({
        reply: guess.replied - guess.recognised,
        voice: guess.sounded - guess.replied,
        firstFrame: now - ready,
        answer: now - spoken,
      });
    });
  }

  /** Give up a guess. */
  #drop() {
    this.#guess?.abort.abort();
    this.#guess = null;
  }

  /**
   * @param {Message[]} messages
   * @param {Guess} guess
   */
  async *#reply(messages, guess) {
    for await (const sentence of this.#responder().answer(messages, guess.abort.signal)) {
      guess.replied ||= performance.now();
      yield sentence;
    }
  }

  /**
   * The sound of sentences.
   * @param {AsyncIterable<string>} said
   * @param {AbortSignal} signal
   * @param {Guess} [guess]
   * @returns {AsyncGenerator<Piece>}
   */
  async *#spoken(said, signal, guess) {
    for await (const sentence of said) {
      let caption = /** @type {string | undefined} */ (sentence);
      for await (const samples of synthesize(this.#triton, sentence, signal)) {
        if (guess) guess.sounded ||= performance.now();
        yield { samples, caption };
        caption = undefined;
      }
    }
  }

  /**
   * A recording in pieces, with what is said in each.
   * @param {Float32Array} samples
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<Piece>}
   */
  async *#captioned(samples, signal) {
    const { sampleRate } = this.#clock;
    for (const piece of cutInPauses(samples, CAPTION_SECONDS * sampleRate, sampleRate)) {
      const caption = await transcribe(this.#triton, piece, signal).catch(error => this.#fail(error));
      yield { samples: piece, caption: caption || undefined };
    }
  }

  /**
   * Put pieces into the stream, with captions when they are heard.
   * @param {AsyncIterable<Piece>} pieces
   * @param {AbortController} abort
   * @param {() => void} [begun] called when the first is heard
   */
  async #speak(pieces, abort, begun) {
    const { signal } = abort;
    const voice = this.#stream.speak();
    let first = true;
    const heard = (/** @type {string | undefined} */ caption) => {
      if (signal.aborted) return;
      if (first) {
        first = false;
        this.#become("speaking");
        begun?.();
      }
      if (caption) this.#told(caption);
    };
    try {
      for await (const { samples, caption } of pieces) {
        signal.throwIfAborted();
        this.#stream.listening = 0; // not before, since what is shown next is asked for anew each time
        await voice.push(samples, () => heard(caption));
      }
      voice.end();
      await voice.done;
    } catch (error) {
      if (signal.aborted) return;
      voice.end(); // what was said up to here is heard
      this.#fail(error);
      await voice.done;
    }
    if (signal.aborted) return;
    this.#saying = null;
    this.#stream.listening = 0;
    this.#become("idle");
  }

  /** @param {string} text */
  #told(text) {
    this.#tell.caption("avatar", text, true);
    const last = this.#messages.at(-1);
    if (last?.role === "assistant") last.content += ` ${text}`;
    else this.#messages.push({ role: "assistant", content: text });
  }

  /**
   * When a sample was heard, in ms.
   * @param {number} position
   */
  #heard(position) {
    return this.#heardAt - (1e3 * (this.#tape.end - position)) / this.#clock.sampleRate;
  }

  /** @param {Stages} stages */
  #measure(stages) {
    this.#stages = { ...this.#stages, ...stages };
    this.#tell.stages(this.#stages);
  }

  /** @param {State} state */
  #become(state) {
    if (state === this.#state || this.#closed.signal.aborted) return;
    this.#state = state;
    this.#tell.state(state);
  }

  /** @param {unknown} error */
  #fail(error) {
    if (error instanceof DOMException && error.name === "AbortError") return;
    this.#tell.problem(error);
  }
}

/** What the user has probably said, and what is being answered. */
class Guess {
  abort = new AbortController();
  text = "";
  /** @type {AsyncIterable<Piece> | null} */
  pieces = null;
  // ms
  recognised = 0;
  replied = 0;
  sounded = 0;
}

/**
 * @template T
 * @param {T[]} values
 */
async function* each(values) {
  yield* values;
}

/**
 * Takes what a generator yields as soon as it comes, for whoever wants it later.
 * @template T
 * @param {AsyncGenerator<T>} generator
 * @returns {AsyncIterable<T>}
 */
export function ahead(generator) {
  /** @type {T[]} */
  const taken = [];
  let more = Promise.withResolvers();
  let ended = false;
  let failure = /** @type {{error: unknown} | null} */ (null);
  (async () => {
    try {
      for await (const value of generator) {
        taken.push(value);
        more.resolve(undefined);
      }
    } catch (error) {
      failure = { error };
    }
    ended = true;
    more.resolve(undefined);
  })();
  return (async function* () {
    for (;;) {
      while (taken.length) yield/** @type {T} */ (taken.shift());
      if (failure) throw failure.error;
      if (ended) return;
      await more.promise;
      more = Promise.withResolvers();
    }
  })();
}
