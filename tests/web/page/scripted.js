/** What the tests put in the place of a browser and a server. */

import { mock } from "node:test";
import { Clock } from "../../../client/web/clock.js";
import { Answer } from "../../../client/web/triton.js";

/** Of the model `animate`, as the server tells them. */
export function parameters() {
  const values = {
    sample_rate: "16000",
    fps: "25",
    chunk_frames: "4",
    left_context: "10240",
    look_ahead: "1920",
    max_utterance_seconds: "30",
  };
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, { string_value: value }]));
}

export const clock = new Clock(parameters());

/** An answer of Triton's, from bytes by name: [datatype, shape, bytes]. */
export function answer(outputs) {
  const header = new TextEncoder().encode(
    JSON.stringify({
      outputs: Object.entries(outputs).map(([name, [datatype, shape, data]]) => ({
        name,
        datatype,
        shape,
        parameters: { binary_data_size: data.length },
      })),
    }),
  );
  const parts = [header, ...Object.values(outputs).map(([, , data]) => data)];
  const body = new Uint8Array(Buffer.concat(parts));
  return new Answer(body.buffer, header.length);
}

export function strings(...values) {
  return Buffer.concat(
    values.map(value => {
      const text = Buffer.from(value);
      const length = Buffer.alloc(4);
      length.writeUInt32LE(text.length);
      return Buffer.concat([length, text]);
    }),
  );
}

/** What a request asks, by the name of its tensors. */
export function asked({ inputs }) {
  const found = {};
  for (const { name, datatype, data } of inputs) {
    const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
    if (datatype === "INT64") found[name] = Number(view.getBigInt64(0, true));
    else if (datatype === "FP32") found[name] = new Float32Array(data.slice().buffer);
    else found[name] = new TextDecoder().decode(data.subarray(4));
  }
  return found;
}

/** A screen whose time is advanced by hand, and with it the mocked timers. It shows every frame that is due, in order, and what sounds with it. */
export class ScriptedScreen {
  time = 0;
  epoch = 0;
  queue = [];
  shown = []; // frames
  held = 0; // seconds that frames came too late
  hushed = 0;
  cues = [];
  soundLead = 0;

  frameAfter(seconds) {
    return Math.max(
      Math.ceil((this.time + seconds - this.epoch) * clock.fps - 1e-9),
      (this.shown.at(-1)?.index ?? -1) + 1,
    );
  }

  ahead(frame) {
    return this.epoch + frame / clock.fps - this.time;
  }

  place(first, pictures, samples) {
    const late = Math.max(0, -this.ahead(first));
    this.held += late;
    this.epoch += late;
    for (const [number, picture] of pictures.entries()) {
      const sound = samples.slice(number * clock.samplesPerFrame, (number + 1) * clock.samplesPerFrame);
      this.queue.push({ index: first + number, due: this.epoch + (first + number) / clock.fps, picture, sound });
    }
  }

  drop(frame) {
    this.queue = this.queue.filter(({ index }) => index < frame);
  }

  hush() {
    this.hushed++;
    this.cues = [];
  }

  at(frame, cue) {
    this.cues.push({ frame, cue });
  }

  /** Let time pass, and whatever follows from it happen. */
  async run(seconds) {
    const end = this.time + seconds;
    while (this.time < end - 1e-9) {
      this.time += 0.01;
      while (this.queue[0]?.due <= this.time) this.shown.push(this.queue.shift());
      const index = this.shown.at(-1)?.index ?? -1;
      const due = this.cues.filter(({ frame }) => frame <= index);
      this.cues = this.cues.filter(({ frame }) => frame > index);
      for (const { cue } of due) cue();
      mock.timers.tick(10);
      for (let turn = 0; turn < 5; turn++) await new Promise(resolve => setImmediate(resolve));
    }
  }
}
