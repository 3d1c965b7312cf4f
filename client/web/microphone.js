/** The microphone, at the server's rate. */

import { Resampler } from "./samples.js";

/** @type {Record<string, string>} sentences for what `getUserMedia` throws */
const REASONS = {
  NotAllowedError: "The microphone is not allowed. Allow it in the browser's address bar, then try again.",
  NotFoundError: "There is no microphone on this device.",
  NotReadableError: "The microphone is in use by another program.",
};

export class Microphone {
  #context;
  #media;

  /**
   * @param {AudioContext} context
   * @param {MediaStream} media
   */
  constructor(context, media) {
    this.#context = context;
    this.#media = media;
  }

  /**
   * Ask for it and begin.
   * @param {number} rate Hz
   * @param {(samples: Float32Array) => void} heard
   * @throws {Error} with a sentence that says why there is none
   */
  static async open(rate, heard) {
    if (!globalThis.isSecureContext || !navigator.mediaDevices) {
      throw new Error("A browser gives the microphone to secure pages alone: open this one by https, or on 127.0.0.1.");
    }
    let media;
    try {
      media = await navigator.mediaDevices.getUserMedia({
        audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
      });
    } catch (error) {
      const { name, message } = /** @type {DOMException} */ (error);
      throw new Error(REASONS[name] ?? `The microphone can't be used: ${message}`);
    }
    const context = new AudioContext(); // at the device's rate: Firefox takes a microphone at no other
    try {
      await context.audioWorklet.addModule(new URL("microphone-worklet.js", import.meta.url));
      const packets = new AudioWorkletNode(context, "packets", { numberOfOutputs: 0, channelCount: 1 });
      const resampler = new Resampler(context.sampleRate, rate);
      packets.port.onmessage = ({ data }) => heard(resampler.push(data));
      new MediaStreamAudioSourceNode(context, { mediaStream: media }).connect(packets);
      await context.resume();
    } catch (error) {
      for (const track of media.getTracks()) track.stop();
      await context.close();
      throw error;
    }
    return new Microphone(context, media);
  }

  /**
   * Call back when the device is taken away.
   * @param {() => void} gone
   */
  onGone(gone) {
    for (const track of this.#media.getTracks()) track.addEventListener("ended", gone);
  }

  close() {
    for (const track of this.#media.getTracks()) track.stop();
    this.#context.close();
  }
}
