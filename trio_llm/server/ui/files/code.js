// "View code": the next request as a curl command and as a Python program.
import { byId, copy } from "./dom.js";
import { EXTRA } from "./request.js";

const server = () => new URL("v1", document.baseURI).href;

export function asCurl(body, hasKey) {
  const lines = [
    `curl -N ${server()}/chat/completions`,
    "  -H 'Content-Type: application/json'",
    ...(hasKey ? ['  -H "Authorization: Bearer $VLLM_API_KEY"'] : []),
    `  -d '${JSON.stringify({ ...body, stream: true }, null, 2).replaceAll("'", "'\\''")}'`,
  ];
  return lines.join(" \\\n");
}

export function asPython(body, hasKey) {
  const plain = Object.entries(body).filter(([name]) => !EXTRA.has(name));
  const extra = Object.entries(body).filter(([name]) => EXTRA.has(name));
  if (extra.length) plain.push(["extra_body", Object.fromEntries(extra)]);
  const given = [...plain, ["stream", true]].map(([name, value]) => `    ${name}=${literal(value, "    ")},`);
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${literal(server())}, api_key=${hasKey ? 'os.environ["VLLM_API_KEY"]' : '"none"'})
stream = client.chat.completions.create(
${given.join("\n")}
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
`;
}

// Spells a JSON value in Python.
function literal(value, indent = "") {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const parts = Array.isArray(value)
    ? value.map((one) => literal(one, inner))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one, inner)}`);
  const line = open + parts.join(", ") + close;
  if (line.length < 80 && !line.includes("\n")) return line;
  return `${open}\n${parts.map((part) => `${inner}${part},\n`).join("")}${indent}${close}`;
}

// Shows the dialog for a request.
export function showCode(body, hasKey) {
  const choose = (chosen) => {
    byId("code").textContent = chosen === "curl" ? asCurl(body, hasKey) : asPython(body, hasKey);
    for (const name of ["curl", "python"]) byId(`code-${name}`).ariaPressed = String(name === chosen);
  };
  byId("code-curl").onclick = () => choose("curl");
  byId("code-python").onclick = () => choose("python");
  byId("code-copy").onclick = () => copy(byId("code-copy"), byId("code").textContent);
  choose("curl");
  byId("code-dialog").showModal();
}
