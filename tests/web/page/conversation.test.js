import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { mock, test } from "node:test";
import { Conversation } from "../../../client/web/conversation.js";
import { script } from "../../../client/web/replies.js";
import { Stream } from "../../../client/web/stream.js";
import { pause, TalksplatError } from "../../../client/web/triton.js";
import { answer, asked, clock, ScriptedScreen, strings } from "./scripted.js";

mock.timers.enable({ apis: ["setTimeout"] });

const agreed = new URL("../../../client/talksplat_client/conversation.json", import.meta.url);
const { end_of_speech: settings } = JSON.parse(await readFile(agreed, "utf8"));
const rules = [{ hears: "", says: "I heard you. I am a script." }];
const SPEECH = 0.5; // of a second, that a sentence takes

/** Models that hear speech in whatever is not silence, recognise what the test says, and speak half a second a sentence. */
class ScriptedModels {
  requests = [];
  text = "A large coffee, please.";
  conversations = []; // that were answered
  refuses = false;

  async infer(model, request, { signal }) {
    const tensors = asked(request);
    const entry = { model, ...tensors, dropped: false };
    this.requests.push(entry);
    signal.addEventListener("abort", () => {
      entry.dropped = !entry.answered;
    });
    await pause({ vad: 0.01, transcribe: 0.06, tts: 0.03 }[model] ?? 0.02, signal);
    entry.answered = true;
    return this[model]?.(tensors) ?? this.frames(tensors);
  }

  vad({ AUDIO }) {
    assert.equal(AUDIO.length, clock.window);
    const frames = Array.from({ length: 4 }, (_, n) => AUDIO[clock.window - (4 - n) * clock.samplesPerFrame + 320] !== 0);
    return answer({
      LATEST: ["FP32", [1, 4], Buffer.from(Float32Array.from(frames, yes => (yes ? 0.9 : 0.1)).buffer)],
    });
  }

  transcribe() {
    return answer({ TEXT: ["BYTES", [1], strings(this.text)] });
  }

  tts({ START }) {
    if (this.refuses) throw new TalksplatError("invalid", "This text is not prepared.");
    const samples = SPEECH * clock.sampleRate;
    const piece = new Float32Array(Math.min(4000, samples - START)).fill(0.25);
    const total = Buffer.alloc(8);
    total.writeBigInt64LE(BigInt(samples));
    return answer({ AUDIO: ["FP32", [piece.length], Buffer.from(piece.buffer)], SAMPLES: ["INT64", [1], total] });
  }

  frames({ FRAME_INDEX }) {
    const frames = Array.from({ length: clock.chunkFrames }, (_, number) => String(FRAME_INDEX + number));
    return answer({ FRAMES: ["BYTES", [1, clock.chunkFrames], strings(...frames)] });
  }

  of(model) {
    return this.requests.filter(each => each.model === model);
  }
}

function remembering({ answer }, { conversations }) {
  return {
    answer: (messages, signal) => {
      conversations.push(messages);
      return answer(messages, signal);
    },
  };
}

async function talking(use) {
  const models = new ScriptedModels();
  const screen = new ScriptedScreen();
  const decode = async () => ({ close: () => {} });
  const stream = new Stream(models, clock, screen, { avatar: "kim", model: "animate", seed: 0 }, decode);
  const told = { states: [], captions: [], problems: [], stages: {} };
  const conversation = new Conversation(models, clock, stream, settings, () => remembering(script(rules), models), {
    state: state => told.states.push(state),
    caption: (who, text, final) => final && told.captions.push(`${who}: ${text}`),
    stages: stages => Object.assign(told.stages, stages),
    problem: error => told.problems.push(error.message),
  });
  const running = assert.rejects(stream.run(), { name: "AbortError" });
  /** So many seconds before the microphone. */
  const hear = async (loudness, seconds) => {
    for (let packet = 0; packet < 100 * seconds; packet++) {
      conversation.hear(new Float32Array(clock.sampleRate / 100).fill(loudness));
      await screen.run(0.01);
    }
  };
  await hear(0, 0.4);
  await use({
    models,
    screen,
    stream,
    conversation,
    told,
    speak: each => hear(0.3, each),
    wait: each => hear(0, each),
  });
  conversation.close();
  stream.stop();
  await running;
}

