// A text corrected sentence by sentence: a model that corrects answers a sentence with the corrected one.

import { streamed } from "./api.js";
import { tokenSpan } from "./answer.js";
import { Running, byId, element, showAlert } from "./dom.js";
import { Setup } from "./setup.js";

const AT_ONCE = 8; // sentences; the server lets them share passes
const LEAST_WORDS = 3; // of a sentence that is asked about: fewer say too little about what was meant
const LEAST_ALIKE = 0.5; // share of letters that an answer and its sentence have in common, or else it is no correction

export function correctPanel(models) {
  const panel = byId("correct");
  const form = byId("correct-form");
  const text = byId("correct-text");
  const view = byId("correct-changes");
  const figures = byId("correct-figures");
  const take = byId("correct-take");
  const running = new Running(panel, byId("correct-stop"), [form.querySelector("[type=submit]")]);
  const setup = new Setup(panel.querySelector("[data-setup]"), models);
  let corrected = "";

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (text.value.trim()) running.run((signal) => correct(text.value, signal));
  });

  async function correct(given, signal) {
    showAlert(null);
    const begun = performance.now();
    const parts = sentencesOf(given).map((sentence) => ({ sentence, answer: sentence, shown: element("span", {}, sentence) }));
    const asked = parts.filter(({ sentence }) => sentence.trim().split(/\s+/).length >= LEAST_WORDS);
    const sums = { tokens: 0, forwards: 0, done: 0 };
    view.replaceChildren(...parts.map(({ shown }) => shown));
    view.setAttribute("aria-busy", "true");
    byId("correct-result").hidden = false;
    take.disabled = true;
    const tell = () => {
      const seconds = (performance.now() - begun) / 1000;
      figures.textContent = [
        `${sums.done} of ${asked.length} sentences`,
        `${sums.tokens} tokens`,
        ...(sums.forwards ? [`${(sums.tokens / sums.forwards).toFixed(1)} per pass`] : []),
        `${(sums.tokens / seconds).toFixed(0)} tokens/s`,
        `${seconds.toFixed(2)} s`,
      ].join(" · ");
    };
    const waiting = [...asked];
    const worker = async () => {
      for (let part = waiting.shift(); part && !signal.aborted; part = waiting.shift()) {
        await correctOne(part, sums, signal);
        sums.done += 1;
        tell();
      }
    };
    const workers = await Promise.allSettled(Array.from({ length: AT_ONCE }, worker));
    tell();
    view.setAttribute("aria-busy", "false");
    const compared = parts.flatMap(({ sentence, answer }) => changes(sentence, answer));
    view.replaceChildren(...compared.map(({ kind, text }) => element(kind, {}, text)));
    corrected = compared.map(({ kind, text }) => (kind === "del" ? "" : text)).join("");
    take.disabled = corrected === given;
    if (corrected === given && !signal.aborted) figures.textContent += " · nothing to correct";
    const failed = workers.find((one) => one.status === "rejected" && one.reason.name !== "AbortError");
    if (failed) showAlert(failed.reason);
  }

  async function correctOne(part, sums, signal) {
    const [, before, sentence, after] = part.sentence.match(/^(\s*)([^]*?)(\s*)$/);
    const messages = [{ role: "user", content: sentence.replace(/\s+/g, " ") }];
    const body = { model: setup.model.id, messages, ...setup.fields, fewstep: { canvas: true } };
    let [answer, ended, state] = ["", null, null];
    for await (const chunk of streamed("v1/chat/completions", body, signal)) {
      const choice = chunk.choices?.[0];
      answer += choice?.delta?.content ?? "";
      ended = choice?.finish_reason ?? ended;
      if (!chunk.fewstep) continue;
      state = chunk.fewstep;
      part.shown.replaceChildren(before, element("span", { class: "canvas inline" }, ...state.tokens.map(tokenSpan)), after);
    }
    sums.tokens += state?.num_tokens ?? 0;
    sums.forwards += state?.num_forwards ?? 0;
    // An answer without an end is no correction either.
    if (ended === "stop" && alike(sentence, answer.trim()) >= LEAST_ALIKE) part.answer = before + answer.trim() + after;
  }

  take.addEventListener("click", () => {
    text.value = corrected;
    text.focus();
  });
}

// The sentences of a text, each with the white space around it: together they are the text. Lines are apart.
function sentencesOf(text) {
  const segmenter = new Intl.Segmenter("en", { granularity: "sentence" });
  return text.split(/(?<=\n\s*\n)/).flatMap((paragraph) => [...segmenter.segment(paragraph)].map(({ segment }) => segment));
}

// How alike two texts are in their letters, from 0 to 1.
function alike(one, other) {
  const [a, b] = [[...one], [...other]];
  return (2 * longestCommon(a.length, b.length, (i, j) => a[i] === b[j])[0][0]) / Math.max(1, a.length + b.length);
}

// Entry [i][j]: the length of the longest common subsequence of what follows i and j.
function longestCommon(m, n, same) {
  const common = Array.from({ length: m + 1 }, () => new Uint16Array(n + 1));
  for (let i = m - 1; i >= 0; i--) {
    for (let j = n - 1; j >= 0; j--) {
      common[i][j] = same(i, j) ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  return common;
}

// From one text to the other, word by word: what stays (span), goes (del) and comes (ins). White space stays as it is.
function changes(one, other) {
  const [a, b] = [one, other].map((text) => text.split(/(\s+)/).filter((part) => part !== ""));
  const same = (i, j) => a[i] === b[j] || !(a[i].trim() || b[j].trim());
  const common = longestCommon(a.length, b.length, same);
  const parts = [];
  const add = (kind, text) => {
    const last = parts.at(-1);
    if (last?.kind === kind) last.text += text;
    else parts.push({ kind, text });
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && same(i, j)) {
      add("span", a[i++]);
      j++;
    } else if (j >= b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) {
      add("del", a[i++]);
    } else {
      add("ins", b[j++]);
    }
  }
  return parts;
}
