// The page: it asks /v1/chat/completions as every client does. The conversation and the pictures stay in this tab.

import { EventParser, gridFor, isAnimated, messagesOf, parseBoxes, parseMarkdown, short, usageLine } from "./rules.js";

const $ = (id) => document.getElementById(id);
const KEY = "ivl-key", SLIDERS = ["temperature", "top_p", "repetition_penalty", "max_tokens", "tiles", "frames"];
const read = (id) => Number($(id).value);
const state = { model: null, turns: [], media: [], editing: null, running: null, atEnd: true, drawing: null };

/** An element with properties (attributes, if the name has a dash) and children. Text is only ever inserted as text. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties))
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  element.append(...children.flat(2));
  return element;
}

function show(id, text) {
  $(id).textContent = text;
  $(id).hidden = !text;
}

/** A response of the server; asks for a key when one is needed. */
async function api(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY), headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers, credentials: "omit" }).catch((error) => {  // omit: no browser's prompt
      throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
    });
    if (response.ok) return response;
    const message = (await response.json().catch(() => null))?.error?.message ?? `The server answered ${response.status}.`;
    if (response.status !== 401) throw new Error(message);
    await askForKey(key ? "The server refuses this key." : "");
  }
}

function askForKey(problem) {
  show("login-problem", problem);
  $("key").value = "";
  if (!$("login").open) $("login").showModal();
  return new Promise((resolve) => {
    $("login-form").onsubmit = (event) => {
      event.preventDefault();
      const key = $("key").value.trim();
      if (!/^[!-~]+$/.test(key)) return show("login-problem", "A key has letters, digits and signs, and no spaces.");
      sessionStorage.setItem(KEY, key);
      $("login").close();
      resolve();
    };
  });
}

async function start() {
  const model = await (await api("page/model")).json();
  const { name, limits, tiling } = state.model = model, longest = Math.min(limits.max_new_tokens, model.max_context);
  document.title = `${name} · ivl`;
  $("name").textContent = name;
  $("welcome").textContent = `Ask ${name} about pictures and videos`;
  $("facts").textContent = `${short(model.parameters)} parameters · ${model.max_context.toLocaleString("en")} tokens of context`;
  $("address").textContent = new URL("v1", document.baseURI).href;
  const most = { max_tokens: longest, tiles: Math.min(limits.max_image_tiles, tiling.max_tiles), frames: limits.max_frames };
  for (const [id, max] of Object.entries(most)) Object.assign($(id), { max, value: $(id).value });
  showSettings();
  $("examples-title").hidden = !model.examples.length;
  for (const { text, images } of model.examples) {
    const blobs = await Promise.all(images.map(async (path) => (await api(path)).blob()));
    const onclick = () => {
      compose(text, []);
      addFiles(blobs.map((blob, n) => new File([blob], `example ${n + 1}`, { type: blob.type })));
    };
    const pictures = blobs.map((blob) => make("img", { src: URL.createObjectURL(blob), alt: "" }));
    $("examples").append(make("li", {}, make("button", { type: "button", onclick }, pictures, make("span", {}, text))));
  }
}

function showSettings() {
  for (const id of SLIDERS) $(id).parentElement.querySelector("b").textContent = $(id).value;
  $("talk").classList.toggle("no-grid", !$("grid").checked);
  showMedia();
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("show-settings").setAttribute("aria-expanded", open);
}

function addFiles(files) {
  for (const file of files) {
    const isFilm = file.type.startsWith("video/") || /\.(mp4|m4v|mov|mkv|webm|avi)$/i.test(file.name);
    const medium = { name: file.name, url: URL.createObjectURL(file), kind: isFilm ? "video" : "image", isFilm };
    medium.ready = readMedium(medium, file).catch(() => { medium.problem = "cannot be read"; }).then(showMedia);
    state.media.push(medium);
  }
  show("problem", "");
  showMedia();
}

