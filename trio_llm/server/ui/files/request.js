// Makes the request for the next answer of a conversation out of its messages and settings.

const NUMBERS = [
  "temperature", "max_tokens", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
];

// Fields that OpenAI's API does not have; its client sends them in `extra_body`.
export const EXTRA = new Set(["top_k", "min_p"]);

export const EXAMPLES = {
  tools: [{
    type: "function",
    function: {
      name: "get_weather",
      description: "Get the weather in a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  }],
  schema: {
    type: "object",
    properties: { name: { type: "string" }, age: { type: "integer" } },
    required: ["name", "age"],
    additionalProperties: false,
  },
};

// Throws an Error that names the field whose text is wrong.
export function requestBody(model, conversation) {
  const { settings } = conversation;
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  const body = { model, messages: [...system, ...conversation.messages.filter(isSent).map(asSent)] };
  for (const name of NUMBERS) {
    if (settings[name]) body[name] = Number(settings[name]);
  }
  const stop = (settings.stop ?? "").split("\n").filter((line) => line !== "");
  if (stop.length) body.stop = stop;
  const tools = parsed("Tools", settings.tools);
  if (tools !== undefined) {
    if (!Array.isArray(tools)) throw new Error("Tools: must be a list, like the example.");
    if (tools.length) body.tools = tools;
  }
  if (body.tools && settings.tool_choice) body.tool_choice = settings.tool_choice;
  const schema = parsed("JSON schema", settings.schema);
  if (schema !== undefined) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  return body;
}

function parsed(label, text) {
  if (!text?.trim()) return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${label}: ${error.message}`);
  }
}

const isSent = (message) => message.role !== "assistant" || message.content !== "" || message.tool_calls?.length > 0;

function asSent(message) {
  const sent = { role: message.role, content: message.content };
  if (message.tool_call_id) sent.tool_call_id = message.tool_call_id;
  if (message.tool_calls?.length) {
    sent.tool_calls = message.tool_calls.map(({ id, name, arguments: text }) => (
      { id, type: "function", function: { name, arguments: text } }
    ));
  }
  return sent;
}

// Returns the calls at the end of a conversation that have no result yet.
export function openCalls(messages) {
  const at = messages.findLastIndex((message) => message.role === "assistant");
  const done = new Set(messages.slice(at + 1).map((message) => message.tool_call_id));
  if (at < 0 || messages.slice(at + 1).some((message) => message.role !== "tool")) return [];
  return (messages[at].tool_calls ?? []).filter((one) => !done.has(one.id));
}
