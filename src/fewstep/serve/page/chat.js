// The conversation.

import { streamed } from "./api.js";
import { Answer } from "./answer.js";
import { Running, byId, element, sendOnEnter, showAlert } from "./dom.js";
import { Setup, asked } from "./setup.js";

const EXAMPLES = [
  "There are 36 girls in the garden. If there are 2 times the number of boys in the garden, how many kids are in the garden?",
  "A boy has 9 marbles. His friend has 5 fewer marbles than he has. How many marbles do they have together?",
];

export function chatPanel(models) {
  const panel = byId("chat");
  const form = byId("chat-form");
  const field = byId("chat-question");
  const log = byId("chat-log");
  const again = byId("chat-again");
  const remember = byId("chat-remember");
  const running = new Running(panel, byId("chat-stop"), [form.querySelector("[type=submit]"), byId("chat-clear")]);
  const setup = new Setup(panel.querySelector("[data-setup]"), models, { onModel: show });
  let turns = []; // { question, answer, shown }
  show(setup.model);
  sendOnEnter(field, form);

  function show(model) {
    // Models that were trained on single questions are confused by earlier ones.
    remember.checked = model.fewstep?.multi_turn !== false;
    const examples = EXAMPLES.map((text) => {
      const button = element("button", { type: "button" }, text);
      button.addEventListener("click", () => ask(text));
      return button;
    });
    const warning = "This model solves grade-school word problems like these, and answers nonsense to anything else:";
    byId("chat-examples").replaceChildren(...(model.fewstep?.bundled ? [element("p", { class: "hint" }, warning), ...examples] : []));
  }

  const earlier = () => (remember.checked ? turns.filter((turn) => turn.answer) : []);

  function messagesFor(text, numLeftOut) {
    const system = byId("chat-system").value.trim();
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...earlier().slice(numLeftOut).flatMap((turn) => [
        { role: "user", content: turn.question },
        { role: "assistant", content: turn.answer },
      ]),
      { role: "user", content: text },
    ];
  }

  async function ask(text) {
    await running.run(async (signal) => {
      showAlert(null);
      const question = element("div", { class: "question" }, text);
      let answer = new Answer();
      byId("chat-empty").hidden = true;
      log.append(question, answer.root);
      again.disabled = true;
      question.scrollIntoView({ block: "start" });
      try {
        for (let numLeftOut = 0; ; numLeftOut++) {
          try {
            const [path, what] = asked(setup.model, messagesFor(text, numLeftOut));
            await answer.follow(streamed(path, { ...what, ...setup.fields, fewstep: { canvas: true } }, signal));
            break;
          } catch (error) {
            if (error.code !== "context_length_exceeded" || numLeftOut >= earlier().length) throw error;
            const next = new Answer(); // without the oldest turns, for which the model has no room
            answer.root.replaceWith(next.root);
            answer = next;
          }
        }
        turns.push({ question: text, answer: answer.text, shown: [question, answer.root] });
      } catch (error) {
        showAlert(error);
        question.remove();
        answer.root.remove();
        field.value ||= text; // so that it need not be typed again
      }
    });
    again.disabled = !turns.length;
    byId("chat-empty").hidden = turns.length > 0;
    field.focus();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = field.value.trim();
    if (!text || running.busy) return;
    field.value = "";
    ask(text);
  });
  again.addEventListener("click", () => {
    if (running.busy) return;
    const last = turns.pop();
    last.shown.forEach((one) => one.remove());
    ask(last.question);
  });
  byId("chat-clear").addEventListener("click", () => {
    turns = [];
    log.replaceChildren();
    again.disabled = true;
    byId("chat-empty").hidden = false;
    field.focus();
  });
}
