// Which model answers, and with which settings.

import { element } from "./dom.js";

const FIELDS = [
  ["max_tokens", "Most new tokens", { type: "number", min: 1, step: 1, placeholder: "256" }],
  ["threshold", "Threshold", { type: "number", min: 0.01, max: 1, step: "any" }],
  ["temperature", "Temperature", { type: "number", min: 0, step: "any", placeholder: "0" }],
  ["top_p", "Top p", { type: "number", min: 0.01, max: 1, step: "any", placeholder: "1" }],
  ["seed", "Seed", { type: "number", step: 1, placeholder: "any" }],
];

// What a model can do: "chat" (it has a chat template), "infill", "correct". Without any of them it continues texts.
export const abilitiesOf = (model) => model.fewstep?.abilities ?? ["chat"];

// Those that answer questions, or at least continue them.
export const answering = (models) => models.filter((model) => abilitiesOf(model).includes("chat") || !abilitiesOf(model).includes("correct"));

// Where and how a model is asked for what follows these messages. Without a chat template it continues the last one.
export function asked(model, messages) {
  if (abilitiesOf(model).includes("chat")) return ["v1/chat/completions", { model: model.id, messages }];
  return ["v1/completions", { model: model.id, prompt: messages.at(-1).content }];
}

export class Setup {
  // `root`: the element with data-setup; what is in it already is put among the settings.
  constructor(root, models, { initial, onModel = () => {} } = {}) {
    const name = root.dataset.setup;
    const own = [...root.children];
    this.models = new Map(models.map((model) => [model.id, model]));
    this.select = element("select", { id: `${name}-model` });
    this.select.append(...models.map((model) => element("option", { value: model.id }, model.id)));
    if (initial) this.select.value = initial;
    this.about = element("span", { class: "hint" });
    this.inputs = new Map(
      FIELDS.map(([field, , attributes]) => [
        field,
        element("input", { id: `${name}-${field}`, placeholder: "the model's own", ...attributes }),
      ]),
    );
    const labels = FIELDS.map(([field, label]) => element("label", { class: "field" }, `${label} `, this.inputs.get(field)));
    this.others = element("textarea", { id: `${name}-others`, rows: 2, placeholder: "gaps=2", spellcheck: "false" });
    const others = element("label", { class: "field wide" }, "Other settings, name=value in each line ", this.others);
    const grid = element("div", { class: "grid" }, ...labels, others, ...own);
    this.summary = element("summary", {}, "Settings");
    root.replaceChildren(
      element("div", { class: "line" }, element("label", { class: "field model" }, "Model ", this.select), this.about),
      element("details", { class: "settings" }, this.summary, grid),
    );
    this.select.addEventListener("change", () => {
      this.tell();
      onModel(this.model);
    });
    root.addEventListener("input", () => this.tell());
    this.tell();
  }

  get model() {
    return this.models.get(this.select.value);
  }

  // Fields of a request, as the server's API names them. An Error for what is no setting.
  get fields() {
    const given = {};
    for (const [name, input] of this.inputs) {
      if (input.value.trim() !== "") given[name] = Number(input.value);
    }
    for (const line of this.others.value.split("\n")) {
      if (!line.trim()) continue;
      const at = line.indexOf("=");
      if (at < 1) throw new Error(`a setting is written as name=value, and ${JSON.stringify(line.trim())} is not`);
      given[line.slice(0, at).trim()] = valueOf(line.slice(at + 1).trim());
    }
    return given;
  }

  get label() {
    const settings = Object.entries(this.fields).map(([name, value]) => `${name}=${value}`);
    return [this.model.id, ...settings].join(" ");
  }

  tell() {
    const { role, decoder } = this.model.fewstep ?? {};
    this.about.textContent = [role, decoder && `decoder ${decoder}`].filter(Boolean).join(", ").replaceAll("_", " ");
    let given;
    try {
      given = Object.entries(this.fields).map(([name, value]) => `${name} ${value}`);
    } catch {
      given = ["…"];
    }
    this.summary.textContent = given.length ? `Settings: ${given.join(", ")}` : "Settings";
  }
}

function valueOf(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
