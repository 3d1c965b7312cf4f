/** Sound as mono float32: by absolute position, at another rate, cut in its pauses. */

/** Samples by absolute position; silence where nothing was recorded. */
export class Tape {
  #start = 0; // of what is kept
  #samples = new Float32Array(4096);
  end = 0;

  /**
   * Record samples at the end.
   * @param {Float32Array} samples
   */
  append(samples) {
    this.#reserve(this.end + samples.length);
    this.#samples.set(samples, this.end - this.#start);
    this.end += samples.length;
  }

  /**
   * A copy of [begin, end); forgotten samples can't be had again.
   * @param {number} begin
   * @param {number} end
   */
  read(begin, end) {
    const out = new Float32Array(end - begin);
    const first = Math.max(begin, this.#start);
    const last = Math.min(end, this.end);
    if (first < last) out.set(this.#samples.subarray(first - this.#start, last - this.#start), first - begin);
    return out;
  }

  /**
   * End here: what was recorded beyond is dropped, what is missing is silence.
   * @param {number} position
   */
  endAt(position) {
    this.#reserve(position);
    const from = Math.min(position, this.end) - this.#start;
    this.#samples.fill(0, Math.max(from, 0));
    this.end = Math.max(position, this.#start);
  }

  /**
   * Keep only what comes from here on; who never recorded so far was silent.
   * @param {number} before
   */
  forget(before) {
    if (before <= this.#start) return;
    this.#samples.copyWithin(0, before - this.#start, Math.max(this.end - this.#start, 0));
    this.end = Math.max(this.end, before);
    this.#samples.fill(0, this.end - before);
    this.#start = before;
  }

  /** @param {number} end */
  #reserve(end) {
    if (end - this.#start <= this.#samples.length) return;
    const larger = new Float32Array(2 * (end - this.#start));
    larger.set(this.#samples.subarray(0, this.end - this.#start));
    this.#samples = larger;
  }
}

const LOBES = 32; // of the sinc on either side
const PASS = 0.94; // of the band is kept whole
const KAISER_BETA = 7; // some 70 dB

/** Converts a stream of any packets to another rate. The result does not depend on how it was cut into packets. */
export class Resampler {
  #phases; // [to][taps]
  #taps;
  #step; // source samples for `to` target samples
  #to;
  #held; // source samples from #first on
  #first; // position of the first held one
  #next = 0; // target sample

  /**
   * @param {number} from Hz
   * @param {number} to Hz
   */
  constructor(from, to) {
    const divisor = greatestCommonDivisor(from, to);
    this.#step = from / divisor;
    this.#to = to / divisor;
    const band = Math.min(1, to / from) * PASS;
    const half = Math.ceil(LOBES / band);
    this.#taps = 2 * half;
    this.#phases = Array.from({ length: this.#to }, (_, phase) => kernel(phase / this.#to, half, band));
    this.#first = -half + 1; // silence before the first sample
    this.#held = new Float32Array(half - 1);
  }

  /**
   * What the packet completes.
   * @param {Float32Array} packet
   */
  push(packet) {
    const held = new Float32Array(this.#held.length + packet.length);
    held.set(this.#held);
    held.set(packet, this.#held.length);
    const half = this.#taps / 2;
    const out = [];
    for (;;) {
      const ticks = this.#next * this.#step; // 1/to of a source sample
      const begin = Math.floor(ticks / this.#to) - half + 1 - this.#first;
      if (begin + this.#taps > held.length) {
        const keep = Math.min(begin, held.length);
        this.#first += keep;
        this.#held = held.slice(keep);
        return Float32Array.from(out);
      }
      const phase = /** @type {Float32Array} */ (this.#phases[ticks % this.#to]);
      let sum = 0;
      for (let tap = 0; tap < phase.length; tap++) {
        sum += /** @type {number} */ (phase[tap]) * /** @type {number} */ (held[begin + tap]);
      }
      out.push(sum);
      this.#next++;
    }
  }
}

/**
 * A windowed sinc's taps for a target sample that lies a fraction of a source sample after tap `half - 1`.
 * @param {number} fraction
 * @param {number} half
 * @param {number} band
 */
function kernel(fraction, half, band) {
  const taps = Float64Array.from({ length: 2 * half }, (_, tap) => {
    const x = tap - half + 1 - fraction;
    const edge = 1 - (x / half) ** 2;
    const kaiser = edge <= 0 ? 0 : bessel(KAISER_BETA * Math.sqrt(edge)) / bessel(KAISER_BETA);
    return kaiser * (x === 0 ? band : Math.sin(Math.PI * band * x) / (Math.PI * x));
  });
  const sum = taps.reduce((total, tap) => total + tap);
  return Float32Array.from(taps, tap => tap / sum); // a constant stays what it is
}

/**
 * Modified Bessel function of the first kind, order 0, by its series.
 * @param {number} x
 */
function bessel(x) {
  let term = 1;
  let sum = 1;
  for (let k = 1; term > 1e-12 * sum; k++) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

/**
 * @param {number} a
 * @param {number} b
 * @returns {number}
 */
function greatestCommonDivisor(a, b) {
  return b ? greatestCommonDivisor(b, a % b) : a;
}

const PAUSE_SECONDS = 0.32; // a cut goes through the middle of the quietest stretch of this length
const STEP_SECONDS = 0.04;

/**
 * Pieces of at most so many samples, cut where it is quietest in the last two thirds of what one may hold.
 * @param {Float32Array} samples
 * @param {number} longest
 * @param {number} sampleRate Hz
 */
export function cutInPauses(samples, longest, sampleRate) {
  const step = Math.round(STEP_SECONDS * sampleRate);
  const steps = Math.round(PAUSE_SECONDS / STEP_SECONDS);
  const pieces = [];
  let rest = samples;
  while (rest.length > longest) {
    const energies = Array.from({ length: Math.floor(longest / step) }, (_, place) =>
      rest.subarray(place * step, (place + 1) * step).reduce((total, value) => total + value * value, 0),
    );
    let softest = Number.POSITIVE_INFINITY;
    let cut = longest;
    for (let place = Math.floor(energies.length / 3); place + steps <= energies.length; place++) {
      const energy = energies.slice(place, place + steps).reduce((total, value) => total + value, 0);
      if (energy < softest) {
        softest = energy;
        cut = (place + steps / 2) * step;
      }
    }
    pieces.push(rest.subarray(0, cut));
    rest = rest.subarray(cut);
  }
  if (rest.length) pieces.push(rest);
  return pieces;
}
