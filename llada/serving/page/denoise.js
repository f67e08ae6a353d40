// An answer while it is decided, and its replay. Shared by the page and by replays in a file of their own.
// A step is {step, block, positions, texts, confidences, remasked}; positions count within the answer.
"use strict";

const MASK = "▒";

class Denoising {
  // root: an element to fill; length: tokens of the answer; before, after: the text around it
  constructor(root, length, { before = "", after = "" } = {}) {
    this.steps = [];
    this.shown = 0;
    this.canvas = document.createElement("div");
    this.canvas.className = "canvas";
    this.canvas.append(Denoising.given(before));
    this.cells = Array.from({ length }, () => {
      const cell = document.createElement("span");
      this.canvas.append(cell);
      return cell;
    });
    this.canvas.append(Denoising.given(after));
    this.slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: 0, value: 0 });
    this.slider.setAttribute("aria-label", "Denoising step");
    this.label = document.createElement("output");
    this.play = Object.assign(document.createElement("button"), { type: "button", textContent: "Replay" });
    this.bar = document.createElement("div");
    this.bar.className = "replay";
    this.bar.append(this.play, this.slider, this.label);
    root.replaceChildren(this.canvas, this.bar);
    this.slider.addEventListener("input", () => { this.pause(); this.seek(Number(this.slider.value)); });
    this.play.addEventListener("click", () => (this.timer ? this.pause() : this.start()));
    this.seek(0);
  }

  static given(text) {
    const span = document.createElement("span");
    span.className = "given";
    span.textContent = text; // text is never markup
    return span;
  }

  // A new step at the end, shown unless an older one is being looked at.
  push(step) {
    const follows = this.shown === this.steps.length;
    this.steps.push(step);
    this.slider.max = this.steps.length;
    if (follows) this.seek(this.steps.length);
  }

  // Shows the canvas after the first `count` steps; the last of them is fresh.
  seek(count) {
    const state = this.cells.map(() => null);
    for (const [i, step] of this.steps.slice(0, count).entries()) {
      step.positions.forEach((p, k) => (state[p] = { text: step.texts[k], sure: step.confidences[k], at: i }));
      step.remasked.forEach((p) => (state[p] = { again: true, at: i }));
    }
    let decided = 0;
    this.cells.forEach((cell, p) => {
      const token = state[p];
      const fresh = token !== null && token.at === count - 1;
      if (token === null || token.again) {
        cell.textContent = MASK;
        cell.className = token?.again && fresh ? "again" : "mask";
        cell.removeAttribute("title");
        return;
      }
      decided += 1;
      cell.textContent = token.text;
      cell.className = fresh ? `fresh k${Math.min(9, Math.floor(token.sure * 10))}` : "";
      cell.title = `step ${token.at + 1}, confidence ${token.sure.toFixed(3)}`;
    });
    this.shown = count;
    this.slider.value = count;
    const rate = count ? (decided / count).toFixed(2) : "0";
    this.label.textContent = `step ${count} of ${this.steps.length} · ${rate} tokens a forward`;
  }

  start() {
    if (this.shown === this.steps.length) this.seek(0);
    this.play.textContent = "Pause";
    const pause = Math.max(20, Math.min(200, 4000 / (this.steps.length || 1)));
    this.timer = setInterval(() => {
      if (this.shown >= this.steps.length) return this.pause();
      this.seek(this.shown + 1);
    }, pause);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "Replay";
  }
}

// A replay in a file of its own: <script type="application/json" id="replays"> holds a list of
// {title, before, after, length, steps}.
document.addEventListener("DOMContentLoaded", () => {
  const data = document.getElementById("replays");
  if (data === null) return;
  for (const replay of JSON.parse(data.textContent)) {
    const title = document.createElement("p");
    title.className = "quiet";
    title.textContent = replay.title;
    const root = document.createElement("div");
    root.className = "message";
    document.querySelector("main").append(title, root);
    const view = new Denoising(root, replay.length, replay);
    replay.steps.forEach((step) => view.push(step));
  }
});