async function readMedium(medium, file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (file.type === "image/gif" && isAnimated(bytes)) medium.kind = "video";
  const reader = new FileReader();
  const data = await new Promise((resolve) => { reader.onload = () => resolve(reader.result); reader.readAsDataURL(new Blob([bytes])); });
  medium.data = `data:application/octet-stream;base64,${data.split(",")[1] ?? ""}`;  // the server looks at the content, not at a type
  if (medium.isFilm) return;
  const image = make("img", { src: medium.url });
  await image.decode().catch(() => { medium.problem = "this browser cannot show it"; });
  Object.assign(medium, { width: image.naturalWidth, height: image.naturalHeight });
}

function showMedia() {
  $("media").replaceChildren(...state.media.map((medium) => {
    const onclick = () => compose($("text").value, state.media.filter((other) => other !== medium), state.editing);
    return make("li", {}, shown(medium), make("small", { title: medium.name }, medium.name), captionOf(medium, "small"),
      make("button", { type: "button", onclick, "aria-label": `Remove ${medium.name}`, title: "Remove" }, "✕"));
  }));
}

function shown({ name, url, isFilm }) {
  return isFilm ? make("video", { src: url, muted: true, preload: "metadata", title: name }) : make("img", { src: url, alt: name });
}

function captionOf(medium, tag) {
  if (medium.problem) return make(tag, { className: "bad" }, `${medium.name}: ${medium.problem}`);
  const frames = medium.frames ?? read("frames"), [columns, rows] = gridOf(medium);
  if (medium.kind === "video") return make(tag, {}, frames === 1 ? "1 frame" : `${frames} frames`);
  const whole = state.model?.tiling.thumbnail ? " + whole" : "";
  return make(tag, {}, !medium.width ? "" : columns * rows === 1 ? "1 tile" : `${columns} × ${rows} tiles${whole}`);
}

function gridOf({ kind, width, height, maxTiles }) {
  return kind === "video" || !width || !state.model ? [1, 1] : gridFor(width, height, state.model.tiling, maxTiles ?? read("tiles"));
}

/** A picture with its tiles, or with boxes, drawn over it; a click shows it large. */
function pictureOf(medium, groundings) {
  if (medium.isFilm) return make("figure", {}, Object.assign(shown(medium), { controls: true }), captionOf(medium, "figcaption"));
  const drawn = () => [shown(medium), groundings ? boxesOver(groundings) : linesOver(medium)];
  const caption = () => groundings ? make("figcaption") : captionOf(medium, "figcaption");
  const onclick = () => {
    $("large").firstElementChild.replaceChildren(make("div", { className: "picture" }, drawn()), caption());
    $("large").showModal();
  };
  const view = make("button", { type: "button", className: "picture", onclick, "aria-label": `Show ${medium.name} large` }, drawn());
  return make("figure", { className: medium.problem ? "broken" : "" }, view, caption());
}

function over(className, left, top, width, height, text = "") {
  const element = make("div", { className }, text && make("span", {}, text));
  for (const [name, percent] of Object.entries({ left, top, width, height })) element.style[name] = `${percent}%`;
  return element;
}

function linesOver(medium) {
  const [columns, rows] = gridOf(medium), inner = (count) => Array.from({ length: count - 1 }, (_, n) => 100 * (n + 1) / count);
  return [...inner(columns).map((at) => over("line", at, 0, 0, 100)), ...inner(rows).map((at) => over("line", 0, at, 100, 0))];
}

function boxesOver(groundings) {
  return groundings.flatMap(({ phrase, boxes }, n) =>
    boxes.map(([x1, y1, x2, y2]) => over(`box color-${n % 8}`, x1 / 10, y1 / 10, (x2 - x1) / 10, (y2 - y1) / 10, phrase)));
}

