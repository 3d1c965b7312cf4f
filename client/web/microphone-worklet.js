/** Hands the microphone's sound to the page in packets of some 10 ms. */

const PACKET_SECONDS = 0.01;

class Packets extends AudioWorkletProcessor {
  #packet = new Float32Array(Math.ceil(PACKET_SECONDS * sampleRate));
  #filled = 0;

  /** @param {Float32Array[][]} inputs */
  process([input]) {
    let rest = input?.[0] ?? new Float32Array();
    while (rest.length) {
      const part = rest.subarray(0, this.#packet.length - this.#filled);
      this.#packet.set(part, this.#filled);
      this.#filled += part.length;
      rest = rest.subarray(part.length);
      if (this.#filled < this.#packet.length) break;
      this.port.postMessage(this.#packet, [this.#packet.buffer]);
      this.#packet = new Float32Array(Math.ceil(PACKET_SECONDS * sampleRate));
      this.#filled = 0;
    }
    return true;
  }
}

registerProcessor("packets", Packets);
