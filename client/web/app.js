/** The page: finds the server, shows an avatar, and lets one talk to it. */

import { Conversation } from "./conversation.js";
import { Microphone } from "./microphone.js";
import { avatars, preload } from "./models.js";
import { Player } from "./player.js";
import { languageModel, script } from "./replies.js";
import { Stream } from "./stream.js";
import { pause, TalksplatError, Triton } from "./triton.js";

/** @import { Stages, State } from "./conversation.js" */

const AGAIN_SECONDS = 2; // until a server that was never there is asked again
const READING_SECONDS = 12; // that a message is shown
const SUBTITLE_SECONDS = 5; // after the last word
const METER_MS = 500; // between two looks
const SLOW_MS = 500; // a full bar

/** @type {Record<State, string>} */
const TOLD = {
  idle: "Ready",
  listening: "Listening",
  thinking: "One moment",
  speaking: "Speaking",
};
/** @type {[keyof Stages, string][]} */
const STAGES = [
  ["endOfSpeech", "End of speech"],
  ["recognition", "Recognition"],
  ["reply", "Reply"],
  ["voice", "Voice"],
  ["firstFrame", "First frame"],
  ["answer", "Until the answer"],
  ["interruption", "Interruption"],
];

/**
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} type
 * @returns {T}
 */
function element(id, type) {
  const found = document.getElementById(id);
  if (!(found instanceof type)) throw new Error(`The page lacks #${id}.`);
  return found;
}

const stage = /** @type {HTMLElement} */ (document.querySelector(".stage"));
const canvas = element("face", HTMLCanvasElement);
const picker = element("avatar", HTMLSelectElement);
const loading = element("loading", HTMLElement);
const stopped = element("stopped", HTMLElement);
const subtitle = element("subtitle", HTMLElement);
const status = element("state", HTMLElement);
const problem = element("problem", HTMLElement);
const talk = element("talk", HTMLButtonElement);
const text = element("text", HTMLInputElement);
const say = element("say", HTMLButtonElement);
const openFile = element("open-file", HTMLButtonElement);
const file = element("file", HTMLInputElement);
const stop = element("stop", HTMLButtonElement);
const captions = element("captions", HTMLElement);
const answers = element("answers", HTMLElement);
const settings = element("settings", HTMLDialogElement);
const settingsForm = /** @type {HTMLFormElement} */ (settings.querySelector("form"));
const settingsProblem = element("settings-problem", HTMLElement);
const summary = element("summary", HTMLElement);
const meter = /** @type {HTMLDetailsElement} */ (document.querySelector(".meter"));
const stageList = element("stages", HTMLElement);

const triton = new Triton(newId());
/** @type {import("./clock.js").Clock} */
let clock;
/** @type {Player | undefined} */
let player;
/** @type {Stream | undefined} */
let stream;
/** @type {Conversation | undefined} */
let conversation;
/** @type {{end_of_speech: import("./turns.js").EndOfSpeech, script: import("./replies.js").Rule[]}} */
let agreed; // with the Python client
/** @type {Microphone | null} */
let microphone = null;
let asking = false; // for the microphone
let beginning = new AbortController(); // what was begun last, of connecting and loading; what was before is given up
/** @type {State | "starting" | "stopped"} */
let state = "starting";
/** @type {Stages} */
let stages = {};
let reconnects = 0;
/** @type {{who: "you" | "avatar", text: string}[]} */
const said = [];

/** What this viewer's requests are known by: 96 bits, which nobody can guess. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return btoa(String.fromCharCode(...bytes))
    .replaceAll("+", "-")
    .replaceAll("/", "_");
}

// Settings

/** @param {"key" | "url" | "model" | "modelKey"} name */
function setting(name) {
  return sessionStorage.getItem(`talksplat.${name}`) ?? "";
}

function responder() {
  const url = setting("url");
  return url ? languageModel({ url, model: setting("model"), key: setting("modelKey") }) : script(agreed.script);
}

function applySettings() {
  triton.key = setting("key");
  answers.textContent = setting("url")
    ? `Answers come from ${setting("model") || "a language model"}.`
    : "Answers come from a short script.";
}

