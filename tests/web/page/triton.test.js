import assert from "node:assert/strict";
import { createServer } from "node:http";
import { test } from "node:test";
import { encode, errorOf, floats, integer, pause, string, Triton } from "../../../client/web/triton.js";
import { answer, parameters, strings } from "./scripted.js";

test("a request is JSON that names the tensors, then their bytes in order", () => {
  const inputs = [
    string("AVATAR", "Zoë", [1, 1]),
    integer("FRAME_INDEX", 2 ** 40, [1, 1]),
    floats("AUDIO", Float32Array.of(1, -0.5)),
  ];
  const { body, headerLength } = encode({ id: "viewer-4", inputs, outputs: ["FRAMES"], parameters: { seed: 3 } });
  const header = JSON.parse(new TextDecoder().decode(body.subarray(0, headerLength)));
  assert.deepEqual(header, {
    id: "viewer-4",
    parameters: { seed: 3 },
    inputs: [
      { name: "AVATAR", datatype: "BYTES", shape: [1, 1], parameters: { binary_data_size: 8 } },
      { name: "FRAME_INDEX", datatype: "INT64", shape: [1, 1], parameters: { binary_data_size: 8 } },
      { name: "AUDIO", datatype: "FP32", shape: [2], parameters: { binary_data_size: 8 } },
    ],
    outputs: [{ name: "FRAMES", parameters: { binary_data: true } }],
  });
  const bytes = Buffer.from(body.subarray(headerLength));
  assert.equal(bytes.readUInt32LE(0), 4);
  assert.equal(bytes.toString("utf8", 4, 8), "Zoë");
  assert.equal(bytes.readBigInt64LE(8), 2n ** 40n);
  assert.equal(bytes.readFloatLE(16), 1);
  assert.equal(bytes.readFloatLE(20), -0.5);
  assert.equal(bytes.length, 24);
});

test("samples that are part of a larger buffer are sent alone", () => {
  const samples = Float32Array.of(9, 1, 2, 9).subarray(1, 3);
  assert.deepEqual([...new Float32Array(floats("AUDIO", samples).data.buffer)], [1, 2]);
});

test("an answer gives back strings, floats and integers, wherever they begin", () => {
  const speech = Buffer.alloc(8);
  speech.writeFloatLE(0.25, 0);
  speech.writeFloatLE(-1, 4);
  const samples = Buffer.alloc(8);
  samples.writeBigInt64LE(70_000n);
  const given = answer({
    FRAMES: ["BYTES", [1, 3], strings("jpeg", "", "x")], // an odd number of bytes
    SPEECH: ["FP32", [1, 2], speech],
    SAMPLES: ["INT64", [1], samples],
    TEXT: ["BYTES", [1], strings("Grüße")],
  });
  assert.deepEqual(given.strings("FRAMES").map(String), ["106,112,101,103", "", "120"]);
  assert.deepEqual([...given.floats("SPEECH")], [0.25, -1]);
  assert.equal(given.integer("SAMPLES"), 70_000);
  assert.equal(given.text("TEXT"), "Grüße");
});

for (const [what, read] of Object.entries({
  "lacks an output": given => given.floats("OTHER"),
  "has another type": given => given.integer("FRAMES"),
  "has fewer strings than it says": given => given.strings("FRAMES"),
  "has a string that ends beyond it": given => given.strings("LONG"),
  "has more strings than one": given => given.text("FRAMES"),
})) {
  test(`an answer that ${what} is malformed`, () => {
    const long = strings("abc");
    long.writeUInt32LE(99);
    const given = answer({ FRAMES: ["BYTES", [3], strings("a", "b")], LONG: ["BYTES", [1], long] });
    assert.throws(() => read(given), { name: "TalksplatError", kind: "failed" });
  });
}

