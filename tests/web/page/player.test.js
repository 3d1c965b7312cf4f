import assert from "node:assert/strict";
import { mock, test } from "node:test";
import { Player } from "../../../client/web/player.js";
import { clock } from "./scripted.js";

/** A player without a sound card, on a screen that is refreshed by hand. */
function playing() {
  const time = mock.method(performance, "now", () => 0);
  let refresh = () => {};
  Object.assign(globalThis, {
    document: { hidden: false },
    requestAnimationFrame: draw => {
      refresh = draw;
    },
  });
  const player = new Player({ getContext: () => ({ drawImage: () => {} }) }, clock);
  const place = (first, count) => {
    const pictures = Array.from({ length: count }, () => ({ width: 1, height: 1, close: () => {} }));
    player.place(first, pictures, new Float32Array(count * clock.samplesPerFrame));
  };
  /** So many frames go by. */
  const show = frames => {
    for (let frame = 0; frame < frames; frame++) {
      refresh();
      const now = performance.now() + 1e3 / clock.fps;
      time.mock.mockImplementation(() => now);
    }
  };
  return { player, place, show };
}

test("who waits for a frame is told, though the frame is drawn anew", () => {
  const { player, place, show } = playing();
  const told = [];
  place(0, 8);
  player.at(4, () => told.push("first"));
  show(3);
  player.drop(4);
  player.at(4, () => told.push("second"));
  place(4, 4);
  show(1);
  assert.deepEqual(told, []);
  show(5);
  assert.deepEqual(told, ["first", "second"]);
  assert.equal(player.framesDrawn, 8);
  assert.equal(player.outOfOrder, 0);
});

test("who is silenced tells nobody", () => {
  const { player, place, show } = playing();
  place(0, 8);
  player.at(4, () => assert.fail("it is silent"));
  player.hush();
  show(8);
  assert.equal(player.framesDrawn, 8);
});
