/** When a turn begins and ends: what is said informs it, not silence alone. Decides as talksplat_client does. */

/**
 * From conversation.json: `speech` is the probability above which a frame is speech; `begin_seconds` of speech begin a
 * turn; after `recognise_seconds` of silence what was said, from `run_in_seconds` before it on, is recognised, as a
 * guess; `finished_seconds` or `unfinished_seconds` of silence end a turn whose text does or does not sound finished, as
 * the regular expression `unfinished` says.
 * @typedef {{speech: number, begin_seconds: number, run_in_seconds: number, recognise_seconds: number,
 *   finished_seconds: number, unfinished_seconds: number, unfinished: string}} EndOfSpeech
 * @typedef {"begin" | "recognise" | "resume" | "end"} TurnEvent
 */

export class Turns {
  #settings;
  #unfinished;
  #fps;
  #longest; // frames
  #speech = 0; // frames of it in a row
  #silence = 0; // frames of it since the last speech
  #lasted = 0; // frames of the turn, since it began
  inTurn = false; // somebody speaks, or may go on
  /** @type {string | null} what was recognised since the last speech */
  #text = null;

  /**
   * @param {EndOfSpeech} settings
   * @param {number} fps
   * @param {number} longest seconds after which a turn ends whatever is heard, once its text is known
   */
  constructor(settings, fps, longest) {
    this.#settings = settings;
    this.#unfinished = new RegExp(settings.unfinished, "i");
    this.#fps = fps;
    this.#longest = this.#frames(longest);
  }

  /**
   * The next frame.
   * @param {number} probability of speech
   * @returns {TurnEvent | null} what it means; `resume`: what was recognised was not all
   */
  push(probability) {
    const speaks = probability > this.#settings.speech;
    this.#speech = speaks ? this.#speech + 1 : 0;
    if (!this.inTurn) {
      this.inTurn = speaks && this.#speech >= this.#frames(this.#settings.begin_seconds);
      return this.inTurn ? "begin" : null;
    }
    if (this.#lasted >= this.#longest) return null; // all that matters is its text
    const recognise = this.#frames(this.#settings.recognise_seconds);
    const resumes = speaks && this.#silence >= recognise;
    this.#lasted++;
    this.#silence = speaks ? 0 : this.#silence + 1;
    if (speaks) this.#text = null;
    if (this.#silence === recognise || (this.#silence < recognise && this.#lasted >= this.#longest)) return "recognise";
    return resumes ? "resume" : this.#decide();
  }

  /**
   * What was said up to the silence that lasts, or up to the turn's greatest length.
   * @param {string} text
   * @returns {TurnEvent | null}
   */
  recognised(text) {
    if (!this.inTurn || !(this.#silence || this.#lasted >= this.#longest)) return null;
    this.#text = text.trim();
    return this.#decide();
  }

  /** Seconds of silence that are still wanted; 0 where the turn is over, or its text not known. */
  get left() {
    if (this.#text === null) return 0;
    const { finished_seconds, unfinished_seconds } = this.#settings;
    const silence = this.#frames(this.#unfinished.test(this.#text) ? unfinished_seconds : finished_seconds);
    return Math.max(0, Math.min(silence - this.#silence, this.#longest - this.#lasted)) / this.#fps;
  }

  /** @returns {"end" | null} */
  #decide() {
    if (this.#text === null || this.left > 0) return null;
    this.inTurn = false;
    this.#text = null;
    this.#silence = this.#lasted = 0;
    return "end";
  }
  /** @param {number} seconds */
  #frames(seconds) {
    return Math.round(seconds * this.#fps);
  }
}
