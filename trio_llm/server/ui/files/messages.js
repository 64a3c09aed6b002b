// Shows the messages of a conversation.
import { byId, copyButton, element } from "./dom.js";
import { rendered } from "./markdown.js";

const NAMES = { user: "You", assistant: "Model", tool: "Tool result" };
const STARTERS = ["What is the capital of Japan?", "Tell me a story.", "What can you do?"];
const whole = new Intl.NumberFormat("en");
const list = () => byId("messages");

// Replaces all that is shown. `actions` are edit(message), again() and start(text).
export function showAll(conversation, actions) {
  const { messages } = conversation;
  const last = messages.at(-1);
  const shown = messages.map((message) => article(message, message === last, actions));
  list().replaceChildren(...(shown.length ? shown : [welcome(actions)]));
  list().scrollTop = list().scrollHeight;
}

// Shows the last message again, which has grown, and follows it if its end was in view.
export function showLast(message, isLast, actions) {
  const box = list();
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
  box.lastElementChild.replaceWith(article(message, isLast, actions));
  if (follows) box.scrollTop = box.scrollHeight;
}

function welcome(actions) {
  const starters = STARTERS.map((text) => {
    const button = element("button", { type: "button", textContent: text });
    button.addEventListener("click", () => actions.start(text));
    return button;
  });
  return element("div", { className: "welcome" },
    element("h2", { textContent: "Ask the model" }),
    element("p", { className: "muted", textContent: "Conversations stay in this browser." }),
    element("div", { className: "starters" }, ...starters));
}

function article(message, isLast, actions) {
  const made = element("article", { className: `message ${message.role}` });
  made.append(element("h3", { textContent: NAMES[message.role] }));
  if (message.reasoning) made.append(thinking(message));
  made.append(content(message));
  for (const { name, arguments: text } of message.tool_calls ?? []) {
    made.append(element("div", { className: "call" },
      element("span", { className: "muted", textContent: "calls " }),
      element("code", { textContent: `${name}(${text})` })));
  }
  if (message.error) made.append(element("p", { className: "error", textContent: message.error }));
  made.append(footer(message, isLast, actions));
  return made;
}

function content(message) {
  const box = element("div", { className: "content" });
  if (message.role === "assistant") box.append(rendered(message.content));
  else box.textContent = message.content;
  if (message.streaming) box.classList.add("streaming");
  return box;
}

function thinking(message) {
  const open = message.streaming && !message.content;
  return element("details", { className: "thinking", open },
    element("summary", { textContent: "Thinking" }),
    element("div", { className: "content" }, rendered(message.reasoning)));
}

function footer(message, isLast, actions) {
  const made = element("footer", {}, element("span", { className: "stats", textContent: stats(message) }));
  if (message.streaming) return made;
  made.append(copyButton(() => message.content));
  if (message.role === "user") made.append(action("Edit", () => actions.edit(message)));
  if (message.role === "assistant" && isLast) made.append(action("Again", actions.again));
  return made;
}

function action(label, act) {
  const button = element("button", { type: "button", className: "link", textContent: label });
  button.addEventListener("click", act);
  return button;
}

// Spells the counts and times of an answer.
function stats({ usage, rate, firstMs, finish }) {
  if (!usage) return "";
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  return [
    `${whole.format(usage.prompt_tokens)} prompt tokens${cached ? ` (${whole.format(cached)} cached)` : ""}`,
    `${whole.format(usage.completion_tokens)} generated`,
    rate ? `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s` : "",
    firstMs === undefined ? "" : `first after ${Math.round(firstMs)} ms`,
    finish && finish !== "stop" ? `ended by: ${finish}` : "",
  ].filter(Boolean).join(" · ");
}
