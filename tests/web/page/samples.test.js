import assert from "node:assert/strict";
import { test } from "node:test";
import { cutInPauses, Resampler, Tape } from "../../../client/web/samples.js";

/** Pseudo-random numbers in [0, 1), the same each time. */
function random(seed) {
  let state = seed;
  return () => {
    state = (1664525 * state + 1013904223) % 2 ** 32;
    return state / 2 ** 32;
  };
}

test("a tape keeps every sample where it was put, whatever was done to it", () => {
  for (let seed = 0; seed < 50; seed++) {
    const next = random(seed);
    const tape = new Tape();
    let model = []; // every sample ever
    let forgotten = 0;
    for (let step = 0; step < 40; step++) {
      const size = Math.floor(3000 * next());
      const kind = Math.floor(3 * next());
      if (kind === 0) {
        const samples = Float32Array.from({ length: size }, next);
        tape.append(samples);
        model.push(...samples);
      } else if (kind === 1) {
        const end = Math.max(forgotten, model.length - 1000 + size);
        tape.endAt(end);
        model = Array.from({ length: end }, (_, place) => model[place] ?? 0);
      } else {
        forgotten = Math.max(forgotten, model.length - size);
        tape.forget(forgotten);
      }
      assert.equal(tape.end, model.length);
      const begin = forgotten + Math.floor(next() * (tape.end - forgotten));
      const expected = Array.from({ length: 500 }, (_, place) => model[begin + place] ?? 0);
      assert.deepEqual([...tape.read(begin, begin + 500)], expected);
    }
  }
});

test("a tape reads silence before its start and after its end", () => {
  const tape = new Tape();
  tape.append(Float32Array.of(1, 2));
  assert.deepEqual([...tape.read(-2, 4)], [0, 0, 1, 2, 0, 0]);
});

test("a tape that forgets beyond its end goes on there", () => {
  const tape = new Tape();
  tape.append(Float32Array.of(1, 2));
  tape.forget(1e9);
  tape.append(Float32Array.of(3));
  assert.deepEqual([...tape.read(1e9 - 1, 1e9 + 2)], [0, 3, 0]);
});

function sine(frequency, rate, seconds) {
  return Float32Array.from({ length: rate * seconds }, (_, place) =>
    Math.sin((2 * Math.PI * frequency * place) / rate),
  );
}

for (const rate of [8000, 22050, 44100, 48000, 96000]) {
  test(`${rate} Hz become 16 kHz: a tone stays what it is, at its place`, () => {
    const top = Math.min(6000, 0.4 * rate);
    for (const frequency of [100, 1000, top]) {
      const converted = new Resampler(rate, 16000).push(sine(frequency, rate, 0.5));
      const expected = sine(frequency, 16000, 0.5);
      assert.ok(Math.abs(converted.length - expected.length) < 200);
      for (let place = 400; place < converted.length; place++) {
        assert.ok(Math.abs(converted[place] - expected[place]) < 2e-3, `${frequency} Hz differ at ${place}`);
      }
    }
  });
}

test("what 16 kHz can't hold is not folded into it", () => {
  const converted = new Resampler(48000, 16000).push(sine(9500, 48000, 0.5));
  assert.ok(converted.slice(400).every(value => Math.abs(value) < 2e-3));
});

test("the result of a conversion does not depend on the packets", () => {
  const sound = sine(440, 44100, 0.3);
  const whole = new Resampler(44100, 16000).push(sound);
  for (const size of [1, 128, 441, 3001]) {
    const resampler = new Resampler(44100, 16000);
    const parts = [];
    for (let begin = 0; begin < sound.length; begin += size) {
      parts.push(...resampler.push(sound.subarray(begin, begin + size)));
    }
    assert.deepEqual(parts, [...whole]);
  }
});

test("the same rate in and out changes next to nothing", () => {
  const sound = sine(440, 16000, 0.2);
  const same = new Resampler(16000, 16000).push(sound);
  for (let place = 100; place < same.length; place++) assert.ok(Math.abs(same[place] - sound[place]) < 2e-3);
});

test("a long recording is cut where it is quiet, and nothing of it is lost", () => {
  const sound = Float32Array.from({ length: 50_000 }, (_, place) =>
    place > 8000 && place < 9000 ? 0 : Math.sin(place),
  );
  const pieces = cutInPauses(sound, 12_000, 1000);
  assert.ok(pieces.every(piece => piece.length > 0 && piece.length <= 12_000));
  assert.ok(pieces[0].length > 8000 && pieces[0].length < 9000);
  assert.deepEqual(
    pieces.flatMap(piece => [...piece]),
    [...sound],
  );
  assert.deepEqual(cutInPauses(new Float32Array(0), 12_000, 1000), []);
});
