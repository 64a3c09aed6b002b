// The API key: asked for when it is needed, and kept in this tab only.
import { byId } from "./dom.js";

const STORED = "trio-llm/key";
let asking = null;

export const storedKey = () => sessionStorage.getItem(STORED);

// Shows the dialog; resolves with whether there is a key to try now. All that ask at once share one dialog.
export function askForKey(why) {
  asking ??= show(why).finally(() => { asking = null; });
  return asking;
}

function show(why) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  byId("key-why").textContent = why;
  input.value = storedKey() ?? "";
  dialog.returnValue = "";
  dialog.showModal();
  input.select();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      // Headers hold printable ASCII only.
      const key = input.value.replace(/[^\x21-\x7e]/g, "");
      input.value = "";
      const used = dialog.returnValue === "use";
      if (used && key) sessionStorage.setItem(STORED, key);
      else if (used) sessionStorage.removeItem(STORED);
      resolve(used && key !== "");
    }, { once: true });
  });
}

export function watchKeyButton() {
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
  byId("key-button").addEventListener("click", async () => {
    if (await askForKey("Sent with every request of this page.")) location.reload();
  });
}
