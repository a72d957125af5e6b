// The page: its tabs, the key, and the models that the server has.

import { apiKey, getJson } from "./api.js";
import { byId, showAlert } from "./dom.js";
import { chatPanel } from "./chat.js";
import { comparePanel } from "./compare.js";
import { correctPanel } from "./correct.js";
import { infillPanel } from "./infill.js";
import { abilitiesOf, answering } from "./setup.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const panels = new Map();
let begun = false;

function select(tab, { focus = false } = {}) {
  for (const one of tabs) {
    const chosen = one === tab;
    one.setAttribute("aria-selected", String(chosen));
    one.tabIndex = chosen ? 0 : -1;
    byId(one.getAttribute("aria-controls")).hidden = !chosen;
  }
  const name = tab.getAttribute("aria-controls");
  history.replaceState(null, "", `#${name}`);
  panels.get(name)?.shownAgain?.();
  if (focus) tab.focus();
}

function selectNamed() {
  const there = tabs.filter((tab) => !tab.hidden);
  select(there.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash) ?? there[0]);
}

byId("tabs").addEventListener("click", (event) => event.target.closest("[role=tab]") && select(event.target));
byId("tabs").addEventListener("keydown", (event) => {
  const there = tabs.filter((tab) => !tab.hidden);
  const at = there.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: there.length - 1 }[event.key];
  if (to === undefined || at < 0) return;
  event.preventDefault();
  select(there[(to + there.length) % there.length], { focus: true });
});
addEventListener("hashchange", selectNamed);

byId("colours").addEventListener("change", (event) => document.body.classList.toggle("plain", !event.target.checked));

document.addEventListener("key-needed", () => {
  byId("key").open = true;
  byId("key-field").focus();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(byId("key-field").value.trim());
  byId("key").open = false;
  begin();
});
byId("key-field").value = apiKey.get();

async function begin() {
  if (begun) return;
  try {
    const models = (await getJson("v1/models")).data;
    if (begun) return;
    begun = true;
    showAlert(null);
    const able = (ability) => models.filter((model) => abilitiesOf(model).includes(ability));
    for (const [name, fitting, panel] of [
      ["chat", answering(models), chatPanel],
      ["infill", able("infill"), infillPanel],
      ["correct", able("correct"), correctPanel],
      ["compare", answering(models), comparePanel],
    ]) {
      byId(`tab-${name}`).hidden = !fitting.length;
      if (fitting.length) panels.set(name, panel(fitting));
    }
    document.body.classList.add("ready");
    selectNamed();
  } catch (error) {
    showAlert(error);
  }
}

begin();
