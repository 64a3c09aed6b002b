// Starts the page, and shows the part that the address names.
import { startChat } from "./chat.js";
import { byId } from "./dom.js";
import { watchKeyButton } from "./key.js";
import { startLive, watchIf } from "./live.js";

const PARTS = ["chat", "engine"];

function route() {
  const chosen = PARTS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat";
  for (const part of PARTS) {
    byId(part).hidden = part !== chosen;
    byId(`to-${part}`).ariaCurrent = part === chosen ? "page" : null;
  }
  watchIf(chosen === "engine" && !document.hidden);
}

addEventListener("hashchange", route);
document.addEventListener("visibilitychange", route);
watchKeyButton();
startLive();
route();
await startChat();
