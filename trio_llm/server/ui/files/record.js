// The button that starts and stops a record, where the server has a directory for it.
import { call } from "./api.js";
import { byId } from "./dom.js";

export function showRecording(recording) {
  const button = byId("record");
  button.hidden = recording === null;
  byId("no-record").hidden = recording !== null;
  button.ariaPressed = String(recording === true);
  button.textContent = recording ? "Recording: stop" : "Record";
}

export function watchRecordButton() {
  const button = byId("record");
  button.addEventListener("click", async () => {
    try {
      await call("v1/engine/record", { body: { recording: button.ariaPressed !== "true" } });
      byId("record-error").textContent = "";
    } catch (error) {
      byId("record-error").textContent = error.message;
    }
  });
}
