// Streams one answer into a message.
import { call, events } from "./api.js";

// Asks for an answer and calls `changed` whenever `message` has grown. Throws when it fails or is stopped.
export async function stream(body, message, signal, changed) {
  const began = performance.now();
  const asked = {
    ...body,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    timings_per_token: true,
  };
  const response = await call("v1/chat/completions", { body: asked, signal });
  for await (const chunk of events(response)) {
    message.firstMs ??= performance.now() - began;
    message.usage = chunk.usage ?? message.usage;
    message.rate = chunk.timings?.predicted_per_second ?? message.rate;
    for (const choice of chunk.choices) {
      add(message, choice.delta);
      message.finish = choice.finish_reason ?? message.finish;
    }
    changed();
  }
}

function add(message, delta) {
  message.content += delta.content ?? "";
  if (delta.reasoning) message.reasoning = (message.reasoning ?? "") + delta.reasoning;
  for (const part of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    const made = message.tool_calls[part.index] ??= { id: "", name: "", arguments: "" };
    made.id = part.id ?? made.id;
    made.name += part.function?.name ?? "";
    made.arguments += part.function?.arguments ?? "";
  }
}