/** @param {string} [why] it is opened */
function askSettings(why = "") {
  for (const input of settingsForm.querySelectorAll("input")) input.value = setting(/** @type {"key"} */ (input.name));
  settingsProblem.textContent = why;
  settingsProblem.hidden = !why;
  if (settings.open) return;
  settings.returnValue = ""; // else Escape leaves the one before
  settings.showModal();
}

settings.addEventListener("close", () => {
  if (settings.returnValue !== "save") return;
  const before = setting("key");
  for (const input of settingsForm.querySelectorAll("input")) {
    sessionStorage.setItem(`talksplat.${input.name}`, input.value.trim());
  }
  applySettings();
  if (setting("key") !== before || state === "stopped") begin(connect);
});
element("cancel", HTMLButtonElement).addEventListener("click", () => settings.close());
element("open-settings", HTMLButtonElement).addEventListener("click", () => askSettings());

// What is said to the user

let hiding = 0;

/**
 * @param {string} message
 * @param {boolean} [stays]
 */
function complain(message, stays = false) {
  clearTimeout(hiding);
  problem.textContent = message;
  problem.hidden = !message;
  if (message && !stays) hiding = setTimeout(() => complain(""), 1e3 * READING_SECONDS);
}

/** @param {unknown} error */
function report(error) {
  if (error instanceof DOMException && error.name === "AbortError") return;
  if (error instanceof TalksplatError && error.kind === "unauthenticated") {
    askSettings(setting("key") ? "The server does not know this key." : "This server wants an API key.");
  }
  const message = error instanceof Error ? error.message : String(error);
  complain(error instanceof TalksplatError && error.kind === "overloaded" ? `The server is full. ${message}` : message);
}

let fading = 0;

/** @param {typeof state} next */
function become(next) {
  state = next;
  clearTimeout(fading);
  const seconds = { listening: 0, idle: SUBTITLE_SECONDS }[/** @type {string} */ (next)];
  if (seconds !== undefined) {
    fading = setTimeout(() => {
      subtitle.textContent = "";
    }, 1e3 * seconds);
  }
  show();
}

function show() {
  const lost = triton.lost && state !== "starting";
  stage.dataset.state = lost ? "reconnecting" : state;
  if (lost) status.textContent = "The server is away. It goes on here as soon as it is back.";
  else if (state === "starting")
    status.textContent = triton.lost ? "No server answers. Trying again …" : "Connecting …";
  else if (state === "stopped") status.textContent = "Not connected";
  else if (state === "idle" && microphone) status.textContent = "Go ahead, it listens";
  else status.textContent = TOLD[state];
  const ready = state !== "starting" && state !== "stopped";
  for (const control of [talk, text, say, openFile]) control.disabled = !ready;
  loading.hidden = state !== "starting";
  stopped.hidden = state !== "stopped";
  stop.hidden = !(state === "speaking" || state === "thinking");
  talk.setAttribute("aria-pressed", String(microphone !== null));
  const label = /** @type {HTMLElement} */ (talk.querySelector("span"));
  label.textContent = microphone ? "Microphone on" : "Talk";
}

/**
 * @param {"you" | "avatar"} who
 * @param {string} words
 * @param {boolean} final
 */
function caption(who, words, final) {
  subtitle.textContent = words;
  subtitle.classList.toggle("yours", who === "you");
  if (!final) return;
  said.push({ who, text: words });
  const item = document.createElement("p");
  item.classList.toggle("yours", who === "you");
  const speaker = document.createElement("span");
  speaker.className = "unseen";
  speaker.textContent = who === "you" ? "You: " : `${picker.value}: `;
  item.append(speaker, words);
  captions.append(item);
  captions.scrollTop = captions.scrollHeight;
}

// The server and its avatars

triton.addEventListener("lost", show);
triton.addEventListener("found", () => {
  if (state !== "starting") reconnects++;
  show();
});

/**
 * Give up whatever was begun before, and begin anew; where no server answers, again and again.
 * @param {(signal: AbortSignal) => Promise<void>} steps
 */