function render(turn) {
  const edit = make("button", { type: "button", onclick: () => compose(turn.text, [...turn.media], turn) }, "Edit");
  const pictures = make("div", { className: "pictures" }, turn.media.map((medium) => pictureOf(medium)));
  const question = make("div", { className: "question" }, pictures, make("p", {}, turn.text), make("div", { className: "actions" }, edit));
  turn.answer = make("div", { className: "answer" });
  const element = make("li", { className: "turn" }, question, turn.answer);
  if (turn.element) turn.element.replaceWith(element);
  else $("chat").append(element);
  turn.element = element;
  renderAnswer(turn);
}

function renderAnswer(turn) {
  const running = state.running?.turn === turn, groundings = parseBoxes(turn.reply), parts = markdown(turn.reply);
  const image = turnsBefore(turn).concat(turn).flatMap(({ media }) => media).findLast(({ kind }) => kind === "image");
  if (running) parts.push(make("span", { className: "waiting", role: "status", "aria-label": "The model is writing" }));
  if (!running && groundings.length && image) parts.push(pictureOf(image, groundings));
  if (turn.problem) parts.push(make("p", { className: "problem", role: "alert" }, turn.problem));
  const copy = make("button", { type: "button", hidden: !turn.reply, onclick: () => copyText(copy, turn.reply) }, "Copy");
  const retry = make("button", { type: "button", className: "retry", onclick: () => run(turn) }, "Retry");
  parts.push(make("div", { className: "actions", hidden: running }, copy, retry, make("span", { className: "usage" }, turn.usage)));
  turn.answer.replaceChildren(...parts);
  if (state.turns.at(-1) === turn && state.atEnd) $("scroll").scrollTop = $("scroll").scrollHeight;
}

function markdown(text) {
  let number = 0;
  const inline = (pieces) => pieces.map(({ kind, text }) => {
    if (kind !== "box") return kind === "text" ? text : make(kind, {}, text);
    const [{ phrase, boxes }] = parseBoxes(text);
    return make("span", { className: `grounding color-${number++ % 8}`, title: text }, phrase || JSON.stringify(boxes));
  });
  const each = (tag, rows) => rows.map((row) => make(tag, {}, inline(row)));
  return parseMarkdown(text).map(({ kind, text, content, items, start, rows }) => {
    if (kind === "code") return make("pre", { tabIndex: 0 }, text);
    if (kind === "list") return start === undefined ? make("ul", {}, each("li", items)) : make("ol", { start }, each("li", items));
    if (kind === "table") return make("div", { className: "table" }, make("table", {}, rows.map((row) => make("tr", {}, each("td", row)))));
    return make(kind === "heading" ? "h3" : "p", {}, inline(content));
  });
}

