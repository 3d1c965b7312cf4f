import assert from "node:assert/strict";
import { mock, test } from "node:test";
import { Stream } from "../../../client/web/stream.js";
import { TalksplatError } from "../../../client/web/triton.js";
import { answer, asked, clock, ScriptedScreen, strings } from "./scripted.js";

mock.timers.enable({ apis: ["setTimeout"] });

/** A server whose frames tell their index; each answer takes some ms. */
class ScriptedTriton {
  requests = [];
  milliseconds = () => 30;
  fail = () => null;

  async infer(model, request, { signal, recovery }) {
    const tensors = asked(request);
    this.requests.push({ model, ...request.parameters, ...tensors });
    assert.equal(recovery, Number.POSITIVE_INFINITY);
    for (;;) {
      await new Promise(resolve => setTimeout(resolve, this.milliseconds(tensors.FRAME_INDEX)));
      signal.throwIfAborted();
      const failure = this.fail();
      if (!failure) break;
      if (failure.kind !== "unavailable") throw failure;
    }
    const frames = Array.from({ length: clock.chunkFrames }, (_, number) => String(tensors.FRAME_INDEX + number));
    return answer({ FRAMES: ["BYTES", [1, clock.chunkFrames], strings(...frames)] });
  }
}

async function watching(use) {
  const triton = new ScriptedTriton();
  const screen = new ScriptedScreen();
  let open = 0; // pictures
  const decode = async jpeg => {
    open++;
    return { index: Number(new TextDecoder().decode(jpeg)), close: () => open-- };
  };
  const stream = new Stream(triton, clock, screen, { avatar: "kim", model: "animate_huma1", seed: 7 }, decode);
  const running = stream.run();
  await use({ stream, screen, triton, running });
  stream.stop();
  await assert.rejects(running, { name: "AbortError" });
}

/** Every frame once, in order, and the one that was asked for. */
function assertWhole({ shown }) {
  for (const [place, { index, picture }] of shown.entries()) {
    assert.equal(index, shown[0].index + place);
    assert.equal(picture.index, index);
  }
}

const tone = seconds =>
  Float32Array.from({ length: seconds * clock.sampleRate }, (_, place) => 0.1 + (place % 1000) / 2000);

/** What was heard of a tone, from its first sample to its last. */
function heard({ shown }) {
  const sound = shown.flatMap(({ sound }) => [...sound]);
  return Float32Array.from(sound.slice(sound.findIndex(Boolean), sound.findLastIndex(Boolean) + 1));
}

test("at rest every frame is shown once, in order, from the rasterizer", () =>
  watching(async ({ screen, triton }) => {
    triton.milliseconds = first => (first % 8 ? 70 : 20); // the second overtakes the first
    await screen.run(2);
    assert.ok(screen.shown.length > 45);
    assertWhole(screen);
    assert.ok(triton.requests.every(({ model, AUDIO, seed }) => model === "rasterizer" && !AUDIO && seed === 7));
    const ahead = triton.requests.at(-1).FRAME_INDEX - screen.shown.at(-1).index;
    assert.ok(ahead <= 18, `${ahead} frames ahead`);
  }));

test("a voice begins within a chunk of rest; nothing of it is lost, no frame comes twice", () =>
  watching(async ({ stream, screen, triton }) => {
    await screen.run(1.03);
    const begun = screen.time;
    let first = 0;
    const voice = stream.speak();
    voice.push(tone(1), () => {
      first = screen.time - begun;
    });
    voice.end();
    await screen.run(2.5);
    await voice.done;
    assert.ok(first > 0 && first < 0.25, `the first frame came after ${first} s`);
    assertWhole(screen);
    assert.deepEqual(heard(screen), tone(1));
    const spoken = triton.requests.filter(({ model }) => model === "animate_huma1");
    assert.ok(spoken.every(({ AUDIO }) => AUDIO.length === clock.window));
    assert.equal(stream.speaking, false);
  }));

