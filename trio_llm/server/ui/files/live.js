// The live view: reads the engine's state while it is in sight, and hands each state to its parts.
import { call, events } from "./api.js";
import { Curves } from "./curves.js";
import { byId } from "./dom.js";
import { Figures } from "./figures.js";
import { PoolMap } from "./pool.js";
import { showRecording, watchRecordButton } from "./record.js";
import { showRequests } from "./requests.js";
import { Timeline } from "./timeline.js";

const RETRY_MS = 2000;
let parts = null;
let watching = null;

// Watches the engine if it is in sight; otherwise nothing is asked of the server.
export function watchIf(inSight) {
  if (inSight && watching === null) {
    parts ??= { figures: new Figures(), pool: new PoolMap(), timeline: new Timeline(), curves: new Curves() };
    watching = new AbortController();
    watch(watching.signal);
  } else if (!inSight) {
    watching?.abort();
    watching = null;
  }
}

export function startLive() {
  watchRecordButton();
}

async function watch(signal) {
  while (!signal.aborted) {
    try {
      say("Connecting");
      parts.figures.restart();
      const response = await call("v1/engine/live", { signal });
      say("Live");
      for await (const frame of events(response)) show(frame);
      say("The server is ending");
    } catch (error) {
      if (!signal.aborted) say(error.message);
    }
    await new Promise((resolve) => { setTimeout(resolve, RETRY_MS); });
  }
}

function say(text) {
  byId("live-state").textContent = text;
  byId("live-state").classList.toggle("on", text === "Live");
}

function show(frame) {
  const figures = parts.figures.add(frame);
  parts.pool.show(frame.pool, frame.requests);
  parts.timeline.add(frame.steps, frame.token_budget, frame.prompt_budget);
  parts.curves.add(frame.at_s, figures, frame.first_token, frame.inter_token);
  showRequests(frame);
  showRecording(frame.recording);
}
