// The table of requests: phase, age and progress of each.
import { requestColor } from "./colors.js";
import { byId, element } from "./dom.js";

const MAX_ROWS = 64;

export function showRequests({ requests, running, waiting }) {
  byId("request-rows").replaceChildren(...requests.slice(0, MAX_ROWS).map(row));
  const hidden = running + waiting - Math.min(requests.length, MAX_ROWS);
  byId("requests-note").textContent = running + waiting === 0 ? "No request runs." : hidden > 0 ? `and ${hidden} more` : "";
}

function row(request) {
  const swatch = element("span", { className: "swatch" });
  swatch.style.background = requestColor(request.number);
  const name = element("td", { className: "name", title: request.id ?? "" }, swatch, String(request.number));
  if (request.id !== null) name.append(element("b", { textContent: " yours" }));
  const cells = [
    element("td", {}, element("span", { className: `phase ${request.phase}`, textContent: request.phase })),
    element("td", { textContent: age(request.age_s) }),
    element("td", { className: "wide" }, progress(request)),
    element("td", { textContent: request.generated_tokens }),
    element("td", { className: "wide", textContent: request.blocks }),
    element("td", { className: "wide", textContent: request.preemptions || "" }),
  ];
  return element("tr", {}, name, ...cells);
}

// The prompt: how much is computed, with its length beside it.
function progress({ prompt_tokens: prompt, computed_tokens: computed, cached_tokens: cached }) {
  const done = Math.min(prompt, computed);
  const bar = element("progress", { max: prompt, value: done, title: `${done} of ${prompt} prompt tokens, ${cached} cached` });
  bar.ariaLabel = bar.title;
  return element("span", { className: "prompt" }, bar, ` ${prompt}`);
}

function age(seconds) {
  if (seconds === null) return "";
  return seconds < 100 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds / 60)} min`;
}
