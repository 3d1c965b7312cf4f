/** What tells sentences apart: as talksplat_client.sentences does. */

// Marks that end a sentence, with the quotes and brackets that they stand in, before a space; or a new line.
const END = /[.!?…]+["'”’)\]]*(?=\s|$)|\n/gu;
const ABBREVIATION = /(?:^|[\s("'])(?:mr|mrs|ms|dr|prof|st|vs|etc|e\.g|i\.e|no|jr|sr|approx|[a-z](?:\.[a-z])*)\.$/iu;
const NAMELESS = /\b(?:etc|I)\.$/u; // also ends sentences

/**
 * The sentences of a text, in order, each with its mark, without the spaces around it. What has neither letter nor digit
 * is left out. Of a text that still grows all but the last one are whole.
 * @param {string} text
 * @returns {string[]}
 */
export function sentences(text) {
  const found = [];
  let begin = 0;
  for (const { 0: mark, index } of text.matchAll(END)) {
    const end = index + mark.length;
    const sentence = text.slice(begin, end).trim();
    const next = text.slice(end).match(/^ *(.?)/su)?.[1] ?? "";
    const short = ABBREVIATION.test(sentence) && !(NAMELESS.test(sentence) && /\p{Uppercase}/u.test(next));
    const goesOn = short || (mark === "." && /\p{Lowercase}/u.test(next));
    if (mark !== "\n" && next !== "" && next !== "\n" && goesOn) continue;
    found.push(sentence);
    begin = end;
  }
  found.push(text.slice(begin).trim());
  return found.filter(sentence => /[\p{L}\p{N}]/u.test(sentence));
}

/**
 * Sentences of a text that comes in pieces, each as soon as it is whole.
 * @param {AsyncIterable<string>} pieces
 */
export async function* sentencesOf(pieces) {
  let text = "";
  let told = 0;
  for await (const piece of pieces) {
    text += piece;
    const whole = sentences(text).slice(told, -1);
    told += whole.length;
    yield* whole;
  }
  yield* sentences(text).slice(told);
}
