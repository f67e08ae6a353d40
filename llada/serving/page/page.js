// The page: chat, infill and comparison over the server's own OpenAI-compatible API.
"use strict";

const $ = (id) => document.getElementById(id);
const FIELDS = [
  ["max_tokens", "number", "Answer length"],
  ["temperature", "number", "Temperature"],
  ["block_length", "number", "Block length"],
  ["steps", "number", "Steps"],
  ["remasking", "text", "Order"],
  ["parallel_decoding", ["none", "threshold", "factor", "entropy", "klass"], "Parallel decoding"],
  ["threshold", "number", "Threshold"],
  ["factor", "number", "Factor"],
  ["cache", ["none", "prefix", "dual", "blocks"], "Cache"],
  ["seed", "number", "Seed"],
];
let conversation = [];
let running = null; // AbortController of the answer in work
let defaults = {};

// -- settings ---------------------------------------------------------------------------------------------

function fillSettings(form, orders) {
  for (const [name, kind, title] of FIELDS) {
    const label = document.createElement("label");
    label.textContent = title;
    const choices = name === "remasking" ? orders : Array.isArray(kind) ? kind : null;
    const input = document.createElement(choices ? "select" : "input");
    if (choices) input.append(...["", ...choices].map((c) => new Option(c || "default", c)));
    else Object.assign(input, { type: "number", step: "any", placeholder: defaults[name] ?? "default" });
    input.name = name;
    label.append(input);
    form.append(label);
  }
  form.addEventListener("submit", (event) => event.preventDefault());
}

function settingsOf(form) {
  const values = {};
  for (const input of form.elements) {
    if (!input.name || input.value === "") continue;
    values[input.name] = input.type === "number" ? Number(input.value) : input.value;
  }
  return values;
}

// -- the server ---------------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message ?? `the server answered ${response.status}`);
}

// Sends a request and calls back for every step and every piece of text.
async function stream(path, body, { onStep, onText, signal }) {
  const response = await fetch(path, {
    method: "POST", headers: headers(), signal,
    body: JSON.stringify({ ...body, stream: true, stream_steps: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", usage = null;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the server stopped in the middle of an answer");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return usage;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) usage = chunk.usage;
      if (chunk.llada) onStep(chunk.llada);
      const text = chunk.choices[0]?.delta?.content ?? chunk.choices[0]?.text;
      if (text) onText(text);
    }
  }
}

// -- one answer ---------------------------------------------------------------------------------------------

function lengthOf(settings) {
  const length = settings.max_tokens ?? defaults.max_tokens;
  const block = settings.block_length ?? defaults.block_length ?? length;
  return Math.ceil(length / block) * block; // the server rounds up to whole blocks
}

// Shows an answer in `root` while it denoises; resolves to its text.
async function answer(root, path, body, settings, { before = "", after = "", title = "" } = {}) {
  const box = document.createElement("div");
  const text = document.createElement("div");
  const notes = document.createElement("div");
  notes.className = "notes";
  root.replaceChildren(box, text, notes);
  const view = new Denoising(box, lengthOf(settings), { before, after });
  let whole = "";
  const started = performance.now();
  running = new AbortController();
  setBusy(true);
  try {
    const usage = await stream(path, { ...body, ...settings }, {
      signal: running.signal,
      onStep: (step) => view.push(step),
      onText: (piece) => { whole += piece; text.textContent = whole; },
    });
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    notes.textContent = `${usage?.completion_tokens ?? "?"} tokens · ${view.steps.length} steps · ${seconds} s`;
    view.bar.append(saveButton(view, { before, after, title }));
    return whole;
  } catch (error) {
    root.classList.add("error");
    text.textContent = error.name === "AbortError" ? "(stopped)" : error.message;
    return null;
  } finally {
    running = null;
    setBusy(false);
  }
}

function setBusy(busy) {
  $("stop").hidden = !busy;
  for (const button of document.querySelectorAll('main button[type="submit"], #clear')) button.disabled = busy;
}

