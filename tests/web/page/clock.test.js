import assert from "node:assert/strict";
import { test } from "node:test";
import { Clock } from "../../../client/web/clock.js";
import { parameters } from "./scripted.js";

test("a window holds its chunk, what was before and what comes next", () => {
  const clock = new Clock(parameters());
  assert.equal(clock.samplesPerFrame, 640);
  assert.equal(clock.chunk, 2560);
  assert.equal(clock.window, 10240 + 2560 + 1920);
  assert.equal(clock.windowStart(0), -10240);
  assert.equal(clock.windowStart(5), 5 * 2560 - 10240);
});

for (const [what, change] of Object.entries({
  "says nothing": { fps: undefined },
  "is no number": { sample_rate: { string_value: "fast" } },
  "is negative": { look_ahead: { string_value: "-1" } },
  "does not divide": { fps: { string_value: "7" } },
})) {
  test(`a clock that ${what} is refused`, () => {
    assert.throws(() => new Clock({ ...parameters(), ...change }), { name: "TalksplatError", kind: "failed" });
  });
}
