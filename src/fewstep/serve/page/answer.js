// An answer while it forms: its tokens, the passes that fixed them, and its figures.

import { element, sentence } from "./dom.js";

const COLOURS = 12;

export class Answer {
  constructor({ clock = false } = {}) {
    this.text = "";
    this.state = null; // the last `fewstep` object of the stream
    this.usage = null;
    this.finished = false;
    this.changed = true;
    this.canvas = element("div", { class: "canvas" });
    this.legend = element("div", { class: "legend" });
    this.figures = element("p", { class: "figures" });
    this.clock = clock ? element("p", { class: "clock", role: "timer", "aria-live": "off" }, "0.00 s") : null;
    // Busy: a screen reader waits until the answer is complete.
    this.root = element("article", { class: "answer card", "aria-busy": "true", "aria-label": "Answer" });
    this.root.append(...(this.clock ? [this.clock] : []), this.canvas, this.figures, this.legend);
  }

  // Show the chunks of a stream as they come. What is aborted keeps what is there; errors are shown and thrown.
  async follow(chunks) {
    this.begun = performance.now();
    this.root.classList.add("forming");
    const frame = () => {
      if (this.finished) return;
      this.drawFigures();
      if (this.changed) this.draw();
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
    try {
      for await (const chunk of chunks) this.take(chunk);
    } catch (error) {
      if (error.name !== "AbortError") {
        this.root.append(element("p", { class: "alert" }, sentence(error)));
        throw error;
      }
      this.stopped = true;
    } finally {
      this.finish();
    }
  }

  take(chunk) {
    const choice = chunk.choices?.[0];
    this.text += choice?.delta?.content ?? choice?.text ?? "";
    this.finishReason = choice?.finish_reason ?? this.finishReason;
    if (chunk.fewstep) this.state = chunk.fewstep;
    if (chunk.usage) this.usage = chunk.usage;
    this.changed = true;
  }

  get seconds() {
    const elapsed = (this.ended ?? performance.now()) - this.begun;
    return this.finished && this.state?.seconds ? this.state.seconds : elapsed / 1000;
  }

  get numTokens() {
    return this.state?.num_tokens ?? this.usage?.completion_tokens ?? 0;
  }

  get numForwards() {
    return this.state?.num_forwards ?? this.usage?.fewstep?.num_forwards ?? 0;
  }

  finish() {
    this.ended = performance.now();
    this.finished = true;
    this.draw();
    this.drawFigures();
    this.root.classList.remove("forming");
    this.root.setAttribute("aria-busy", "false");
  }

  draw() {
    this.changed = false;
    const tokens = this.state?.tokens ?? [];
    const final = tokens.filter((token) => !token.provisional);
    // Texts of single tokens may lack a space or a part of a character: what was told as text is what counts.
    const whole = !this.finished || final.map((token) => token.text).join("") === this.text;
    if (tokens.length && whole && !(this.finished && this.stopped)) this.canvas.replaceChildren(...tokens.map(tokenSpan));
    else this.canvas.textContent = this.text;
    this.canvas.classList.toggle("nothing", this.canvas.textContent === "");
    this.legend.replaceChildren(...passes(final));
  }

  drawFigures() {
    this.figures.textContent = this.described();
    if (this.clock) this.clock.textContent = `${this.seconds.toFixed(2)} s`;
  }

  described() {
    const [tokens, forwards, seconds] = [this.numTokens, this.numForwards, this.seconds];
    const parts = [`${forwards} ${forwards === 1 ? "pass" : "passes"}`, `${tokens} tokens`];
    if (forwards) parts.push(`${(tokens / forwards).toFixed(1)} per pass`);
    if (seconds > 0) parts.push(`${(tokens / seconds).toFixed(0)} tokens/s`);
    if (!this.clock) parts.push(`${seconds.toFixed(2)} s`);
    const candidates = this.usage?.fewstep?.candidates ?? [];
    if (candidates.length > 1) parts.push(`the most probable of ${candidates.length} lengths`);
    if (this.stopped) parts.push("stopped");
    else if (this.finished && this.finishReason === "length") parts.push("cut off at the limit of tokens");
    return parts.join(" · ");
  }
}

export function tokenSpan(token) {
  if (token.provisional) {
    return element("span", { class: "provisional", title: "still open" }, token.text || "░");
  }
  return element("span", { class: `pass pass-${token.step % COLOURS}`, title: `pass ${token.step}` }, token.text);
}

// A chip for each pass that fixed tokens, with their number.
function passes(tokens) {
  const counts = new Map();
  for (const { step } of tokens) counts.set(step, (counts.get(step) ?? 0) + 1);
  if (!counts.size || counts.size > 40) return [];
  const chips = [...counts.entries()]
    .sort(([one], [other]) => one - other)
    .map(([step, count]) =>
      element("li", { class: `pass pass-${step % COLOURS}`, title: `pass ${step} fixed ${count} tokens` }, `${step}: ${count}`),
    );
  return [element("span", {}, "tokens fixed in pass "), element("ul", { "aria-label": "Tokens fixed in each pass" }, ...chips)];
}
