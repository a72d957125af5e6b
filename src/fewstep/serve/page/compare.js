// Two models or settings on the same question, a vote, and the votes so far.

import { getBlob, getJson, postJson, streamed } from "./api.js";
import { Answer } from "./answer.js";
import { Running, byId, element, sendOnEnter, showAlert } from "./dom.js";
import { Setup, asked } from "./setup.js";

export function comparePanel(models) {
  const panel = byId("compare");
  const form = byId("compare-form");
  const prompt = byId("compare-prompt");
  const votes = byId("compare-vote");
  const said = byId("compare-said");
  const running = new Running(panel, byId("compare-stop"), [form.querySelector("[type=submit]")]);
  const setups = ["a", "b"].map(
    (side, index) =>
      new Setup(panel.querySelector(`[data-setup="compare-${side}"]`), models, { initial: models[index % models.length].id }),
  );
  let shown = null; // the sides as they stand on the screen: { key: "a" | "b", label, heading }
  sendOnEnter(prompt, form);

  // Lay out both sides for a question.
  function lineUp(text) {
    const blind = byId("compare-blind").checked;
    const contenders = setups.map((setup, index) => {
      const [path, what] = asked(setup.model, [{ role: "user", content: text }]);
      return { key: "ab"[index], label: setup.label, path, body: { ...what, ...setup.fields, fewstep: { canvas: true } } };
    });
    if (contenders[0].label === contenders[1].label) throw new Error("A and B are the same; choose another model or setting");
    if (blind && Math.random() < 0.5) contenders.reverse();
    shown = contenders.map((one, index) => ({ ...one, answer: new Answer({ clock: true }), place: ["Left", "Right"][index] }));
    for (const side of shown) {
      side.heading = element("h2", {}, blind ? side.place : side.label);
      side.answer.root.setAttribute("aria-label", `${side.place} answer`);
    }
    byId("compare-answers").replaceChildren(
      ...shown.map((side) => element("div", { class: "side" }, side.heading, side.answer.root)),
    );
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = prompt.value.trim();
    if (!text) return;
    running.run(async (signal) => {
      showAlert(null);
      votes.hidden = true;
      said.textContent = "";
      try {
        lineUp(text);
        const answer = (side) => side.answer.follow(streamed(side.path, side.body, signal));
        if (byId("compare-turns").checked) {
          for (const side of shown) if (!signal.aborted) await answer(side);
        } else {
          const ended = await Promise.allSettled(shown.map(answer));
          const failed = ended.find((one) => one.status === "rejected");
          if (failed) throw failed.reason;
        }
        if (signal.aborted) return;
        shown.prompt = text;
        votes.hidden = false;
        votes.querySelector("button").focus();
      } catch (error) {
        showAlert(error);
      }
    });
  });

  votes.addEventListener("click", async (event) => {
    const place = event.target.dataset?.vote;
    if (!place || !shown) return;
    const [left, right] = shown;
    const winner = { left: left.key, right: right.key, tie: "tie" }[place];
    const label = Object.fromEntries(shown.map((side) => [side.key, side.label]));
    votes.hidden = true;
    for (const side of shown) side.heading.textContent = side.label;
    try {
      await postJson("compare/votes", { a: label.a, b: label.b, winner, prompt: shown.prompt });
      said.textContent = `Your vote is counted: ${winner === "tie" ? "a tie" : label[winner]}. Left was ${left.label}, right ${right.label}.`;
      await tally();
    } catch (error) {
      showAlert(error);
    }
    prompt.focus();
  });

  async function tally() {
    const { pairs } = await getJson("compare/votes");
    byId("compare-tally").replaceChildren(pairs.length ? table(pairs) : element("p", { class: "hint" }, "No vote yet."));
    byId("compare-csv").disabled = !pairs.length;
  }

  byId("compare-csv").addEventListener("click", async () => {
    try {
      const url = URL.createObjectURL(await getBlob("compare/votes.csv"));
      const link = element("a", { href: url, download: "votes.csv" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 10_000);
    } catch (error) {
      showAlert(error);
    }
  });
  return { shownAgain: () => tally().catch(showAlert) };
}

function table(pairs) {
  const head = ["A", "B", "A better", "B better", "ties", "share of A", "95 % interval"];
  const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(0)} %`);
  const rows = pairs.map((pair) => [
    pair.a,
    pair.b,
    pair.wins_a,
    pair.wins_b,
    pair.ties,
    percent(pair.share_a),
    pair.share_a_ci95?.[0] == null || pair.share_a == null ? "–" : pair.share_a_ci95.map(percent).join(" to "),
  ]);
  return element(
    "table",
    {},
    element("caption", { class: "hint" }, "The share is of the votes that are no tie."),
    element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, String(cell)))))),
  );
}
