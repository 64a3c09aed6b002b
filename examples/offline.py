"""Run a model inside this program, without a server: completions, a chat, structured output."""

from trio_llm import LLM, SamplingParams, StructuredOutputs

# Without a name it is the demo model; else LLM("/models/Qwen2.5-0.5B-Instruct"), or a hub id.
with LLM(num_kv_blocks=256) as llm:
    greedy = SamplingParams(temperature=0, max_tokens=24)
    for output in llm.generate(["The capital of France is", "Once upon a time"], greedy, use_tqdm=False):
        print(repr(output.prompt), "->", repr(output.outputs[0].text))

    conversations = [[{"role": "user", "content": f"What is the capital of {name}?"}] for name in ("Japan", "Egypt")]
    for output in llm.chat(conversations, greedy, use_tqdm=False):
        print(output.outputs[0].message["content"])

    one_of = SamplingParams(temperature=0, structured_outputs=StructuredOutputs(choice=["yes", "no"]))
    print(llm.chat(conversations[0], one_of, use_tqdm=False)[0].outputs[0].text)