test("each window holds the sound of its own place", () =>
  watching(async ({ stream, screen, triton }) => {
    await screen.run(0.5);
    const voice = stream.speak();
    voice.push(tone(1));
    voice.end();
    await screen.run(2);
    const sounds = new Map(screen.shown.map(({ index, sound }) => [index, sound]));
    const last = new Map(triton.requests.filter(({ AUDIO }) => AUDIO).map(each => [each.FRAME_INDEX, each.AUDIO]));
    assert.ok(last.size > 6);
    for (const [first, window] of last) {
      const chunk = window.slice(clock.leftContext, clock.leftContext + clock.chunk);
      const shown = Array.from({ length: 4 }, (_, n) => sounds.get(first + n)).flatMap(sound => [...(sound ?? [])]);
      if (shown.some(Boolean)) assert.deepEqual([...chunk], shown);
    }
  }));

test("a voice that comes in pieces, some of them late, is heard whole and in order", () =>
  watching(async ({ stream, screen }) => {
    await screen.run(0.4);
    const sound = tone(2.1);
    const voice = stream.speak();
    const sizes = [3001, 500, 12_345, 1, 9000];
    let begin = 0;
    for (const size of sizes) {
      voice.push(sound.subarray(begin, begin + size));
      begin += size;
      await screen.run(0.1);
    }
    voice.push(sound.subarray(begin));
    voice.end();
    await screen.run(3);
    assertWhole(screen);
    const whole = screen.shown.flatMap(({ sound: each }) => [...each]).filter(Boolean);
    assert.deepEqual(Float32Array.from(whole), sound);
  }));

test("a pause between sentences is not spoken away: the face rests, and goes on at once", () =>
  watching(async ({ stream, screen }) => {
    await screen.run(0.4);
    const voice = stream.speak();
    voice.push(tone(0.5));
    await screen.run(1.5);
    const before = screen.time;
    let late = 0;
    voice.push(tone(0.5), () => {
      late = screen.time - before;
    });
    voice.end();
    await screen.run(1.5);
    await voice.done;
    assert.ok(late > 0 && late < 0.25, `${late} s`);
    assertWhole(screen);
    assert.equal(screen.shown.flatMap(({ sound }) => [...sound]).filter(Boolean).length, clock.sampleRate);
  }));

test("who is interrupted falls silent at once, and the frames go on", () =>
  watching(async ({ stream, screen, triton }) => {
    await screen.run(0.4);
    const voice = stream.speak();
    voice.push(tone(10));
    await screen.run(1);
    const sofar = screen.shown.at(-1).index;
    stream.hush();
    await voice.done;
    assert.equal(screen.hushed, 1);
    voice.push(tone(1)); // comes too late
    await screen.run(1.5);
    assertWhole(screen);
    const sounding = screen.shown.filter(({ sound }) => sound.some(Boolean)).at(-1).index;
    assert.ok(sounding - sofar <= 5, `${sounding - sofar} frames of it`);
    assert.equal(triton.requests.at(-1).model, "rasterizer");
    assert.equal(stream.speaking, false);
  }));

test("a voice is made ready, and shown when it is released", () =>
  watching(async ({ stream, screen, triton }) => {
    await screen.run(0.5);
    const before = screen.held;
    const voice = stream.prepare(0.2);
    let first = 0;
    voice.push(tone(1), () => {
      first = screen.time;
    });
    voice.end();
    await screen.run(0.26); // longer than was announced
    assert.ok(triton.requests.some(({ AUDIO }) => AUDIO));
    assert.equal(heard(screen).length, 0);
    assert.equal(first, 0);
    voice.release();
    const released = screen.time;
    await screen.run(1.5);
    await voice.done;
    assert.ok(first - released < 0.02, `${first - released} s`);
    assertWhole(screen);
    assert.deepEqual(heard(screen), tone(1));
    assert.ok(screen.held - before < 0.11, `${screen.held - before} s`);
  }));

