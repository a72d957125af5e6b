// A text, and what a model that corrects makes of it: such a model answers a text with the corrected text.

import { streamed } from "./api.js";
import { Answer } from "./answer.js";
import { Running, byId, element, showAlert } from "./dom.js";
import { Setup } from "./setup.js";

const MOST_WORDS = 2000; // of which differences are shown; the table below grows with their square

export function correctPanel(models) {
  const panel = byId("correct");
  const form = byId("correct-form");
  const text = byId("correct-text");
  const result = byId("correct-result");
  const running = new Running(panel, byId("correct-stop"), [form.querySelector("[type=submit]")]);
  const setup = new Setup(panel.querySelector("[data-setup]"), models);
  let corrected = "";

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const given = text.value;
    if (!given.trim()) return;
    running.run(async (signal) => {
      showAlert(null);
      result.hidden = true;
      const answer = new Answer();
      byId("correct-answer").replaceChildren(answer.root);
      try {
        const messages = [{ role: "user", content: given }];
        const body = { model: setup.model.id, messages, ...setup.fields, fewstep: { canvas: true } };
        await answer.follow(streamed("v1/chat/completions", body, signal));
        if (answer.stopped) return;
        corrected = answer.text;
        byId("correct-changes").replaceChildren(...changes(given, corrected));
        result.hidden = false;
      } catch (error) {
        showAlert(error);
        answer.root.remove();
      }
    });
  });
  byId("correct-take").addEventListener("click", () => {
    text.value = corrected;
    text.focus();
  });
}

// The second text, with what it has in place of parts of the first: <del> and <ins>, word by word.
export function changes(one, other) {
  const [a, b] = [one, other].map((text) => text.split(/(\s+)/).filter((part) => part !== ""));
  if (a.length > MOST_WORDS || b.length > MOST_WORDS) return [other];
  const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  const parts = [];
  const add = (name, text) => {
    const last = parts.at(-1);
    if (last?.name === name) last.text += text;
    else parts.push({ name, text });
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      add("span", a[i++]);
      j++;
    } else if (j >= b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) {
      add("del", a[i++]);
    } else {
      add("ins", b[j++]);
    }
  }
  return parts.map(({ name, text }) => element(name, {}, text));
}
