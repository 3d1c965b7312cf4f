/** Decides for Python's tests what the page would: JSON in, JSON out. */

import { text } from "node:stream/consumers";
import { sentences } from "../../../client/web/sentences.js";
import { Turns } from "../../../client/web/turns.js";

const { texts = [], settings, fps, longest, heard = [] } = JSON.parse(await text(process.stdin));

/** What a text, or a probability, means to a conversation. */
const event = (turns, each) => (typeof each === "string" ? turns.recognised(each) : turns.push(each));

const events = heard.map(each => {
  const turns = new Turns(settings, fps, longest);
  return each.map(what => event(turns, what));
});
console.log(JSON.stringify({ sentences: texts.map(sentences), events }));