test("of a voice that was made ready in vain nothing is seen or heard", () =>
  watching(async ({ stream, screen }) => {
    await screen.run(0.5);
    const voice = stream.prepare(0.2);
    voice.push(tone(1), () => assert.fail("it was not released"));
    await screen.run(0.3);
    stream.hush();
    await screen.run(1.5);
    assertWhole(screen);
    assert.ok(screen.shown.length > 45);
    assert.equal(heard(screen).length, 0);
  }));

test("a voice that takes the place of another begins without it", () =>
  watching(async ({ stream, screen }) => {
    await screen.run(0.4);
    const first = stream.speak();
    first.push(tone(3));
    await screen.run(0.7);
    const second = stream.speak();
    await first.done;
    second.push(new Float32Array(8000).fill(-0.5));
    second.end();
    await screen.run(1.5);
    await second.done;
    assertWhole(screen);
    const negative = screen.shown.flatMap(({ sound }) => [...sound]).filter(value => value < 0);
    assert.equal(negative.length, 8000);
  }));

test("after the server was away the stream goes on at its frame", () =>
  watching(async ({ stream, screen, triton }) => {
    await screen.run(0.5);
    const voice = stream.speak();
    voice.push(tone(2));
    voice.end();
    await screen.run(0.3);
    triton.fail = () => new TalksplatError("unavailable", "away");
    await screen.run(3);
    const stuck = screen.shown.at(-1).index;
    triton.fail = () => null;
    await screen.run(3);
    await voice.done;
    assertWhole(screen);
    assert.ok(screen.held > 1);
    assert.ok(screen.shown.at(-1).index > stuck + 50);
    assert.deepEqual(heard(screen), tone(2));
  }));

test("a voice that comes while the server is away begins as soon as it is back", () =>
  watching(async ({ stream, screen, triton }) => {
    await screen.run(0.5);
    triton.fail = () => new TalksplatError("unavailable", "away");
    await screen.run(3);
    const voice = stream.speak();
    voice.push(tone(0.5));
    voice.end();
    triton.fail = () => null;
    await screen.run(1.5);
    await voice.done;
    assertWhole(screen);
    assert.deepEqual(heard(screen), tone(0.5));
  }));

test("an error that patience does not help ends the stream", async () => {
  const triton = new ScriptedTriton();
  triton.fail = () => new TalksplatError("unknown", "There is no avatar.");
  const screen = new ScriptedScreen();
  const stream = new Stream(triton, clock, screen, { avatar: "kim", model: "animate", seed: 0 });
  const refused = assert.rejects(stream.run(), { kind: "unknown" });
  await screen.run(0.2);
  await refused;
});

test("the face turns to listening and back without a jump", () =>
  watching(async ({ stream, screen, triton }) => {
    await screen.run(0.5);
    stream.listening = 1;
    const shown = screen.shown.at(-1).index;
    await screen.run(1);
    const turned = triton.requests.find(({ listening }) => listening > 0).FRAME_INDEX;
    assert.ok(turned - shown <= 10, `it took ${turned - shown} frames`);
    stream.listening = 0;
    await screen.run(1);
    const last = new Map(triton.requests.map(each => [each.FRAME_INDEX, each]));
    assertWhole(screen);
    const levels = [...last.values()].sort((a, b) => a.FRAME_INDEX - b.FRAME_INDEX);
    for (const [place, { listening = 0, listening_before = 0 }] of levels.entries()) {
      assert.equal(listening_before, levels[place - 1]?.listening ?? 0);
      assert.ok(Math.abs(listening - listening_before) <= 50);
    }
    assert.ok(levels.some(({ listening }) => listening === 100));
    assert.equal(levels.at(-1).listening ?? 0, 0);
  }));

test("at rest nothing is asked for while nobody looks; a voice is", () =>
  watching(async ({ stream, screen, triton }) => {
    await screen.run(0.5);
    stream.paused = true;
    await screen.run(0.5);
    const asked = triton.requests.length;
    await screen.run(0.5);
    assert.equal(triton.requests.length, asked);
    const voice = stream.speak();
    voice.push(tone(0.5));
    voice.end();
    await screen.run(1.5);
    await voice.done;
    assertWhole(screen);
    assert.deepEqual(heard(screen), tone(0.5));
  }));