test("errors of Triton and of the edge say what is wrong", () => {
  for (const [status, body, kind, message] of [
    [400, '{"error":"in ensemble \'animate\', the size is 7"}', "invalid", "the size is 7"],
    [401, '{"error":"An API key is needed."}', "unauthenticated", "An API key is needed."],
    [403, '{"error":"This is not served here."}', "forbidden", "This is not served here."],
    [404, '{"error":"There is no avatar \'kim\'."}', "unknown", "There is no avatar 'kim'."],
    [500, '{"error":"broken"}', "failed", "broken"],
    [500, '{"error":"Stub process \'x\' is not healthy."}', "unavailable", "The server is away."],
    [503, "<html>", "unavailable", "The server is away."],
  ]) {
    const error = errorOf(status, body);
    assert.equal(error.kind, kind);
    assert.equal(error.message, message);
  }
  assert.equal(errorOf(429, '{"error":"full"}', "2").retryAfter, 2);
  assert.equal(errorOf(429, '{"error":"full"}').retryAfter, undefined);
});

/** A server that answers each request with the next of these, or what they promise: [status, headers, body]. */
async function serving(answers, use) {
  const requests = [];
  const server = createServer(async (request, response) => {
    requests.push(request);
    const [status, headers, body] = await answers.shift();
    if (!status) return request.socket.destroy();
    response.writeHead(status, headers).end(body);
  });
  await new Promise(resolve => server.listen(0, "127.0.0.1", resolve));
  try {
    const triton = new Triton("viewer", `http://127.0.0.1:${server.address().port}`);
    const events = [];
    for (const name of ["lost", "found"]) triton.addEventListener(name, () => events.push(name));
    await use(triton, requests, events);
  } finally {
    server.closeAllConnections();
    server.close();
  }
}

const config = [200, {}, JSON.stringify({ parameters: parameters() })];

test("a server that is away is asked again, and that it was is told", () =>
  serving([[0], [503, {}, ""], config], async (triton, requests, events) => {
    assert.equal((await triton.clock()).fps, 25);
    assert.equal(requests.length, 3);
    assert.deepEqual(events, ["lost", "found"]);
  }));

test("an answer that was on its way when the server was lost does not say that it is back", async () => {
  const held = Promise.withResolvers();
  const back = Promise.withResolvers();
  await serving([held.promise, [0], back.promise], async (triton, requests, events) => {
    const asked = triton.clock();
    while (requests.length < 1) await pause(0.01);
    const again = triton.clock();
    while (!triton.lost) await pause(0.01);
    held.resolve(config);
    await asked;
    assert.deepEqual(events, ["lost"]);
    back.resolve(config);
    await again;
    assert.deepEqual(events, ["lost", "found"]);
  });
});

test("a server that refuses is there", () =>
  serving([[503, {}, ""], [401, {}, '{"error":"An API key is needed."}']], async (triton, _, events) => {
    await assert.rejects(triton.clock(), { kind: "unauthenticated" });
    assert.deepEqual(events, ["lost", "found"]);
  }));

test("who has no place is told at once, unless it had one before", () => {
  const full = [429, { "retry-after": "0" }, '{"error":"full"}'];
  const done = JSON.stringify({ outputs: [] });
  const fine = [200, { "inference-header-content-length": String(done.length) }, done];
  return serving([full, full, fine], async triton => {
    const request = { what: 0, inputs: [], outputs: [] };
    await assert.rejects(triton.infer("animate", request), { kind: "overloaded", retryAfter: 0 });
    await triton.infer("animate", request, { insist: true });
  });
});

test("requests carry the stream's id, and the key where there is one", () =>
  serving([config, config], async (triton, requests) => {
    await triton.clock();
    triton.key = "secret";
    await triton.clock();
    assert.deepEqual(
      requests.map(({ headers }) => headers["x-talksplat-stream"]),
      ["viewer", "viewer"],
    );
    assert.deepEqual(
      requests.map(({ headers }) => headers.authorization),
      [undefined, "Bearer secret"],
    );
  }));

test("a request that is dropped is not tried again", () =>
  serving([[503, {}, ""], config], async (triton, requests) => {
    const abort = new AbortController();
    triton.addEventListener("lost", () => abort.abort());
    await assert.rejects(triton.infer("vad", { what: "vad", inputs: [], outputs: [] }, { signal: abort.signal }), {
      name: "AbortError",
    });
    assert.equal(requests.length, 1);
  }));
