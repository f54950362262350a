// What the page computes without a document: tiles, boxes, events, messages and Markdown. The tests compare it with Python.

/** The [columns, rows] of tiles for a picture, as ivl.processing.image.grid_for has them. */
export function gridFor(width, height, tiling, maxTiles = tiling.max_tiles) {
  if (!tiling.dynamic) return [1, 1];
  let best = [1, 1], bestDistance = Infinity;
  for (let count = Math.min(tiling.min_tiles, maxTiles); count <= maxTiles; count++)
    for (let columns = 1; columns <= count; columns++) {
      const rows = count / columns, distance = Math.abs(width / height - columns / rows);
      const largeEnough = 2 * width * height > tiling.tile_size ** 2 * count;
      if (!Number.isInteger(rows) || distance > bestDistance || (distance === bestDistance && !largeEnough)) continue;
      [best, bestDistance] = [[columns, rows], distance];
    }
  return best;
}

const GROUNDING = /(?:<ref>((?:(?!<ref>|<\/?box>).)*?)<\/ref>\s*)?<box>((?:(?!<box>).)*?)<\/box>/gs;
const LIST_OF_BOXES = /^\s*\[\s*(?:\[[^[\]]*\]\s*,\s*)*\[[^[\]]*\]\s*\]\s*$/;

/** The groundings of a reply, as ivl.boxes.parse_boxes reads them. */
export function parseBoxes(text) {
  const groundings = [];
  for (const match of text.matchAll(GROUNDING)) {
    if (!LIST_OF_BOXES.test(match[2])) continue;
    const entries = [...match[2].matchAll(/\[([^[\]]*)\]/g)].map(([, entry]) => entry.split(",").map((number) => number.trim()));
    const boxes = entries.map((entry) => entry.map((number) => /^\d{1,9}$/.test(number) ? Number(number) : NaN));
    const isBox = ([x1, y1, x2, y2]) => x1 <= x2 && x2 <= 1000 && y1 <= y2 && y2 <= 1000;
    if (boxes.every((box) => box.length === 4 && isBox(box))) groundings.push({ phrase: match[1] ?? "", boxes });
  }
  return groundings;
}

/** Splits a stream of server-sent events into the data of each. */
export class EventParser {
  #rest = "";

