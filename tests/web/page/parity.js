/** Decides for Python's tests what the page would: JSON in, JSON out. */

import { text } from "node:stream/consumers";
import { sentences } from "../../../client/web/sentences.js";

const { texts } = JSON.parse(await text(process.stdin));
console.log(JSON.stringify({ sentences: texts.map(sentences) }));
