/** Text, cut where a voice may pause: as talksplat_client.sentences does. */

const END = /(?<=[.!?…]["')\]]*)\s+/u;

/**
 * @param {string} text
 * @returns {string[]}
 */
export function sentences(text) {
  return text
    .split(END)
    .map(each => each.trim())
    .filter(Boolean);
}

/**
 * Sentences of a text that comes in pieces, each as soon as the next one has begun.
 * @param {AsyncIterable<string>} pieces
 */
export async function* sentencesOf(pieces) {
  let text = "";
  for await (const piece of pieces) {
    text += piece;
    const complete = sentences(text);
    const last = complete.pop() ?? "";
    if (!complete.length) continue;
    yield* complete;
    text = last + (/\s$/.test(text) ? " " : "");
  }
  yield* sentences(text);
}
