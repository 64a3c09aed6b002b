// What client libraries in JavaScript do against a running server.
//
//     npm install openai @anthropic-ai/sdk ai @ai-sdk/openai @ai-sdk/openai-compatible @ai-sdk/anthropic zod
//     node checks.mjs http://127.0.0.1:8000/v1 demo        # in that folder, against `trio-llm serve --served-model-name demo`
//
// Prints a line per check and exits with 1 if one failed.
import assert from "node:assert/strict";
import OpenAI from "openai";
import Anthropic from "@anthropic-ai/sdk";
import { generateObject, generateText, streamText, tool } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createAnthropic } from "@ai-sdk/anthropic";
import { z } from "zod";

const [url, model] = process.argv.slice(2);
const question = "What is the capital of Japan?";
const answer = "The capital of Japan is Tokyo.";
const messages = [{ role: "user", content: question }];

async function check(name, run) {
  try {
    await run();
    console.log(`ok      ${name}`);
  } catch (error) {
    console.log(`FAILED  ${name}: ${error}`);
    process.exitCode = 1;
  }
}

const openai = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
await check("openai: chat, streamed chat, response, streamed response, embeddings", async () => {
  const asked = { model, messages, temperature: 0 };
  assert.equal((await openai.chat.completions.create(asked)).choices[0].message.content, answer);
  let text = "";
  for await (const chunk of await openai.chat.completions.create({ ...asked, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  assert.equal(text, answer);
  assert.equal((await openai.responses.create({ model, input: question, temperature: 0 })).output_text, answer);
  const stream = openai.responses.stream({ model, input: question, temperature: 0 });
  assert.equal((await stream.finalResponse()).output_text, answer);
  assert.equal((await openai.embeddings.create({ model, input: ["a", "b"] })).data.length, 2);
});

const anthropic = new Anthropic({ baseURL: url.replace(/\/v1$/, ""), apiKey: "none", maxRetries: 0 });
await check("@anthropic-ai/sdk: message, streamed message", async () => {
  const asked = { model, messages, max_tokens: 64, temperature: 0 };
  assert.equal((await anthropic.messages.create(asked)).content[0].text, answer);
  assert.equal((await anthropic.messages.stream(asked).finalMessage()).content[0].text, answer);
});

const models = {
  "@ai-sdk/openai chat": createOpenAI({ baseURL: url, apiKey: "none" }).chat(model),
  "@ai-sdk/openai responses": createOpenAI({ baseURL: url, apiKey: "none" }).responses(model),
  "@ai-sdk/openai-compatible": createOpenAICompatible({ name: "trio-llm", baseURL: url, supportsStructuredOutputs: true })(model),
  "@ai-sdk/anthropic": createAnthropic({ baseURL: url, apiKey: "none" })(model),
};
for (const [name, served] of Object.entries(models)) {
  await check(`${name}: text, stream, object, tool`, async () => {
    const asked = { model: served, prompt: question, temperature: 0, maxOutputTokens: 64, maxRetries: 0 };
    assert.equal((await generateText(asked)).text, answer);
    let text = "";
    for await (const part of streamText(asked).textStream) text += part;
    assert.equal(text, answer);
    const city = z.enum(["Tokyo", "Paris"]);
    const { object } = await generateObject({ ...asked, schema: z.object({ city }) });
    assert.ok(city.options.includes(object.city));
    const weather = tool({ description: "Tells the weather.", inputSchema: z.object({ city }) });
    const { toolCalls } = await generateText({ ...asked, toolChoice: "required", tools: { weather } });
    assert.equal(toolCalls[0].toolName, "weather");
  });
}
