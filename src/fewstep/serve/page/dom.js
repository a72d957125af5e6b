// Elements. What comes from a person, a model or the server is set as text, never as markup.

export const byId = (id) => document.getElementById(id);

// element("p", { class: "hint" }, "text", child, ...)
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [attribute, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(attribute, "");
    else if (value !== false && value != null) made.setAttribute(attribute, value);
  }
  made.append(...children);
  return made;
}

export function showAlert(error) {
  const alert = byId("alert");
  alert.hidden = !error;
  if (!error) return;
  const close = element("button", { type: "button", "aria-label": "Close the message" }, "×");
  close.addEventListener("click", () => (alert.hidden = true));
  alert.replaceChildren(element("span", {}, sentence(error)), close);
}

export function sentence(error) {
  const text = String(error?.message ?? error);
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

// Enter sends; Shift+Enter begins a new line, and so does Enter while an input method composes a character.
export function sendOnEnter(textarea, form) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

// One answer at a time: `run(signal, work)` enables the stop button while `work` runs; Escape stops too.
export class Running {
  constructor(panel, stop, others = []) {
    this.stop = stop;
    this.others = others;
    this.controller = null;
    stop.addEventListener("click", () => this.abort());
    panel.addEventListener("keydown", (event) => event.key === "Escape" && this.abort());
  }

  get busy() {
    return this.controller !== null;
  }

  abort() {
    this.controller?.abort();
  }

  async run(work) {
    if (this.busy) return;
    this.controller = new AbortController();
    this.show();
    try {
      await work(this.controller.signal);
    } finally {
      this.controller = null;
      this.show();
    }
  }

  show() {
    this.stop.disabled = !this.busy;
    for (const button of this.others) button.disabled = this.busy;
  }
}