test("who speaks is answered", () =>
  talking(async ({ told, models, speak, wait }) => {
    await speak(1);
    await wait(3);
    assert.deepEqual(told.states, ["listening", "thinking", "speaking", "idle"]);
    assert.deepEqual(told.captions, ["you: A large coffee, please.", "avatar: I heard you.", "avatar: I am a script."]);
    assert.deepEqual(told.problems, []);
    const heard = models.of("transcribe")[0].AUDIO;
    const silent = heard.findLastIndex(Boolean);
    assert.ok(heard.indexOf(heard.find(Boolean)) > 0, "nothing is cut off at the beginning");
    assert.equal(heard.filter(Boolean).length, clock.sampleRate);
    assert.ok(heard.length - silent < 0.3 * clock.sampleRate);
    for (const stage of ["endOfSpeech", "recognition", "reply", "voice", "firstFrame", "answer"]) {
      assert.ok(Number.isFinite(told.stages[stage]), stage);
    }
  }));

test("the answer is there before it is certain that the user has ended", () =>
  talking(async ({ told, models, speak, wait }) => {
    await speak(1);
    while (!told.states.includes("thinking")) {
      await wait(0.01);
    }
    assert.ok(models.of("tts").some(({ answered }) => answered));
    assert.ok(models.of("animate").some(({ answered }) => answered));
    assert.deepEqual(told.states, ["listening", "thinking"]);
    await wait(0.1);
    assert.deepEqual(told.states, ["listening", "thinking", "speaking"]);
  }));

test("who does not stop is answered after the greatest length, and then again", () =>
  talking(async ({ told, models, speak, wait }) => {
    await speak(clock.maxUtteranceSeconds + 2);
    await wait(2);
    const [first, second] = told.captions.filter(each => each.startsWith("you"));
    assert.ok(first && second);
    const heard = models.of("transcribe").map(({ AUDIO }) => AUDIO.filter(Boolean).length / clock.sampleRate);
    assert.ok(Math.max(...heard) <= clock.maxUtteranceSeconds + settings.run_in_seconds);
    assert.ok(heard.reduce((sum, each) => sum + each) > clock.maxUtteranceSeconds + 1.5);
  }));

test("of an interrupted answer what was heard is remembered, with a dash", () =>
  talking(async ({ models, told, conversation, screen, speak, wait }) => {
    const whole = conversation.say("One of these. Two and three and four and five.");
    while (told.captions.length < 2) await screen.run(0.01);
    await screen.run(0.2);
    await speak(0.6);
    await wait(3);
    await whole;
    const [said] = models.conversations[0];
    assert.equal(said.role, "assistant");
    assert.match(said.content, /^One of these\. Two and .* —$/);
    assert.doesNotMatch(said.content, /five/);
  }));

test("who goes on after a pause is not cut off", () =>
  talking(async ({ told, models, speak, wait }) => {
    await speak(0.6);
    await wait(0.24);
    await speak(0.6);
    await wait(3);
    assert.deepEqual(told.states, ["listening", "thinking", "speaking", "idle"]);
    assert.equal(told.captions.filter(each => each.startsWith("you")).length, 1);
    const heard = models.of("transcribe").at(-1).AUDIO;
    assert.equal(heard.filter(Boolean).length, 1.2 * clock.sampleRate);
  }));

test("a text that does not sound finished is waited for longer", () =>
  talking(async ({ told, models, speak, wait }) => {
    models.text = "I would like a";
    await speak(1);
    await wait((settings.finished_seconds + settings.unfinished_seconds) / 2);
    assert.deepEqual(told.states, ["listening"]);
    await wait(settings.unfinished_seconds);
    assert.ok(told.states.includes("thinking"));
  }));

test("a noise without words is no turn", () =>
  talking(async ({ told, models, speak, wait }) => {
    models.text = "";
    await speak(0.3);
    await wait(2);
    assert.deepEqual(told.states, ["listening", "idle"]);
    assert.deepEqual(told.captions, []);
    assert.equal(models.of("tts").length, 0);
  }));

test("a noise that ends while the avatar says something else does not end that", () =>
  talking(async ({ told, models, conversation, speak, wait }) => {
    models.text = "";
    await speak(0.3);
    conversation.say("One. Two. Three. Four. Five.");
    await wait(1);
    assert.deepEqual(told.states, ["listening", "thinking", "speaking"]);
    await wait(3);
    assert.equal(told.states.at(-1), "idle");
  }));

test("a turn in which speech can no longer be detected is given up", () =>
  talking(async ({ told, models, stream, speak, wait }) => {
    await speak(0.5);
    models.vad = () => {
      throw new TalksplatError("unavailable", "away");
    };
    await wait(0.2);
    assert.deepEqual(told.states, ["listening", "idle"]);
    delete models.vad;
    await wait(2);
    assert.equal(models.of("transcribe").length, 0);
    assert.deepEqual(told.problems, []);
    await speak(1);
    await wait(3);
    assert.deepEqual(told.states.slice(2), ["listening", "thinking", "speaking", "idle"]);
  }));

