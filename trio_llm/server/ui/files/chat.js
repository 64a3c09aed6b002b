// The chat: which conversation is shown, and what the user does with it.
import { call } from "./api.js";
import { stream } from "./answer.js";
import { showCode } from "./code.js";
import * as conversations from "./conversations.js";
import { byId, element } from "./dom.js";
import { storedKey } from "./key.js";
import * as messages from "./messages.js";
import { openCalls, requestBody } from "./request.js";
import * as settings from "./settings.js";

const whole = new Intl.NumberFormat("en");
// A long text is rendered less often: it costs more.
const pauseMs = (text) => (text.length < 4000 ? 0 : text.length / 40);

let model = null;
let shown = conversations.all()[0] ?? conversations.create({});
const running = new Map(); // Conversation -> the AbortController of its answer.

const actions = { edit, again, start };

// --- what is shown ---------------------------------------------------------------------------------------------------

function show(conversation) {
  shown = conversation;
  settings.show(conversation.settings);
  messages.showAll(conversation, actions);
  showState();
}

function showState() {
  const busy = running.has(shown);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("messages").ariaBusy = String(busy);
  const [open] = openCalls(shown.messages);
  const label = open ? `Result of ${open.name}` : "Message";
  byId("text-label").textContent = label;
  byId("text").placeholder = label;
  const used = shown.messages.findLast((message) => message.usage)?.usage.total_tokens;
  const longest = model?.max_model_len;
  byId("context").textContent = used ? `${whole.format(used)} of ${whole.format(longest)} tokens` : "";
  showList();
}

function showList() {
  const entries = conversations.all().map((one) => {
    const choose = element("button", { type: "button", className: "title", textContent: conversations.title(one) });
    if (one === shown) choose.ariaCurrent = "true";
    choose.addEventListener("click", () => { show(one); closeDrawers(); });
    const remove = element("button", { type: "button", className: "link", textContent: "✕", title: "Delete" });
    remove.ariaLabel = `Delete: ${conversations.title(one)}`;
    remove.addEventListener("click", () => forget(one));
    return element("li", {}, choose, remove);
  });
  byId("conversation-list").replaceChildren(...entries);
}

function forget(conversation) {
  running.get(conversation)?.abort();
  conversations.remove(conversation);
  show(conversation === shown ? conversations.all()[0] ?? conversations.create({}) : shown);
}

// --- what the user does ----------------------------------------------------------------------------------------------

function start(text) {
  byId("text").value = text;
  send();
}

function send() {
  const text = byId("text").value;
  if (running.has(shown) || !text.trim()) return;
  const [open] = openCalls(shown.messages);
  const message = open ? { role: "tool", tool_call_id: open.id, content: text } : { role: "user", content: text };
  const body = next([...shown.messages, message]);
  if (body === null) return;
  byId("text").value = "";
  shown.messages.push(message);
  if (openCalls(shown.messages).length) { // Another result is needed first.
    conversations.save(shown);
    show(shown);
    return;
  }
  answer(shown, body);
}

// Returns the body of the request that answers these messages; null, and says why, if the settings are wrong.
function next(asked) {
  try {
    return requestBody(model?.id, { ...shown, messages: asked });
  } catch (error) {
    settings.showError(error.message);
    toggle("settings", true);
    return null;
  }
}

function edit(message) {
  running.get(shown)?.abort();
  shown.messages.splice(shown.messages.indexOf(message));
  byId("text").value = message.content;
  conversations.save(shown);
  show(shown);
  byId("text").focus();
}

function again() {
  const asked = shown.messages.slice(0, -1);
  const body = next(asked);
  if (body === null) return;
  shown.messages = asked;
  answer(shown, body);
}

async function answer(conversation, body) {
  const message = { role: "assistant", content: "", streaming: true };
  const controller = new AbortController();
  conversation.messages.push(message);
  running.set(conversation, controller);
  conversations.save(conversation);
  show(conversation);
  const painter = paint(conversation, message);
  try {
    await stream(body, message, controller.signal, painter.changed);
  } catch (error) {
    if (!controller.signal.aborted) message.error = error.message;
    else message.finish = "you";
  }
  painter.stop();
  delete message.streaming;
  running.delete(conversation);
  conversations.save(conversation);
  if (shown === conversation) {
    messages.showLast(message, true, actions);
    showState();
  } else {
    showList();
  }
}

// Shows a growing message at most once a frame, and less often when it is long.
function paint(conversation, message) {
  let timer = null;
  const now = () => {
    timer = null;
    if (shown === conversation) messages.showLast(message, true, actions);
  };
  return {
    changed() {
      timer ??= setTimeout(() => requestAnimationFrame(now), pauseMs(message.content));
    },
    stop() {
      clearTimeout(timer);
    },
  };
}

// --- drawers and wiring ----------------------------------------------------------------------------------------------

function toggle(name, open = !byId("chat").classList.contains(`with-${name}`)) {
  byId("chat").classList.toggle(`with-${name}`, open);
  byId(`toggle-${name}`).ariaExpanded = String(open);
}

// On a narrow screen they lie over the conversation.
function closeDrawers() {
  const wide = matchMedia("(min-width: 64rem)").matches;
  for (const name of ["conversations", "settings"]) toggle(name, wide);
}

export async function startChat() {
  closeDrawers();
  for (const name of ["conversations", "settings"]) {
    byId(`toggle-${name}`).addEventListener("click", () => toggle(name));
  }
  settings.watch((changed) => {
    shown.settings = changed;
    settings.showError("");
    if (shown.messages.length) conversations.save(shown);
  });
  byId("new-conversation").addEventListener("click", () => {
    show(shown.messages.length ? conversations.create({ ...shown.settings }) : shown);
    closeDrawers();
    byId("text").focus();
  });
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  byId("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  byId("stop").addEventListener("click", () => running.get(shown)?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) running.get(shown)?.abort();
  });
  byId("view-code").addEventListener("click", () => {
    const draft = byId("text").value;
    const body = next(draft.trim() ? [...shown.messages, { role: "user", content: draft }] : shown.messages);
    if (body !== null) showCode(body, storedKey() !== null);
  });
  show(shown);
  byId("text").focus();
  await showModel();
}

async function showModel() {
  try {
    [model] = (await (await call("v1/models")).json()).data;
    byId("model").textContent = model.id;
    showState();
  } catch (error) {
    byId("model").textContent = error.message;
  }
}
