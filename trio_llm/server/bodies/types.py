"""The bodies of requests: names and types. Values that depend on the model are checked where they are used."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta, Struct

from trio_llm.server.bodies.tools import MAX_TOOLS, RUNNABLE_TOOLS, NamedToolChoice, ToolCall, ToolDefinition
from trio_llm.server.bodies.unknown_fields import Neutral

Metadata = dict[str, str]
CallersName = Annotated[str, Meta(max_length=512)]
RequestId = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^@/\\\x00-\x1f\x7f-\uffff]+$")]


class StreamOptions(Struct, kw_only=True):
    """What else a stream reports.

    Attributes:
        include_usage: Send a last chunk that has the usage and no choices.
        continuous_usage_stats: With `include_usage`, also send the usage so far in every chunk.
    """

    not_supported: ClassVar[Neutral] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Struct, kw_only=True, rename={"schema_": "schema"}):
    """The `json_schema` of a response_format.

    Attributes:
        name: Name of the form; without effect.
        schema: JSON schema that the answer follows.
        strict: Without effect: the schema always binds.
        description: Without effect.
    """

    name: str
    schema_: dict[str, Any] | bool | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct, kw_only=True):
    """OpenAI's response_format.

    Attributes:
        type: "text" for free text, "json_object" for any JSON object, "json_schema" for a schema.
        json_schema: The schema, for type "json_schema".
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Struct, kw_only=True):
    """vLLM's structured_outputs: exactly one form, and how to write JSON.

    Attributes:
        json: JSON schema, as an object or as text.
        regex: Regular expression that the whole answer matches.
        choice: The answer is one of these texts.
        grammar: Grammar in Lark or GBNF form.
        json_object: true for any JSON object.
        disable_any_whitespace: Write JSON without white space between tokens.
    """

    not_supported: ClassVar[Neutral] = {
        "structural_tag": (),
        "whitespace_pattern": (),
        "disable_additional_properties": (False,),
        "disable_fallback": (False, True),  # There is one backend: it falls back to none.
    }

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False


class RepetitionDetection(Struct, kw_only=True):
    """vLLM's repetition_detection: end an answer whose last tokens are a pattern that came `min_count` times.

    Attributes:
        max_pattern_size: Longest pattern that counts, in tokens.
        min_count: Repetitions of a pattern that end the answer.
        min_pattern_size: Shortest pattern that counts, in tokens; 1 by default.
    """

    max_pattern_size: Annotated[int, Meta(ge=1, le=256)]
    min_count: Annotated[int, Meta(ge=2, le=2**31)]
    min_pattern_size: Annotated[int, Meta(ge=0, le=256)] | None = None


