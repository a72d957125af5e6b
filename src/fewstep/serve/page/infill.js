// A text with gaps, which a model that sees both sides fills.

import { streamed } from "./api.js";
import { Answer, tokenSpan } from "./answer.js";
import { Running, byId, element, showAlert } from "./dom.js";
import { Setup } from "./setup.js";

const GAP = /_{3,}/g;
const EXAMPLE =
  "<bos>There are 36 girls in the garden. If there are 2 times the number of boys in the garden, how many kids are in " +
  "the garden?<answer>- There are 2*36=___ boys in the garden.\n- In total there are 36+72=108 kids in the garden";

export function infillPanel(models) {
  const panel = byId("infill");
  const text = byId("infill-text");
  const view = byId("infill-view");
  const selected = byId("infill-selected");
  const undo = byId("infill-undo");
  const fill = byId("infill-fill");
  const running = new Running(panel, byId("infill-stop"), [fill, byId("infill-example")]);
  const setup = new Setup(panel.querySelector("[data-setup]"), models, { onModel: show });
  const before = []; // texts to go back to
  show(setup.model);
  draw();

  function show(model) {
    byId("infill-example").hidden = !model.fewstep?.bundled;
  }

  function gaps() {
    return [...text.value.matchAll(GAP)].map((found) => [found.index, found.index + found[0].length]);
  }

  function draw() {
    const parts = [];
    let end = 0;
    gaps().forEach(([from, to], index) => {
      const gap = element("button", { type: "button", class: "gap", "aria-label": `Fill gap ${index + 1}` }, "___");
      gap.addEventListener("click", () => fillAt(from, to));
      parts.push(text.value.slice(end, from), gap);
      end = to;
    });
    view.replaceChildren(...parts, text.value.slice(end));
    view.classList.toggle("nothing", !text.value);
    fill.disabled = running.busy || !gaps().length;
    selected.disabled = running.busy || text.selectionStart === text.selectionEnd;
    undo.disabled = running.busy || !before.length;
    text.readOnly = running.busy;
  }

  async function fillAt(from, to) {
    const [prefix, suffix] = [text.value.slice(0, from), text.value.slice(to)];
    const answer = new Answer();
    answer.canvas.hidden = true; // the tokens stand in the text
    byId("infill-figures").replaceChildren(answer.root);
    let filled = null;
    await running.run(async (signal) => {
      showAlert(null);
      draw();
      const forming = element("span", { class: "canvas inline" }, "░░░");
      view.replaceChildren(prefix, forming, suffix);
      try {
        const length = Number(byId("infill-gap").value);
        const extra = { canvas: true, ...(length ? { gap: length } : {}) };
        const told = { stream_options: { include_usage: true } };
        const body = { model: setup.model.id, prompt: prefix, suffix, ...setup.fields, ...told, fewstep: extra };
        await answer.follow(shownIn(forming, streamed("v1/completions", body, signal)));
        if (!answer.stopped) filled = answer.text;
      } catch (error) {
        showAlert(error);
        answer.root.remove();
      }
    });
    if (filled !== null) {
      before.push(text.value);
      text.value = prefix + filled + suffix;
      text.setSelectionRange(from, from + filled.length);
    }
    draw();
    if (filled !== null) markFilled(prefix, filled, suffix, answer);
    text.focus();
  }

  async function* shownIn(forming, chunks) {
    for await (const chunk of chunks) {
      if (chunk.fewstep?.tokens?.length) forming.replaceChildren(...chunk.fewstep.tokens.map(tokenSpan));
      yield chunk;
    }
  }

  // The filled text once more in colours, if nothing else is left to fill.
  function markFilled(prefix, filled, suffix, answer) {
    if (gaps().length) return;
    const tokens = answer.state?.tokens ?? [];
    const whole = tokens.map((token) => token.text).join("") === filled;
    view.replaceChildren(prefix, element("mark", { class: "canvas inline" }, ...(whole ? tokens.map(tokenSpan) : [filled])), suffix);
  }

  text.addEventListener("input", draw);
  for (const event of ["select", "keyup", "mouseup"]) {
    text.addEventListener(event, () => (selected.disabled = running.busy || text.selectionStart === text.selectionEnd));
  }
  byId("infill-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const first = gaps()[0];
    if (first && !running.busy) fillAt(...first);
  });
  selected.addEventListener("click", () => fillAt(text.selectionStart, text.selectionEnd));
  undo.addEventListener("click", () => {
    text.value = before.pop();
    draw();
    text.focus();
  });
  byId("infill-example").addEventListener("click", () => {
    if (text.value) before.push(text.value);
    text.value = EXAMPLE;
    byId("infill-gap").value = 2;
    draw();
    text.focus();
  });
}