test("who interrupts the avatar silences it, and is heard from the first word", () =>
  talking(async ({ told, models, screen, stream, speak, wait }) => {
    await speak(1);
    while (!told.states.includes("speaking")) await wait(0.01);
    const before = models.of("transcribe").length;
    await speak(0.2); // begin_seconds, and what the models take
    assert.equal(screen.hushed, 1);
    assert.equal(stream.speaking, false);
    assert.equal(told.states.at(-1), "listening");
    await speak(0.4);
    await wait(3);
    assert.deepEqual(told.states.slice(3), ["listening", "thinking", "speaking", "idle"]);
    const heard = models.of("transcribe").slice(before).at(-1).AUDIO;
    assert.equal(heard.filter(Boolean).length, 0.6 * clock.sampleRate);
    assert.ok(told.stages.interruption > 0);
  }));

test("a noise silences the avatar, which then goes on where it was", () =>
  talking(async ({ told, models, screen, conversation, stream, speak, wait }) => {
    const done = conversation.say("One. Two and three. Four. Five.");
    while (told.captions.length < 2) await screen.run(0.01);
    models.text = "";
    await speak(0.3);
    assert.equal(screen.hushed, 1);
    assert.equal(stream.speaking, false);
    assert.equal(told.states.at(-1), "listening");
    await wait(4);
    await done;
    assert.deepEqual(told.states, ["thinking", "speaking", "listening", "speaking", "idle"]);
    assert.deepEqual(told.captions, ["avatar: One.", "avatar: Two and three.", "avatar: Four.", "avatar: Five."]);
    assert.equal(models.of("tts").length, 8); // two pieces a sentence, none of them asked for again
    models.text = "And?";
    await speak(0.6);
    await wait(3);
    assert.equal(models.conversations.at(-1)[0].content, "One. Two and three. Four. Five.");
  }));

test("who stops the avatar while a noise is heard stops it for good", () =>
  talking(async ({ told, models, screen, conversation, stream, speak, wait }) => {
    const done = conversation.say("One. Two. Three. Four.");
    while (told.captions.length < 2) await screen.run(0.01);
    models.text = "";
    await speak(0.3);
    conversation.interrupt();
    await wait(3);
    await done;
    assert.equal(stream.speaking, false);
    assert.deepEqual(told.captions, ["avatar: One.", "avatar: Two."]);
    assert.equal(told.states.at(-1), "idle");
  }));

test("a text is spoken, with captions when they are heard", () =>
  talking(async ({ told, screen, conversation }) => {
    const done = conversation.say("One. Two!");
    await screen.run(0.5);
    assert.deepEqual(told.captions, ["avatar: One."]);
    await screen.run(2);
    await done;
    assert.deepEqual(told.captions, ["avatar: One.", "avatar: Two!"]);
    assert.equal(screen.shown.flatMap(({ sound }) => [...sound]).filter(Boolean).length, 2 * SPEECH * clock.sampleRate);
    assert.deepEqual(told.states, ["thinking", "speaking", "idle"]);
  }));

test("a text that the server can't speak is refused in its words", () =>
  talking(async ({ told, models, screen, conversation }) => {
    models.refuses = true;
    const done = conversation.say("Anything.");
    await screen.run(1);
    await done;
    assert.deepEqual(told.problems, ["This text is not prepared."]);
    assert.equal(told.states.at(-1), "idle");
  }));

test("a recording is spoken whole, with what is said in it", () =>
  talking(async ({ told, models, screen, conversation }) => {
    models.text = "What is recorded.";
    const done = conversation.play(new Float32Array(12 * clock.sampleRate).fill(0.4));
    await screen.run(14);
    await done;
    assert.equal(screen.shown.flatMap(({ sound }) => [...sound]).filter(Boolean).length, 12 * clock.sampleRate);
    assert.deepEqual(told.captions, ["avatar: What is recorded.", "avatar: What is recorded."]); // of ten seconds at most
  }));

test("stopped in mid-sentence, nothing more is asked for or said", () =>
  talking(async ({ told, models, screen, conversation, stream }) => {
    const done = conversation.say("One. Two. Three. Four. Five. Six. Seven. Eight. Nine. Ten. Eleven. Twelve.");
    await screen.run(0.6);
    conversation.interrupt();
    await done;
    const spoken = models.of("tts").length;
    const captions = told.captions.length;
    await screen.run(1);
    assert.equal(models.of("tts").length, spoken);
    assert.equal(told.captions.length, captions);
    assert.equal(stream.speaking, false);
    assert.equal(told.states.at(-1), "idle");
  }));
