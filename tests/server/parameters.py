"""The table of what chat and completions accept: each parameter's good values with their effect, and its bad ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from tests.server.stub import SPECIAL, TOKENIZER
from trio_llm.params import RepetitionDetection, SamplingParams

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@attrs.frozen
class Seen:
    """What came of a request.

    Attributes:
        params: What the model was given, as the engine resolved it.
        prompt: The prompt that it was given, as text.
        choices: Of the answer, or of all chunks of a stream.
    """

    path: str
    params: SamplingParams
    num_samples: int
    prompt: str
    answer: dict[str, Any]
    chunks: Sequence[dict[str, Any]]
    warning: str

    @property
    def choice(self) -> dict[str, Any]:
        return self.answer["choices"][0]

    @property
    def text(self) -> str:
        return self.choice["message"]["content"] if self.path == CHAT else self.choice["text"]


Effect = Callable[[Seen], object]


@attrs.frozen
class Row:
    """One parameter.

    Attributes:
        good: (value, what must then be true); a value may be a dict of several fields, this one among them.
        bad: Values that are refused, naming the parameter.
        paths: Where it is known; elsewhere it is unknown or refused.
    """

    name: str
    good: Sequence[tuple[Any, Effect]]
    bad: Sequence[Any] = ()
    paths: tuple[str, ...] = (CHAT, COMPLETIONS)


def param(name: str, value: Any) -> Effect:
    """Say that the model is given a value."""
    return lambda seen: getattr(seen.params, name) == value


def field(name: str, value: Any) -> Effect:
    """Say that the first choice has a value."""
    return lambda seen: seen.choice[name] == value


def asked(name: str, *values: Any) -> list[tuple[Any, Effect]]:
    """Return good values that are handed on as they are."""
    return [(value, param(name, value)) for value in values]


def nothing(_: Seen) -> bool:
    """Say that a value changes nothing: the request is answered."""
    return True


def hinted(name: str) -> Effect:
    """Say that a value changes nothing and a Warning names the parameter."""
    return lambda seen: f'"Ignored hints: {name}' in seen.warning


HUGE = 2**63
A, B, SPACE = TOKENIZER.encode("ab ")
USER = [{"role": "user", "content": "hi"}]
LATER = {"role": "assistant", "content": "So"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
THREE = {"max_pattern_size": 3, "min_count": 2}
ROWS = [
    Row("model", [("stub", lambda s: s.answer["model"] == "stub")], [1]),
    Row("messages", [
        (USER, lambda s: s.prompt.endswith("hi<|im_end|>\n<|im_start|>assistant\n")),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
         lambda s: "a\nb" in s.prompt),
        ([{"role": "user", "content": None}], lambda s: "user\n<|im_end|>" in s.prompt),
        ([{"role": "developer", "content": "d"}, {"role": "tool", "content": "t", "tool_call_id": "1"}],
         lambda s: "system\nd" in s.prompt and "<tool_response>\nt\n</tool_response>" in s.prompt),
    ], [[], "hi", [1], [{"role": "wizard", "content": "x"}], [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": "x", "function_call": {}}]], (CHAT,)),
    Row("prompt", [
        ("hi", lambda s: s.prompt == "hi"),
        ([A, B], lambda s: s.prompt == "ab"),
        (["hi", "ho"], lambda s: len(s.answer["choices"]) == 2),
        ([[A], [B, A]], lambda s: len(s.answer["choices"]) == 2),
    ], ["", [], [[]], [HUGE], [-1], [10**6], {"a": 1}, ["a", 1], "x" * 10_000], (COMPLETIONS,)),
    Row("max_tokens", [
        (5, lambda s: s.answer["usage"]["completion_tokens"] == 5),
        (511, lambda s: s.params.max_tokens == 512 - s.answer["usage"]["prompt_tokens"]),
        (512, lambda s: s.params.max_tokens == 512 - s.answer["usage"]["prompt_tokens"]),
    ], [0, -1, 513, 1.5, "5", True]),
    Row("max_completion_tokens", asked("max_tokens", 7), [0, -1, 513, "5"], (CHAT,)),
    Row("temperature", [
        *asked("temperature", 0, 0.01, 0.7, 2),
        (1e-6, param("temperature", 0)),
        (0.005, lambda s: s.params.temperature == 0.01 and "temperature raised to 0.01" in s.warning),
    ], [-0.1, 2.1, "1", True]),
    Row("top_p", asked("top_p", 1, 0.5), [0, 1.1, "1"]),
    Row("top_k", asked("top_k", -1, 0, 1, 10**6), [-2, 1.5, "1"]),
    Row("min_p", asked("min_p", 0, 0.5, 1), [-0.1, 1.1]),
    Row("presence_penalty", asked("presence_penalty", -2, 0.5, 2), [-2.1, 2.1]),
    Row("frequency_penalty", asked("frequency_penalty", -2, 0.5, 2), [-2.1, 2.1]),
    Row("repetition_penalty", asked("repetition_penalty", 0.1, 1, 3), [0, -1, "1"]),
    Row("n", [
        (3, lambda s: s.num_samples == 3 and [c["index"] for c in s.answer["choices"]] == [0, 1, 2]),
        ({"n": 2, "temperature": 0}, lambda s: s.num_samples == 2),
    ], [0, -1, 129, 1.5, "2"]),
    Row("best_of", [(1, nothing), ({"best_of": 2, "n": 2}, lambda s: s.num_samples == 2)], [2, 0]),
    Row("seed", asked("seed", 0, -HUGE, HUGE - 1), [HUGE, 1.5, "1"]),
    Row("stop", [("q", param("stop", ("q",))), (["a", "b", "c", "d"], param("stop", ("a", "b", "c", "d"))),
                 ([], param("stop", ()))], ["", ["a", ""], ["a"] * 5, "x" * 257, 1]),
    Row("stop_token_ids", [([A, B], param("stop_token_ids", (A, B)))], [[-1], [10**6], ["a"], [1] * 65]),
    Row("include_stop_str_in_output", asked("include_stop_str_in_output", True, False), ["yes"]),
    Row("ignore_eos", asked("ignore_eos", True), ["yes"]),
    Row("skip_special_tokens", asked("skip_special_tokens", True, False), ["yes"]),
    Row("spaces_between_special_tokens", [(True, nothing)], [False]),
    Row("min_tokens", asked("min_tokens", 0, 3), [-1, {"min_tokens": 9, "max_tokens": 8}]),
    Row("logit_bias", [({"logit_bias": {str(A): 100, "5": -100.0}}, param("logit_bias", {A: 100, 5: -100}))],
        [{"logit_bias": {"x": 1}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"99999": 1}},
         {"logit_bias": {"1": 1, "01": 2}}, {"logit_bias": {"1": 100.5}}, []]),
    Row("allowed_token_ids", [([A], param("allowed_token_ids", (A,)))], [[], [-1], [10**6], ["a"]]),
    Row("bad_words", [(["ab"], lambda s: set(s.params.bad_words_token_ids) == {(A, B), (SPACE, A, B)})],
        ["ab", [""], ["x"] * 129, ["x" * 1025]]),
    Row("logprobs", [
        (True, lambda s: s.params.logprobs == 0 and s.choice["logprobs"]["content"]),
        (False, lambda s: s.params.logprobs is None and s.choice["logprobs"] is None)], [1, "yes"], (CHAT,)),
    Row("top_logprobs", [(0, lambda s: s.choice["logprobs"] is None),
        ({"top_logprobs": 3, "logprobs": True}, lambda s: len(
        s.choice["logprobs"]["content"][0]["top_logprobs"]) == 3)],
        [1, {"top_logprobs": 21, "logprobs": True}, {"top_logprobs": -2, "logprobs": True}], (CHAT,)),
    Row("logprobs", [
        (2, lambda s: {len(top) for top in s.choice["logprobs"]["top_logprobs"]} <= {2, 3}),
        (0, lambda s: len(s.choice["logprobs"]["tokens"]) == 4)], [21, -2, True, "1"], (COMPLETIONS,)),
    Row("prompt_logprobs", [
        (1, lambda s: (s.answer if s.path == CHAT else s.choice)["prompt_logprobs"][0] is None)],
        [-2, 21, {"prompt_logprobs": 1, "stream": True}]),
    *(Row("logprob_token_ids", [
        ({"logprob_token_ids": [A, B, A], "logprobs": logprobs}, param("logprob_token_ids", (A, B)))],
        [[A], *({"logprob_token_ids": ids, "logprobs": logprobs} for ids in ([-1], [10**6], ["a"], [1] * 129))],
        (path,)) for path, logprobs in ((CHAT, True), (COMPLETIONS, 0))),
    Row("echo", [
        ({"echo": True, "messages": [*USER, LATER], "prompt": "hi"},
         lambda s: s.text.startswith("So" if s.path == CHAT else "hi"))], [1, "yes"]),
    Row("echo", [({"echo": True, "max_tokens": 0, "logprobs": 0},
                  lambda s: s.text == "hi" and s.choice["logprobs"]["token_logprobs"][0] is None)], (), (COMPLETIONS,)),
    Row("stream", [(True, lambda s: s.chunks), (False, lambda s: not s.chunks)], [1, "true"]),
    Row("stream_options", [
        ({"stream": True, "stream_options": {"include_usage": True}},
         lambda s: [bool(c.get("usage")) for c in s.chunks][-2:] == [False, True]),
        ({"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
         lambda s: all(c["usage"] for c in s.chunks)),
    ], [{"stream_options": {"include_usage": True}}, {"stream": True, "stream_options": {"include_usage": 1}},
        {"stream": True, "stream_options": {"include_obfuscation": True}}]),
    Row("stream_interval", [({"stream": True, "stream_interval": 4, "return_token_ids": True, "max_tokens": 9},
        lambda s: [len(t) for c in s.chunks for t in [c["choices"][0].get("token_ids")] if t] == [1, 4, 4])],
        [0, -1, "1", {"stream_interval": 2}]),
    Row("return_progress", [({"stream": True, "return_progress": True}, lambda s: s.chunks),
        ({"return_progress": False}, nothing)], [1, "yes", {"return_progress": True}]),
    Row("timings_per_token", [(True, lambda s: s.answer["timings"]["predicted_n"] == 4),
        ({"stream": True, "timings_per_token": True}, lambda s: all("timings" in c for c in s.chunks)),
        (False, lambda s: "timings" not in s.answer)], [1, "yes"]),
    Row("response_format", [
        ({"response_format": {"type": "text"}}, param("grammar", None)),
        ({"response_format": {"type": "json_object"}}, lambda s: s.params.grammar is not None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1]}}}},
         lambda s: s.text == "1"),
    ], ["json", {"response_format": {"type": "structural_tag"}}, {"response_format": {"type": "json_schema"}}]),
    Row("structured_outputs", [
        ({"structured_outputs": {"choice": ["yes"]}}, lambda s: s.text == "yes"),
        ({"structured_outputs": {"regex": "no{2}"}}, lambda s: s.text == "noo"),
        ({"structured_outputs": {"json": {"const": 1}}}, lambda s: s.text == "1"),
        ({"structured_outputs": {"grammar": 'root ::= "ab"'}}, lambda s: s.text == "ab"),
    ], ["x", {"structured_outputs": {}}, {"structured_outputs": {"choice": ["a"], "regex": "a"}},
        {"structured_outputs": {"regex": "["}}, {"structured_outputs": {"structural_tag": "x"}},
        {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}}]),
    # More good ones: test_tools, test_answer_forms.
    Row("tools", [([TOOL], lambda s: TOOL["function"]["name"] in s.prompt)], [[], [{"type": 1}], "f"], (CHAT,)),
    Row("tool_choice", [("none", nothing)], ["auto", "required", "sometimes"], (CHAT,)),
    Row("parallel_tool_calls", [(True, nothing), (False, nothing)], ["yes"], (CHAT,)),
    Row("reasoning_effort", [("none", nothing), ("high", hinted("reasoning_effort"))], ["extreme"], (CHAT,)),
    Row("thinking_token_budget", [], [-1, 5, "5"]),  # Good ones: test_thinking_budget.
    Row("include_reasoning", [(True, nothing), (False, nothing)], ["yes"], (CHAT,)),
    Row("add_generation_prompt", [(False, lambda s: s.prompt.endswith("hi<|im_end|>\n"))], ["yes"], (CHAT,)),
    Row("continue_final_message", [({"continue_final_message": True, "messages": [*USER, LATER]},
        lambda s: s.prompt.endswith("assistant\nSo"))],
        ["yes", {"continue_final_message": True, "add_generation_prompt": True}], (CHAT,)),
    Row("chat_template_kwargs", [({"chat_template_kwargs": {"x": 1}}, nothing)],
        [1, {"chat_template_kwargs": {"messages": []}}], (CHAT,)),
    Row("documents", [], ["x", {"documents": [{"text": "x"}]}]),  # Good ones: test_answer_options.
    Row("add_special_tokens", [(True, nothing), (False, nothing)], ["yes"]),
    Row("truncate_prompt_tokens", [(2, lambda s: s.answer["usage"]["prompt_tokens"] == 2), (-1, nothing)],
        [-2, 0, "1"]),
    Row("truncation_side", [
        ({"truncation_side": "left", "truncate_prompt_tokens": 1}, lambda s: s.prompt in {"\n", "i"}),
        ({"truncation_side": "right", "truncate_prompt_tokens": 1}, lambda s: s.prompt in {SPECIAL[1], "h"}),
    ], ["middle", 1]),
    Row("priority", [(0, nothing), (5, lambda s: "priority counts only with" in s.warning)], [HUGE, "1", 1.5]),
    Row("cache_salt", [("pepper", nothing)], ["", "a/b", "a@b", "a\\b", "a\0b", "x" * 129]),
    Row("return_token_ids", [(True, lambda s: len(s.choice["token_ids"]) == 4)], ["yes"]),
    Row("return_tokens_as_token_ids", [({"return_tokens_as_token_ids": True, "logprobs": 0},
        lambda s: s.choice["logprobs"]["tokens"][0].startswith("token_id:"))], ["yes"], (COMPLETIONS,)),
    Row("return_tokens_as_token_ids", [({"return_tokens_as_token_ids": True, "logprobs": True},
        lambda s: s.choice["logprobs"]["content"][0]["token"].startswith("token_id:"))], ["yes"], (CHAT,)),
    Row("return_prompt_text", [(True, lambda s: (s.answer if s.path == CHAT else s.choice)["prompt_text"] == s.prompt)],
        ["yes"]),
    Row("repetition_detection", [({"repetition_detection": THREE}, param("repetition_detection", RepetitionDetection(
        max_pattern_size=3, min_count=2)))],
        [1, {"repetition_detection": {"max_pattern_size": 3}}, {"repetition_detection": {**THREE, "min_count": 1}},
         {"repetition_detection": {**THREE, "max_pattern_size": 257}},
         {"repetition_detection": {**THREE, "min_pattern_size": 4}}]),
    Row("request_id", [("a-1", lambda s: s.answer["id"].endswith("cmpl-a-1"))], ["", "a b", "x" * 129, 1]),
    Row("user", [("me", nothing)], [1, "x" * 513]),
    Row("safety_identifier", [("me", nothing)], [1, "x" * 513]),
    Row("prompt_cache_key", [("me", nothing)], [1, "x" * 513]),
    Row("session_id", [("me", nothing)], [1, "x" * 513]),
    Row("metadata", [({"metadata": {"a": "b"}}, nothing)], [1, {"metadata": {"a": 1}}, {"metadata": {"a" * 65: "b"}}]),
    *(Row(name, [(neutral, nothing)] if neutral is not None else [], [meant]) for name, neutral, meant in (
        ("suffix", "", "x"), ("use_beam_search", False, True), ("length_penalty", 1.0, 0.5),
        ("functions", None, [{"name": "f"}]), ("function_call", "none", "auto"), ("guided_json", None, "{}"),
        ("guided_regex", None, "a"), ("guided_choice", None, ["a"]), ("guided_grammar", None, "x"),
        ("chat_template", None, "x"), ("modalities", ["text"], ["audio"]),
        ("audio", None, "x"), ("moderation", None, "x"), ("store", False, True),
        ("prompt_embeds", None, "x"), ("mm_processor_kwargs", {"mm_processor_kwargs": {}}, "x"),
        ("media_io_kwargs", {"media_io_kwargs": {}}, "x"), ("kv_transfer_params", None, "x"), ("vllm_xargs", None, "x"),
    )),
    *(Row(name, [(neutral, nothing), (meant, hinted(name))]) for name, neutral, meant in (
        ("prediction", None, {"type": "content", "content": "x"}), ("web_search_options", None, {}),
        ("verbosity", "medium", "low"), ("service_tier", "auto", "flex"), ("prompt_cache_options", None, {"ttl": "1h"}),
        ("prompt_cache_retention", "in_memory", "24h"),
    )),
]  # fmt: skip
