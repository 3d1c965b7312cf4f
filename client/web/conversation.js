/**
 * Somebody speaks, the avatar answers: speech is detected, recognised as a guess while its end is still being confirmed,
 * answered, spoken sentence by sentence. Whoever interrupts the avatar silences it at once; if no word was in that, it
 * goes on where it fell silent.
 */

import { detectSpeech, synthesize, transcribe } from "./models.js";
import { cutInPauses, Tape } from "./samples.js";
import { sentences } from "./sentences.js";
import { pause, TalksplatError } from "./triton.js";
import { Turns } from "./turns.js";

/** @import { Clock } from "./clock.js" */
/** @import { Message, Responder } from "./replies.js" */
/** @import { Stream, Voice } from "./stream.js" */
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
  #answered = 0; // sample: up to which what was said is answered
  /** @type {Guess | null} */
  #guess = null;
  /** @type {AbortController | null} of what the avatar says */
  #saying = null;
  #over = Promise.resolve(); // all of that is heard, or given up
  /** @type {PromiseWithResolvers<void> | null} while it is silent for what may be a noise */
  #held = null;
  #holds = 0;
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
    this.#forgetTurn();
    if (this.#held) this.#silence();
    this.#seen = this.#tape.end;
    this.#stream.listening = 0;
    if (this.#state === "listening") this.#become("idle");
  }

  /**
   * Have the avatar say a text.
   * @param {string} text
   */
  say(text) {
    const { signal } = this.#begin();
    this.#over = this.#speak(this.#spoken(each(sentences(text)), signal), signal, this.#stream.speak());
    return this.#over;
  }

  /**
   * Have the avatar speak with a recorded voice.
   * @param {Float32Array} samples at the server's rate
   */
  play(samples) {
    const { signal } = this.#begin();
    this.#over = this.#speak(this.#captioned(samples, signal), signal, this.#stream.speak());
    return this.#over;
  }

  /** Silence the avatar. */
  interrupt() {
    this.#silence();
    if (this.#state === "speaking" || this.#state === "thinking") this.#become("idle");
  }

  #silence() {
    if (!this.#saying) return;
    this.#saying.abort();
    this.#saying = null;
    this.#stream.hush();
    this.#held?.resolve();
    this.#held = null;
  }

  /** Silence the avatar until it is known whether that was a noise. */
  #hold() {
    if (!this.#saying) return;
    this.#held = Promise.withResolvers();
    this.#holds++;
    this.#stream.hush();
  }

  /** What takes the place of what the avatar says, or of the answer to what it hears. */
  #begin() {
    this.#forgetTurn();
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
      const runIn = Math.round(this.#settings.run_in_seconds * this.#clock.sampleRate);
      this.#turnBegin = Math.max(this.#answered, began - runIn);
      if (this.#state === "speaking" || this.#state === "thinking") {
        this.#hold();
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
   * Find out what was said so far, and make ready to answer it when the turn ends.
   * @param {number} end sample
   */
  #recognise(end) {
    this.#drop();
    const guess = new Guess(end);
    this.#guess = guess;
    const { signal } = guess.abort;
    const began = performance.now();
    this.#textOf(this.#tape.read(this.#turnBegin, end), signal)
      .then(async text => {
        if (signal.aborted) return;
        if (text && this.#held) {
          this.#silence();
          await this.#over; // what was heard of it is remembered
          if (signal.aborted) return;
        }
        guess.text = text;
        guess.recognised = performance.now();
        this.#measure({ recognition: guess.recognised - began });
        const event = this.#turns.recognised(text);
        if (text) {
          this.#tell.caption("you", text, false);
          const messages = [...this.#messages, { role: /** @type {const} */ ("user"), content: text }];
          guess.voice = this.#stream.prepare(this.#turns.left);
          const pieces = this.#spoken(this.#reply(messages, guess), signal, guess);
          guess.over = this.#speak(pieces, signal, guess.voice, guess);
        }
        this.#decide(event, end);
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
    this.#stream.listening = 0;
    if (!guess?.voice) {
      this.#held?.resolve(); // a noise
      if (!this.#held && this.#state === "listening") this.#become("idle");
      this.#held = null;
      return;
    }
    guess.ended = this.#heard(this.#speechEnd);
    guess.confirmed = performance.now();
    this.#answered = guess.end;
    this.#measure({ endOfSpeech: guess.confirmed - guess.ended });
    this.#messages.push({ role: "user", content: guess.text });
    this.#tell.caption("you", guess.text, true);
    this.#saying = guess.abort;
    this.#over = guess.over;
    this.#become("thinking");
    guess.voice.release();
    guess.wanted.resolve(undefined);
  }

  /** Give up a guess. */
  #drop() {
    if (!this.#guess) return;
    this.#guess.abort.abort();
    if (this.#guess.voice) this.#stream.hush();
    this.#guess = null;
  }

  #forgetTurn() {
    this.#drop();
    this.#turns = new Turns(this.#settings, this.#clock.fps, this.#clock.maxUtteranceSeconds);
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
   * @param {AbortSignal} signal
   * @param {Voice} voice
   * @param {Guess} [guess] whose answer this is; until it is wanted nothing is heard
   */
  async #speak(pieces, signal, voice, guess) {
    const source = pieces[Symbol.asyncIterator]();
    /** @type {Said[]} */
    const said = [];
    let first = true;
    let more = true; // may come
    const say = async (/** @type {Said} */ piece) => {
      const place = await voice.push(piece.rest, () => {
        for (const before of said.slice(0, said.indexOf(piece))) before.hear(Number.POSITIVE_INFINITY);
        if (first && guess) this.#measureAnswer(guess);
        first = false;
        this.#become("speaking");
        if (piece.caption && !piece.told) this.#tell.caption("avatar", piece.caption, true);
        piece.told = true;
      });
      piece.place = place ?? Number.POSITIVE_INFINITY;
    };
    const next = async () => {
      try {
        const { done, value } = await source.next();
        signal.throwIfAborted();
        if (!done) return new Said(value);
      } catch (error) {
        voice.end(); // what was said up to here is heard
        await guess?.wanted.promise;
        if (!signal.aborted) this.#fail(error);
      }
    };
    for (;;) {
      const holds = this.#holds;
      for (const piece of said.filter(each => each.rest.length)) await say(piece); // that was broken off
      while (more && voice.open) {
        const piece = await next();
        if (piece) {
          said.push(piece);
          await say(piece);
        } else more = false;
      }
      voice.end();
      const end = (await voice.done) * this.#clock.samplesPerFrame;
      for (const piece of said) piece.hear(end - piece.place);
      if (holds === this.#holds) break;
      await this.#held?.promise;
      if (signal.aborted || !(more || said.at(-1)?.rest.length)) break;
      voice = this.#stream.speak();
      this.#become(first ? "thinking" : "speaking");
    }
    const content = heardOf(said, this.#clock.samplesPerFrame);
    if (content) this.#messages.push({ role: "assistant", content });
    await guess?.wanted.promise;
    if (signal.aborted) return;
    this.#saying = null;
    this.#stream.listening = 0;
    this.#become("idle");
  }

  /**
   * When a sample was heard, in ms.
   * @param {number} position
   */
  #heard(position) {
    return this.#heardAt - (1e3 * (this.#tape.end - position)) / this.#clock.sampleRate;
  }

  /** @param {Guess} guess whose answer begins to be heard */
  #measureAnswer({ ended, recognised, replied, sounded, confirmed }) {
    const now = performance.now();
    this.#measure({
      reply: replied - recognised,
      voice: sounded - replied,
      firstFrame: now - Math.max(confirmed, sounded),
      answer: now - ended,
    });
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

/** What the user has probably said, and the answer to it. */
class Guess {
  abort = new AbortController();
  text = "";
  /** @type {Voice | null} */
  voice = null;
  over = Promise.resolve(); // see Conversation
  wanted = Promise.withResolvers(); // resolved when the turn is over: the guess was right
  // ms
  ended = 0; // the user's speech
  recognised = 0;
  replied = 0;
  sounded = 0;
  confirmed = 0;

  /** @param {number} end sample: of what it is made of */
  constructor(end) {
    this.end = end;
  }
}

/** A piece of what the avatar says, and how much of it was not heard yet. */
class Said {
  told = false; // its caption
  place = Number.POSITIVE_INFINITY; // sample of the stream at which the rest begins

  /** @param {Piece} piece */
  constructor({ samples, caption }) {
    this.caption = caption;
    this.length = samples.length;
    this.rest = samples;
  }

  /** @param {number} samples that were heard of the rest */
  hear(samples) {
    if (samples > 0) this.rest = this.rest.slice(samples);
  }
}

/**
 * @template T
 * @param {T[]} values
 */
async function* each(values) {
  yield* values;
}

/**
 * What was heard; of a text that was cut off as many words as it had time for, and a dash.
 * @param {Said[]} said
 * @param {number} least samples that can be cut off
 */
function heardOf(said, least) {
  /** @type {{text: string, length: number, left: number}[]} */
  const texts = [];
  for (const { caption, length, rest } of said) {
    const last = texts.at(-1);
    if (caption) texts.push({ text: caption, length, left: rest.length });
    else if (last) {
      last.length += length;
      last.left += rest.length;
    }
  }
  const heard = texts.map(({ text, length, left }) => {
    if (left < least) return text;
    const words = text.split(/\s+/);
    const count = Math.floor(words.length * (1 - left / length));
    return count > 0 ? `${words.slice(0, count).join(" ")} —` : "";
  });
  return heard.filter(Boolean).join(" ");
}
