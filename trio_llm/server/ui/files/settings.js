// The settings of a conversation: its system prompt, sampling, tools and the form of its answers.
import { byId } from "./dom.js";
import { EXAMPLES } from "./request.js";

const form = () => byId("settings-form");

// Shows the settings of a conversation.
export function show(settings) {
  for (const field of form().elements) {
    if (field.name) field.value = settings[field.name] ?? "";
  }
  showError("");
}

export function showError(text) {
  byId("settings-error").textContent = text;
}

// Calls `changed` with all settings, name by name, whenever one changes.
export function watch(changed) {
  const report = () => {
    const filled = [...form().elements].filter((field) => field.name && field.value !== "");
    changed(Object.fromEntries(filled.map((field) => [field.name, field.value])));
  };
  form().addEventListener("input", report);
  form().addEventListener("submit", (event) => event.preventDefault());
  for (const button of form().querySelectorAll("[data-example]")) {
    const name = button.dataset.example;
    button.addEventListener("click", () => {
      form().elements[name].value = JSON.stringify(EXAMPLES[name], null, 2);
      report();
    });
  }
}