  push(text) {
    const events = (this.#rest + text).replaceAll("\r\n", "\n").split("\n\n");
    this.#rest = events.pop();
    const dataOf = (event) => event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
    return events.map(dataOf).filter((lines) => lines.length).map((lines) => lines.join("\n"));
  }
}

/** The messages of a request: the turns that have a reply, and the question that is asked now. */
export function messagesOf(turns, question, system) {
  const messages = system.trim() ? [{ role: "system", content: system.trim() }] : [];
  for (const turn of turns)
    if (turn.reply.trim())
      messages.push({ role: "user", content: contentOf(turn) }, { role: "assistant", content: turn.reply.trim() });
  return [...messages, { role: "user", content: contentOf(question) }];
}

// Media come first, one a line, several pictures with their number, as ivl.processing.chat.marked writes them.
function contentOf({ text, media }) {
  if (!media.length) return text;
  const numbered = media.length > 1 && media.every((medium) => medium.kind === "image");
  const parts = [];
  media.forEach((medium, n) => {
    const lead = (n ? "\n" : "") + (numbered ? `Image-${n + 1}: ` : "");
    if (lead) parts.push({ type: "text", text: lead });
    if (medium.kind === "video") parts.push({ type: "video_url", video_url: { url: medium.data, num_frames: medium.frames } });
    else parts.push({ type: "image_url", image_url: { url: medium.data, max_dynamic_patch: medium.maxTiles } });
  });
  return [...parts, { type: "text", text: `\n${text}` }];
}

/** Whether the bytes of a GIF hold more than one frame; the server sees such a GIF as a video. */
export function isAnimated(bytes) {
  let frames = 0;
  for (let at = 13; at + 8 < bytes.length && frames < 2; at++)  // a control extension, and what it controls
    if (bytes[at] === 0x21 && bytes[at + 1] === 0xf9 && bytes[at + 2] === 4 && bytes[at + 7] === 0) frames++;
  return frames > 1;
}

/** A count in three digits: 1.2 M, 8.1 B. */
export function short(count) {
  const [size, unit] = [[1e9, " B"], [1e6, " M"], [1e3, " k"]].find(([least]) => count >= least) ?? [1, ""];
  return `${(count / size).toFixed(unit && count / size < 100 ? 1 : 0)}${unit}`;
}

/** Tokens, speed and time of a reply in one line. times: start, first and last text, and end, in milliseconds. */
export function usageLine(usage, times, ending) {
  const parts = [], count = (number) => number.toLocaleString("en"), cached = usage?.prompt_tokens_details?.cached_tokens;
  if (usage) parts.push(`${count(usage.prompt_tokens)} tokens in${cached ? ` (${count(cached)} cached)` : ""}`, `${count(usage.completion_tokens)} out`);
  const speed = usage && Math.round(1000 * (usage.completion_tokens - 1) / (times.last - times.first));
  if (speed > 0 && speed < Infinity) parts.push(`${count(speed)} tokens/s`);
  parts.push(`${((times.end - times.start) / 1000).toFixed(1)} s`);
  return [...parts, ...({ length: ["cut at the longest reply"], stopped: ["stopped"] }[ending] ?? [])].join(" · ");
}

const BLOCK = /^(?:```.*|#{1,6} .+|\s*(?:[-*+]|\d{1,9}[.)]) .*|\|.*\|\s*)$/;

/** Markdown as a list of blocks: code, heading, list, table or paragraph. Text is never interpreted as HTML. */
export function parseMarkdown(text) {
  const lines = text.split("\n").reverse(), blocks = [];
  const take = (matches) => {
    const taken = [];
    while (lines.length && matches(lines.at(-1))) taken.push(lines.pop());
    return taken;
  };
  while (lines.length) {
    const line = lines.at(-1), item = line.match(/^\s*(?:[-*+]|(\d{1,9})[.)]) (.*)$/);
    if (line.startsWith("```")) {
      lines.pop();
      blocks.push({ kind: "code", text: take((next) => !next.startsWith("```")).join("\n") });
      lines.pop();
    } else if (/^#{1,6} ./.test(line)) {
      blocks.push({ kind: "heading", content: parseInline(lines.pop().replace(/^#+ /, "")) });
    } else if (item) {
      const isItem = item[1] === undefined ? /^\s*[-*+] / : /^\s*\d{1,9}[.)] /;
      const items = take((next) => isItem.test(next)).map((next) => parseInline(next.replace(isItem, "")));
      blocks.push({ kind: "list", start: item[1] && Number(item[1]), items });
    } else if (/^\|.*\|\s*$/.test(line)) {
      const rows = take((next) => /^\|.*\|\s*$/.test(next)).filter((row) => !/^[|\s:-]+$/.test(row));
      blocks.push({ kind: "table", rows: rows.map((row) => row.trim().slice(1, -1).split("|").map((cell) => parseInline(cell.trim()))) });
    } else if (!line.trim()) {
      lines.pop();
    } else {
      const paragraph = [lines.pop(), ...take((next) => next.trim() && !BLOCK.test(next))];
      blocks.push({ kind: "paragraph", content: parseInline(paragraph.join("\n")) });
    }
  }
  return blocks;
}

const INLINE = new RegExp(String.raw`(?<code>\x60[^\x60\n]+\x60)|\*\*(?<strong>\S(?:[^*]*\S)?)\*\*|` +
  String.raw`(?<![*\w])\*(?<em>[^*\s](?:[^*\n]*[^*\s])?)\*(?![*\w])|(?<box>${GROUNDING.source.replaceAll(/\((?!\?)/g, "(?:")})`, "gs");

function parseInline(text) {
  const pieces = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    const [kind, content] = Object.entries(match.groups).find(([, value]) => value !== undefined);
    if (kind === "box" && !parseBoxes(content).length) continue;
    pieces.push({ kind: "text", text: text.slice(at, match.index) });
    pieces.push({ kind, text: kind === "code" ? content.slice(1, -1) : content });
    at = match.index + match[0].length;
  }
  return [...pieces, { kind: "text", text: text.slice(at) }].filter((piece) => piece.text);
}