class GenerationBody(Struct, kw_only=True):
    """What chat and completions have in common. null is the same as absent, everywhere.

    Attributes:
        model: Served name of the model; needed with `--strict` only.
        temperature: Randomness of sampling; 0 takes the likeliest token. The default is the model's, else 1.
        top_p: Sample from the likeliest tokens whose probabilities add up to this.
        top_k: Sample from this many likeliest tokens; 0 or -1 for all.
        min_p: Leave out tokens less likely than this share of the likeliest one.
        presence_penalty: Lower the logit of every token that the answer already has.
        frequency_penalty: Lower the logit of a token for each time that the answer has it.
        repetition_penalty: Divide the logits of tokens that prompt or answer already have; 1 for no effect.
        logit_bias: Token id -> number that is added to its logit.
        allowed_token_ids: Sample from these tokens only.
        bad_words: Texts whose tokens the answer never has, with or without a space before them.
        seed: Makes sampling repeatable.
        n: Samples of each prompt.
        best_of: Must equal `n`.
        max_tokens: Longest answer, in tokens.
        min_tokens: Shortest answer, in tokens: no end before.
        stop: Texts that end the answer; they are left out of it.
        stop_token_ids: Tokens that end the answer.
        logprob_token_ids: Tokens whose log-probabilities are reported at each position.
        include_stop_str_in_output: Leave the stop text in the answer.
        ignore_eos: Go on after the end token.
        skip_special_tokens: Leave control tokens out of the text; true by default.
        prompt_logprobs: Report this many log-probabilities at each position of the prompt.
        repetition_detection: End an answer that repeats itself.
        echo: Begin the answer with the prompt, or with the last message of a chat.
        stream: Send the answer as server-sent events while it is generated.
        stream_options: What else a stream reports.
        stream_interval: Least number of tokens in a chunk, after the first.
        response_format: Form of the answer, as OpenAI has it.
        structured_outputs: Form of the answer, as vLLM has it.
        truncate_prompt_tokens: Cut the prompt to this many tokens; -1 for as many as fit.
        truncation_side: Which end of the prompt is cut; "left" by default.
        add_special_tokens: Put the tokenizer's control tokens round the prompt. By default for completions only.
        priority: Lower is served first, with `--scheduling-policy priority`.
        cache_salt: Requests with different salts share no cached prompts.
        return_token_ids: Report the tokens of prompt and answer.
        return_tokens_as_token_ids: Name tokens in log-probabilities "token_id:N".
        return_prompt_text: Report the prompt as the model sees it.
        return_progress: In a stream, report how much of the prompt is done.
        timings_per_token: Report tokens and times, in a stream with every chunk.
        request_id: Becomes the id of the answer.
        user: Name of the caller's own; without effect.
        safety_identifier: Name of the caller's own; without effect.
        prompt_cache_key: Name of the caller's own; without effect: every prompt is cached.
        session_id: Name of the caller's own; without effect.
        metadata: The caller's own pairs of names and values; without effect.
    """

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    allowed_token_ids: Annotated[list[int], Meta(min_length=1)] | None = None
    bad_words: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=128)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    best_of: int | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    logprob_token_ids: Annotated[list[int], Meta(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    repetition_detection: RepetitionDetection | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Meta(ge=1)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    cache_salt: CacheSalt | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_prompt_text: bool | None = None
    return_progress: bool | None = None
    timings_per_token: bool | None = None
    request_id: RequestId | None = None
    # Names of the caller's own; they change nothing and are stored nowhere.
    user: CallersName | None = None
    safety_identifier: CallersName | None = None
    prompt_cache_key: CallersName | None = None
    session_id: CallersName | None = None
    metadata: Metadata | None = None


class CompletionBody(GenerationBody, kw_only=True):
    """POST /v1/completions.

    Attributes:
        prompt: A text, a list of texts, a list of token ids, or a list of such lists.
        logprobs: Report this many log-probabilities per token.
    """

    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=-1)] | None = None


class ContentPart(Struct, kw_only=True):
    """A piece of a message; text is the only kind. Where a prompt's cache may end is a hint: all of it is cached.

    Attributes:
        type: Only "text" is supported.
        text: The text.
        prompt_cache_breakpoint: Without effect: every prompt is cached.
    """

    text_types: ClassVar[frozenset[str]] = frozenset({"text"})

    type: str
    text: str | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class Message(Struct, kw_only=True, omit_defaults=True):
    """One turn of a conversation.

    Attributes:
        role: Who speaks; "developer" is the same as "system".
        content: What is said.
        refusal: What an assistant said instead of an answer.
        name: Name of the speaker or of the tool; for templates that show it.
        reasoning_content: What the assistant thought.
        reasoning: The same under another name.
        tool_call_id: Of a tool's message, the call that it answers.
        tool_calls: Calls that the assistant made.
    """

    not_supported: ClassVar[Neutral] = {"audio": (), "function_call": (), "annotations": ([],)}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    refusal: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None


class ChatBody(GenerationBody, kw_only=True):
    """POST /v1/chat/completions.

    Attributes:
        messages: The conversation.
        max_completion_tokens: Longest answer, in tokens; by default what is left of the context.
        logprobs: Report the log-probability of every token.
        top_logprobs: With `logprobs`, also report this many of the likeliest tokens.
        add_generation_prompt: End the prompt with the beginning of the assistant's turn; true by default.
        continue_final_message: The last message is the beginning of the answer.
        chat_template_kwargs: Further variables of the chat template.
        tools: Functions that the model may call, and custom tools, which take a text.
        tool_choice: "none", "auto", "required", the tool that must be called, or the only ones that may be.
        parallel_tool_calls: Whether there may be more than one call; true by default.
        reasoning_effort: How much the model thinks, for templates that have a switch for it.
        include_reasoning: Report what the model thinks; true by default.
        thinking_token_budget: Longest thinking, in tokens.
        documents: Documents that the chat template shows to the model.
    """

    runnable_tools: ClassVar[frozenset[str]] = RUNNABLE_TOOLS

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=-1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[ToolDefinition], Meta(min_length=1, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: Annotated[int, Meta(ge=0)] | None = None
    documents: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