// A button that saves the replay as one HTML file that needs nothing else.
function saveButton(view, { before, after, title }) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Save replay" });
  button.addEventListener("click", async () => {
    const [style, script] = await Promise.all(["page.css", "denoise.js"].map((f) => fetch(f).then((r) => r.text())));
    const replay = [{ title, before, after, length: view.cells.length, steps: view.steps }];
    const json = JSON.stringify(replay).replaceAll("<", "\\u003c"); // cannot end the script element
    const page = `<!doctype html><html lang="en"><meta charset="utf-8">` +
      `<meta name="viewport" content="width=device-width, initial-scale=1"><title>LLaDA replay</title>` +
      `<style>${style}</style><main></main><script type="application/json" id="replays">${json}</` +
      `script><script>${script}</` + `script></html>`;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([page], { type: "text/html" }));
    link.download = "replay.html";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  return button;
}

// -- chat, infill, comparison ---------------------------------------------------------------------------------

function addMessage(role, text) {
  const element = document.createElement("div");
  element.className = `message ${role}`;
  element.textContent = text;
  $("messages").append(element);
  element.scrollIntoView({ block: "nearest" });
  return element;
}

async function send() {
  const question = $("question").value.trim();
  if (!question || running) return;
  $("question").value = "";
  addMessage("user", question);
  conversation.push({ role: "user", content: question });
  const body = { messages: conversation };
  const text = await answer(addMessage("assistant", ""), "v1/chat/completions", body, settingsOf($("settings")), { title: question });
  if (text === null) conversation.pop();
  else conversation.push({ role: "assistant", content: text });
  $("question").focus();
}

async function fill() {
  const area = $("text");
  const [start, end] = [area.selectionStart, area.selectionEnd];
  const before = area.value.slice(0, start), after = area.value.slice(end);
  const root = document.createElement("div");
  root.className = "message";
  $("filled").replaceChildren(root);
  if (!before || running) {
    root.textContent = "Select a part that does not begin at the first letter.";
    return;
  }
  const settings = { ...settingsOf($("settings")), max_tokens: Number($("hole").value) };
  const body = { prompt: before, ...(after ? { suffix: after } : {}) };
  const text = await answer(root, "v1/completions", body, settings, { before, after, title: "infill" });
  if (text !== null) {
    area.value = before + text + after;
    area.setSelectionRange(start, start + text.length);
  }
}

async function compare() {
  const prompt = $("both").value.trim();
  if (!prompt || running) return;
  const body = { messages: [{ role: "user", content: prompt }] };
  for (const side of ["left", "right"]) {
    $(side).className = "message";
    await answer($(side), "v1/chat/completions", body, settingsOf($(`settings-${side}`)), { title: prompt });
  }
}

function choose(tab) {
  for (const other of document.querySelectorAll('[role="tab"]')) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
}

function listen() {
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      const next = tabs[(i + move + tabs.length) % tabs.length];
      choose(next);
      next.focus();
    });
  });
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  $("fill").addEventListener("submit", (event) => { event.preventDefault(); fill(); });
  $("versus").addEventListener("submit", (event) => { event.preventDefault(); compare(); });
  $("stop").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => { conversation = []; $("messages").replaceChildren(); });
  $("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  });
  $("key").addEventListener("change", load);
}

let isFilled = false;
async function load() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) {
    $("model").textContent = (await failure(response)).message;
    return;
  }
  const [card] = (await response.json()).data;
  $("model").textContent = card.id;
  defaults = { ...card.llada.settings, max_tokens: card.llada.settings.gen_length };
  if (isFilled) return;
  isFilled = true;
  for (const id of ["settings", "settings-left", "settings-right"]) fillSettings($(id), card.llada.orders);
}

addEventListener("DOMContentLoaded", () => {
  listen();
  load();
  if (matchMedia("(max-width: 48rem)").matches) $("panel").open = false;
});