async function begin(steps) {
  hangUp();
  beginning.abort();
  beginning = new AbortController();
  const { signal } = beginning;
  complain("");
  become("starting");
  while (!signal.aborted) {
    try {
      return await steps(signal);
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof TalksplatError) || error.kind !== "unavailable") {
        become("stopped");
        return report(error);
      }
    }
    await pause(AGAIN_SECONDS);
  }
}

element("again", HTMLButtonElement).addEventListener("click", () => begin(connect));

/**
 * Find out what there is, and show an avatar.
 * @param {AbortSignal} signal
 */
async function connect(signal) {
  [clock, agreed] = await Promise.all([triton.clock(), fetchAgreed()]);
  const known = await avatars(triton);
  signal.throwIfAborted();
  player ??= new Player(canvas, clock);
  if (!known.length) throw new TalksplatError("unknown", "This server has no avatar that you may use.");
  picker.replaceChildren(...known.map(({ id }) => new Option(id, id)));
  const wanted = new URLSearchParams(location.search).get("avatar");
  if (wanted) {
    if (known.some(({ id }) => id === wanted)) picker.value = wanted;
    else complain(`There is no avatar ${wanted} here.`);
  }
  picker.disabled = false;
  await load(signal);
}

/** @returns {Promise<typeof agreed>} */
async function fetchAgreed() {
  const response = await fetch("conversation.json").catch(() => {
    throw new TalksplatError("unavailable", "The server is away.");
  });
  if (!response.ok) throw new TalksplatError("failed", "This page is not complete: conversation.json is missing.");
  return response.json();
}

/**
 * Show the avatar that is picked.
 * @param {AbortSignal} signal
 */
async function load(signal) {
  const avatar = picker.value;
  const place = /** @type {Player} */ (player);
  const began = performance.now();
  const label = /** @type {HTMLElement} */ (loading.querySelector("label"));
  const tick = () => {
    const seconds = (performance.now() - began) / 1e3;
    label.textContent = seconds < 1 ? `Loading ${avatar} …` : `Loading ${avatar} … ${seconds.toFixed(0)} s`;
    status.textContent = `Loading ${avatar} …`;
  };
  tick();
  const ticking = setInterval(tick, 1e3);
  signal.addEventListener("abort", () => clearInterval(ticking));
  try {
    const { model } = await preload(triton, avatar);
    signal.throwIfAborted();
    stream = new Stream(triton, clock, place, { avatar, model, seed: 0 });
    conversation = new Conversation(triton, clock, stream, agreed.end_of_speech, responder, {
      state: become,
      caption,
      problem: report,
      stages: measured => {
        stages = measured;
        showMeter();
      },
    });
    canvas.setAttribute("aria-label", `The face of ${avatar}, generated by AI`);
    watch(stream);
    become("idle");
  } finally {
    clearInterval(ticking);
  }
}

/**
 * Show a stream until it is stopped; where there is no place for it, try again.
 * @param {Stream} shown
 */
async function watch(shown) {
  while (shown === stream) {
    try {
      await shown.run();
    } catch (error) {
      if (shown !== stream) return;
      report(error);
      if (!(error instanceof TalksplatError) || error.kind !== "overloaded") {
        hangUp();
        return become("stopped");
      }
      await pause(error.retryAfter ?? AGAIN_SECONDS);
    }
  }
}

function hangUp() {
  conversation?.close();
  const shown = stream;
  conversation = stream = undefined;
  shown?.stop();
  subtitle.textContent = "";
}

picker.addEventListener("change", () => begin(load));
document.addEventListener("visibilitychange", () => {
  if (stream) stream.paused = document.hidden;
});

// Ways to make it talk

for (const gesture of ["pointerdown", "keydown"]) {
  document.addEventListener(gesture, () => player?.unlock(), { capture: true });
}

talk.addEventListener("click", async () => {
  if (microphone) return mute();
  if (asking) return;
  asking = true;
  complain("");
  try {
    await player?.unlock();
    microphone = await Microphone.open(clock.sampleRate, samples => {
      conversation?.hear(samples);
      const loudness = Math.sqrt(samples.reduce((sum, value) => sum + value * value, 0) / samples.length);
      talk.style.setProperty("--level", Math.min(1, 8 * loudness).toFixed(2));
    });
    microphone.onGone(() => {
      mute();
      complain("The microphone was taken away.");
    });
  } catch (error) {
    report(error);
  }
  asking = false;
  show();
});