async function copyText(button, text) {
  if (!await navigator.clipboard?.writeText(text).then(() => true, () => false)) {  // it is there on secure pages only
    const field = make("textarea", { value: text });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  button.textContent = "Copied";
}

const turnsBefore = (turn) => state.turns.slice(0, state.turns.indexOf(turn));

async function ask() {
  const text = $("text").value.trim(), { media, editing } = state;
  if (!text && !media.length) return show("problem", "Write a question first.");
  await Promise.all(media.map(({ ready }) => ready));
  if (state.running || !state.model) return;
  const lost = media.find(({ data }) => !data);
  if (lost) return show("problem", `${lost.name} cannot be read: remove it, or choose it again.`);
  for (const turn of state.turns.splice(editing ? state.turns.indexOf(editing) : state.turns.length)) turn.element.remove();
  compose("", []);
  $("empty").hidden = true;
  const turn = { text, media };
  state.turns.push(turn);
  await run(turn);
}

/** Ask a question, or ask it again, and show the reply as it grows. */
async function run(turn) {
  const controller = new AbortController(), times = { start: performance.now() };
  let usage = null, ending = "";
  Object.assign(turn, { reply: "", usage: "", problem: "" });
  for (const medium of turn.media) Object.assign(medium, { maxTiles: read("tiles"), frames: read("frames") });
  state.atEnd = true;
  setRunning({ turn, controller });
  render(turn);
  try {
    const settings = Object.fromEntries(SLIDERS.slice(0, 4).map((id) => [id, read(id)]));
    const messages = messagesOf(turnsBefore(turn), turn, $("system").value);
    const body = JSON.stringify({ messages, stream: true, stream_options: { include_usage: true }, ...settings });
    const size = new Blob([body]).size, most = state.model.limits.max_body_bytes;
    if (size > most) throw new Error(`The conversation has ${short(size)}B and the server takes ${short(most)}B: begin a new one.`);
    const options = { method: "POST", body, headers: { "Content-Type": "application/json" }, signal: controller.signal };
    for await (const chunk of chunksOf(await api("v1/chat/completions", options))) {
      usage = chunk.usage ?? usage;
      ending = chunk.choices[0]?.finish_reason ?? ending;
      const more = chunk.choices[0]?.delta.content;
      if (!more) continue;
      times.last = performance.now();
      times.first ??= times.last;
      turn.reply += more;
      state.drawing ??= requestAnimationFrame(() => {  // as often as the screen is drawn
        state.drawing = null;
        if (state.running?.turn === turn) renderAnswer(turn);
      });
    }
    if (!turn.reply.trim()) turn.problem = "The model said nothing. What follows leaves this question out.";
  } catch (error) {
    if (error.name === "AbortError") ending = "stopped";
    else turn.problem = error.message;
  }
  if (turn.reply || !turn.problem) turn.usage = usageLine(usage, { ...times, end: performance.now() }, ending);
  setRunning(null);
  if (state.turns.includes(turn)) renderAnswer(turn);
}

async function* chunksOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(), parser = new EventParser();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection ended before the reply did.");
    for (const data of parser.push(value)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

function setRunning(running) {
  state.running = running;
  document.body.classList.toggle("busy", running !== null);
  $("chat").setAttribute("aria-busy", running !== null);
}

const stop = () => state.running?.controller.abort();

/** Put a question into the box. editing: the turn that it will replace, with all that follow it. */
function compose(text, media, editing = null) {
  Object.assign(state, { media, editing });
  $("text").value = text;
  $("editing").hidden = !editing;
  const from = editing ? state.turns.indexOf(editing) : state.turns.length;
  state.turns.forEach((turn, n) => turn.element.classList.toggle("replaced", n >= from));
  show("problem", "");
  showMedia();
  fitText();
  $("text").focus();
}

function fitText() {
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

function restart() {
  stop();
  for (const { url } of state.turns.flatMap(({ media }) => media)) URL.revokeObjectURL(url);
  state.turns = [];
  $("chat").replaceChildren();
  $("empty").hidden = false;
  compose("", []);
}

$("ask").onsubmit = (event) => { event.preventDefault(); ask(); };
$("stop").onclick = stop;
$("restart").onclick = restart;
$("cancel-edit").onclick = () => compose("", []);
$("settings").oninput = showSettings;
$("show-settings").onclick = () => openSettings($("settings").hidden);
$("files").onchange = () => { addFiles($("files").files); $("files").value = ""; };
$("login").oncancel = (event) => event.preventDefault();
$("text").oninput = fitText;
$("text").onpaste = ({ clipboardData }) => { if (!clipboardData.getData("text/plain")) addFiles(clipboardData.files); };
$("scroll").onscroll = ({ target }) => { state.atEnd = target.scrollHeight - target.scrollTop - target.clientHeight < 60; };
$("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (state.running) stop();
  else if (state.editing) compose("", []);
  else if (matchMedia("(max-width: 48rem)").matches) openSettings(false);
};
for (const kind of ["dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", kind === "dragover");
    if (kind === "drop") addFiles(event.dataTransfer.files);
  });

openSettings(matchMedia("(min-width: 72rem)").matches);
start().catch((error) => show("problem", error.message));
