// Talks to this server: sends the key, asks for one where it is needed, and reads errors and server-sent events.
import { askForKey, storedKey } from "./key.js";

export class ApiError extends Error {}

// Sends a GET, or a POST if there is a body. Throws ApiError with the server's own words.
export async function call(path, { body, signal } = {}) {
  for (;;) {
    const key = storedKey();
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const request = { headers, signal, cache: "no-store" };
    if (body !== undefined) {
      headers["Content-Type"] = "application/json";
      Object.assign(request, { method: "POST", body: JSON.stringify(body) });
    }
    const response = await fetch(path, request);
    if (response.ok) return response;
    const message = await errorText(response);
    if (response.status !== 401) throw new ApiError(message);
    const why = key ? "The server does not accept this key." : "The server needs a key.";
    if (!await askForKey(why)) throw new ApiError(message);
  }
}

async function errorText(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

// Yields the data of each event. Leaving the loop ends the request.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue; // A comment keeps the connection open.
        const data = part.slice("data: ".length);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