function mute() {
  microphone?.close();
  microphone = null;
  conversation?.deafen();
  show();
}

element("composer", HTMLFormElement).addEventListener("submit", async event => {
  event.preventDefault();
  const words = text.value.trim();
  if (!words || !conversation) return;
  complain("");
  text.value = "";
  await player?.unlock();
  await conversation?.say(words);
});

openFile.addEventListener("click", () => file.click());
file.addEventListener("change", async () => {
  const [chosen] = file.files ?? [];
  file.value = "";
  if (!chosen || !conversation) return;
  complain("");
  try {
    await player?.unlock();
    const sound = await decode(chosen);
    await conversation?.play(sound); // of the avatar that is there by now
  } catch (error) {
    report(error);
  }
});

/**
 * A file's sound at the server's rate, channels averaged.
 * @param {File} chosen
 */
async function decode(chosen) {
  const context = new OfflineAudioContext(1, 1, clock.sampleRate);
  let sound;
  try {
    sound = await context.decodeAudioData(await chosen.arrayBuffer());
  } catch {
    throw new Error(`This browser finds no sound in ${chosen.name}.`);
  }
  const channels = Array.from({ length: sound.numberOfChannels }, (_, channel) => sound.getChannelData(channel));
  return Float32Array.from({ length: sound.length }, (_, place) =>
    channels.reduce((sum, channel) => sum + /** @type {number} */ (channel[place]) / channels.length, 0),
  );
}

stop.addEventListener("click", () => conversation?.interrupt());
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !settings.open) conversation?.interrupt();
});

// The meter

/**
 * @param {number[]} values
 * @param {number} share
 */
function percentile(values, share) {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

function showMeter() {
  if (!player) return;
  const now = performance.now();
  const recent = player.drawTimesMs.slice(-100).filter(time => now - time < 2000);
  const rate = recent.length > 1 ? (1e3 * (recent.length - 1)) / (now - /** @type {number} */ (recent[0])) : 0;
  summary.textContent = stages.answer ? `${Math.round(stages.answer)} ms to the answer` : `${rate.toFixed(0)} frames/s`;
  if (!meter.open) return;
  /** @type {[string, number | undefined, string][]} */
  const rows = STAGES.map(([name, label]) => [label, stages[name], "ms"]);
  rows.push(["Chunk, p95", percentile(stream?.latenciesMs ?? [], 0.95), "ms"]);
  rows.push(["Sound to picture, p95", percentile(player.skewsMs.slice(-250), 0.95), "ms"]);
  rows.push(["Frames a second", rate, ""]);
  stageList.replaceChildren(
    ...rows.map(([label, value, unit]) => {
      const row = document.createElement("div");
      const term = document.createElement("dt");
      const amount = document.createElement("dd");
      const bar = document.createElement("span");
      term.textContent = label;
      bar.className = unit && "bar";
      bar.style.setProperty("--share", String(Math.min(1, (value ?? 0) / SLOW_MS)));
      amount.append(bar, value === undefined ? "–" : `${Math.round(value)} ${unit}`.trim());
      row.append(term, amount);
      return row;
    }),
  );
}
setInterval(showMeter, METER_MS);
meter.addEventListener("toggle", showMeter);

// For tests

Object.assign(window, {
  talksplat: {
    stats: () => ({
      framesDrawn: player?.framesDrawn ?? 0,
      framesMissed: player?.framesMissed ?? 0,
      outOfOrder: player?.outOfOrder ?? 0,
      skewsMs: [...(player?.skewsMs ?? [])],
      drawTimesMs: [...(player?.drawTimesMs ?? [])],
      stages: { ...stages },
      state: triton.lost ? "reconnecting" : state,
      reconnects,
      captions: said.map(each => ({ ...each })),
    }),
  },
});

applySettings();
show();
begin(connect);
