"""Every setting, once: name, type, default, limits, environment variable, flags and help (floor 0).

The command line, the environment, config.yaml, `--print-config` and the README's table are all made from
these classes. Precedence: defaults < config.yaml < environment < flags.
"""

from __future__ import annotations

from typing import Literal

import attrs

from trio_llm.errors import ConfigError
from trio_llm.setting import setting


@attrs.frozen(kw_only=True)
class ServerConfig:
    """How the HTTP server listens, logs and stops."""

    host: str = setting("0.0.0.0", "Address to listen on.", env="VLLM_HOST", flags=("--host",))
    port: int = setting(
        8000,
        "Port to listen on; 0 takes a free one.",
        env="VLLM_PORT",
        flags=("--port", "-p"),
        at_least=0,
        at_most=65535,
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Least severe level logged.", env="VLLM_LOG_LEVEL", flags=("--log-level",)
    )
    log_dir: str | None = setting(None, "Write JSON logs to this directory too.", flags=("--log-dir",))
    log_stats_interval_s: float = setting(
        10.0,
        "Seconds between two lines of the log that tell throughput, queue and cache while there is work; 0 for none.",
        env="VLLM_LOG_STATS_INTERVAL",
        flags=("--log-stats-interval",),
        at_least=0,
    )
    served_model_name: tuple[str, ...] = setting(
        (), "Names the model answers to; default: the model's directory name.", flags=("--served-model-name",)
    )
    chat_template: str | None = setting(
        None, "File with a Jinja chat template; default: the model's.", flags=("--chat-template",)
    )
    shutdown_timeout_s: float = setting(
        30.0, "Seconds that accepted requests get to finish after SIGTERM.", flags=("--shutdown-timeout",), at_least=0
    )
    data_dir: str | None = setting(
        None,
        "Directory for uploaded files and batches; default: trio-llm in $XDG_STATE_HOME or ~/.local/state.",
        flags=("--data-dir",),
    )
    otlp_traces_endpoint: str | None = setting(
        None,
        "Send OpenTelemetry traces to this OTLP/HTTP URL, e.g. http://localhost:4318/v1/traces; needs trio-llm[otel].",
        flags=("--otlp-traces-endpoint",),
    )
    trusted_proxies: tuple[str, ...] = setting(
        (),
        "Addresses or networks of reverse proxies whose Forwarded and X-Forwarded-For headers are believed.",
        flags=("--trusted-proxies",),
    )
    allowed_origins: tuple[str, ...] = setting(
        (),
        "Origins of web pages that may use the API, * for all; none switches CORS off.",
        flags=("--allowed-origins",),
    )
    allowed_methods: tuple[str, ...] = setting(
        (), "Methods that such pages may use; none stands for all.", flags=("--allowed-methods",)
    )
    allowed_headers: tuple[str, ...] = setting(
        (), "Headers that such pages may send; none stands for all.", flags=("--allowed-headers",)
    )
    allow_credentials: bool = setting(
        False, "Let such pages send cookies; not with origin *.", flags=("--allow-credentials",)
    )
    sse_keep_alive_interval: float = setting(
        0.0,
        "Seconds of silence after which a stream sends a comment, lest a proxy cut it; 0 for never.",
        flags=("--sse-keep-alive-interval",),
        at_least=0,
    )
    enable_shutdown: bool = setting(
        True, "Answer GET /shutdown.", env="VLLM_ENABLE_SHUTDOWN", flags=("--enable-shutdown",)
    )


@attrs.frozen(kw_only=True)
class EngineConfig:
    """Which model runs, and how much of it at once."""

    model: str | None = setting(
        None,
        "Directory of a Hugging Face checkpoint, or a hub id; default: /models/Qwen2.5-0.5B-Instruct where it "
        "exists, else the demo model that ships with trio-llm.",
        flags=("--model", "-m"),
    )
    tokenizer: str | None = setting(None, "Directory of the tokenizer; default: the model's.", flags=("--tokenizer",))
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Type of weights and activations; auto is the checkpoint's.", flags=("--dtype",)
    )
    load_format: Literal["auto", "dummy"] = setting(
        "auto", "dummy makes random weights from config.json alone.", flags=("--load-format",)
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Where the model runs; auto takes a GPU where there is one.", flags=("--device",)
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "Part of a GPU's memory that weights, KV cache and workspace may take.",
        flags=("--gpu-memory-utilization",),
        at_least=0.01,
        at_most=1,
    )
    enforce_eager: bool = setting(
        False, "On a GPU, launch every kernel of a decode by itself, without CUDA graphs.", flags=("--enforce-eager",)
    )
    max_model_len: int | None = setting(
        None,
        "Longest prompt plus output, in tokens; default: the model's, capped to what the KV pool holds.",
        flags=("--max-model-len",),
        at_least=1,
    )
    max_batch_size: int = setting(
        256, "Sequences in one step.", flags=("--max-batch-size", "--max-num-seqs"), at_least=1
    )
    max_num_batched_tokens: int = setting(2048, "Tokens in one step.", flags=("--max-num-batched-tokens",), at_least=1)
    max_waiting_batches: int = setting(
        2,
        "Requests that may wait, in units of max_batch_size; one more is answered 503.",
        flags=("--max-waiting-batches",),
        at_least=0,
    )
    num_kv_blocks: int | None = setting(
        None,
        "KV-cache blocks; default: 1024, on a GPU as many as --gpu-memory-utilization leaves room for.",
        env="VLLM_KV_BLOCKS",
        flags=("--kv-blocks", "--num-gpu-blocks-override"),
        at_least=2,
    )
    block_size: int = setting(
        16, "Tokens in one KV block; a power of two.", flags=("--block-size",), at_least=1, power_of_two=True
    )
    enable_prefix_caching: bool = setting(
        True, "Share KV blocks between requests that begin alike.", flags=("--enable-prefix-caching",)
    )
    long_prefill_token_threshold: int = setting(
        0,
        "At most so many prompt tokens of one sequence in a step; 0 for no limit.",
        flags=("--long-prefill-token-threshold",),
        at_least=0,
    )
    scheduling_policy: Literal["fcfs", "priority"] = setting(
        "fcfs", "Order of waiting requests.", flags=("--scheduling-policy",)
    )
    async_scheduling: bool | None = setting(
        None, "Plan the next step while the model runs one; default: on a GPU.", flags=("--async-scheduling",)
    )
    kv_quantization: bool = setting(
        False, "Store keys and values as INT8.", env="VLLM_KV_QUANTIZATION", flags=("--kv-quantization",)
    )
    quantization: Literal["int8"] | None = setting(
        None, "Quantize weights on load: int8 per output channel.", flags=("--quantization",)
    )
    tensor_parallel_size: int = setting(
        1,
        "Devices that share every layer.",
        env="VLLM_TENSOR_PARALLEL_SIZE",
        flags=("--tensor-parallel-size", "-t", "-tp"),
        at_least=1,
    )
    spec_method: Literal["none", "ngram", "draft_model"] = setting(
        "none",
        "Guess tokens and verify them all in one step: ngram looks them up in the text, draft_model asks a smaller "
        "model. The output stays what it is without.",
        flags=("--spec-method",),
    )
    spec_model: str | None = setting(
        None,
        "Draft model: a directory or hub id like --model's, with its tokenizer; default: the demo model's own.",
        flags=("--spec-model",),
    )
    max_draft_tokens: int = setting(
        8,
        "Tokens guessed at a time for one sequence, where there is a --spec-method.",
        env="VLLM_MAX_DRAFT_TOKENS",
        flags=("--max-draft-tokens",),
        at_least=0,
    )
    prompt_lookup_min: int = setting(
        2, "ngram: the fewest tokens that must have stood there before.", flags=("--prompt-lookup-min",), at_least=1
    )
    prompt_lookup_max: int = setting(
        4, "ngram: the most tokens looked up, tried first.", flags=("--prompt-lookup-max",), at_least=1
    )
    max_logprobs: int = setting(
        20,
        "Most logprobs one request may ask for; -1 for the whole vocabulary.",
        flags=("--max-logprobs",),
        at_least=-1,
    )
    seed: int = setting(0, "Seed of dummy weights.", flags=("--seed",), at_least=0)

    def __attrs_post_init__(self) -> None:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            allowed = f"must be at most prompt_lookup_max, which is {self.prompt_lookup_max}"
            raise ConfigError("prompt_lookup_min", self.prompt_lookup_min, "EngineConfig", allowed)

    def decided(self, *, on_gpu: bool) -> EngineConfig:
        """Return the same with `async_scheduling` decided."""
        return self if self.async_scheduling is not None else attrs.evolve(self, async_scheduling=on_gpu)

    @property
    def steps_in_flight(self) -> int:
        """Steps that are planned and not yet done.

        Only one where tokens are guessed: a sequence that knows not where it goes on has no row in the step planned
        meanwhile, so two half batches would take turns.
        """
        assert self.async_scheduling is not None, "nobody has decided"
        return 2 if self.async_scheduling and self.spec_method == "none" else 1

    @property
    def max_tokens_in_flight(self) -> int:
        """Tokens of one sequence in these steps."""
        chunk = min(self.long_prefill_token_threshold or self.max_num_batched_tokens, self.max_num_batched_tokens)
        return self.steps_in_flight * chunk


@attrs.frozen(kw_only=True)
class AuthConfig:
    """Who may ask, and how often."""

    api_keys: tuple[str, ...] = setting(
        (), "Keys that open the API; none leaves it open.", env="VLLM_API_KEY", flags=("--api-key",), secret=True
    )
    api_key_file: str | None = setting(None, "File with one API key a line.", flags=("--api-key-file",))
    admin_api_keys: tuple[str, ...] = setting(
        (),
        "Keys without which nobody may shut the server down; they open the API too.",
        env="VLLM_ADMIN_API_KEY",
        flags=("--admin-api-key",),
        secret=True,
    )
    public_metrics: bool = setting(
        False, "Show /metrics to everybody, also where there are API keys.", flags=("--public-metrics",)
    )
    require_auth: bool = setting(
        False, "Refuse to start without an API key.", env="VLLM_REQUIRE_AUTH", flags=("--require-auth",)
    )
    rate_limit_requests: int = setting(
        100,
        "Requests a key, or without keys a remote peer, may make in a window; 0 for no limit.",
        flags=("--rate-limit-requests",),
        at_least=0,
    )
    rate_limit_tokens: int = setting(
        0,
        "Tokens of prompts and answers that a key or peer may use in a window; 0 for no limit.",
        flags=("--rate-limit-tokens",),
        at_least=0,
    )
    rate_limit_window_secs: float = setting(
        60.0, "Length of that window.", flags=("--rate-limit-window-secs",), at_least=0.001
    )


@attrs.frozen(kw_only=True)
class LimitsConfig:
    """How much one client, connection or request may take. Whoever exceeds one is told the number and the flag."""

    strict: bool = setting(
        False,
        "Refuse fields that nobody here knows; by default they are ignored and named in a Warning header.",
        flags=("--strict",),
    )
    max_body_bytes: int = setting(
        2 * 1024 * 1024,
        "Bytes of a JSON request body.",
        env="VLLM_HTTP_MAX_REQUEST_BODY_SIZE",
        flags=("--max-body-bytes",),
        at_least=1,
    )
    max_file_bytes: int = setting(
        100 * 1024 * 1024, "Bytes of an uploaded file.", flags=("--max-file-bytes",), at_least=1
    )
    max_json_depth: int = setting(
        32, "Levels of arrays and objects in a body.", flags=("--max-json-depth",), at_least=1, at_most=256
    )
    max_json_nodes: int = setting(20_000, "Arrays and objects in a body.", flags=("--max-json-nodes",), at_least=1)
    max_json_digits: int = setting(
        20, "Digits of a whole number in a body.", flags=("--max-json-digits",), at_least=1, at_most=4300
    )
    max_messages: int = setting(2048, "Messages of a conversation.", flags=("--max-messages",), at_least=1)
    max_prompts: int = setting(
        1024,
        "Prompts of a completion request.",
        env="VLLM_MAX_COMPLETION_PROMPTS",
        flags=("--max-prompts",),
        at_least=1,
    )
    max_inputs: int = setting(2048, "Inputs of an embedding request.", flags=("--max-inputs",), at_least=1)
    max_n: int = setting(128, "Samples of one prompt.", env="VLLM_MAX_N_SEQUENCES", flags=("--max-n",), at_least=1)
    max_samples: int = setting(
        1024,
        "Samples of all prompts of a request, and never more than the engine has places.",
        flags=("--max-samples",),
        at_least=1,
    )
    max_queued_tokens: int = setting(
        4 * 1024 * 1024,
        "Prompt tokens of all requests that wait and run; a request beyond them is answered 503. 0 for no limit.",
        flags=("--max-queued-tokens", "--max-num-queued-tokens"),
        at_least=0,
    )
    max_stop_strings: int = setting(
        4, "Stop strings of a request.", env="VLLM_MAX_STOP_STRINGS", flags=("--max-stop-strings",), at_least=0
    )
    max_stop_bytes: int = setting(256, "Bytes of a stop string.", flags=("--max-stop-bytes",), at_least=1)
    max_stop_token_ids: int = setting(64, "Stop token ids of a request.", flags=("--max-stop-token-ids",), at_least=0)
    max_logit_bias: int = setting(1024, "Entries of logit_bias.", flags=("--max-logit-bias",), at_least=0)
    max_metadata_pairs: int = setting(16, "Pairs of metadata.", flags=("--max-metadata-pairs",), at_least=0)
    max_metadata_key_chars: int = setting(
        64, "Characters of a key of metadata.", flags=("--max-metadata-key-chars",), at_least=1
    )
    max_metadata_value_chars: int = setting(
        512, "Characters of a value of metadata.", flags=("--max-metadata-value-chars",), at_least=1
    )
    max_header_bytes: int = setting(
        16 * 1024, "Bytes of a request's target and headers.", flags=("--max-header-bytes",), at_least=256
    )
    max_headers: int = setting(100, "Headers of a request.", flags=("--max-headers",), at_least=1)
    max_connections: int = setting(
        4096, "Open connections; one more is answered 503.", flags=("--max-connections",), at_least=1
    )
    max_connections_per_peer: int = setting(
        1024,
        "Open connections of one remote address, an IPv6 one by its /64; one more is answered 503. 0 for no limit.",
        flags=("--max-connections-per-peer",),
        at_least=0,
    )
    header_timeout_s: float = setting(
        5.0, "Seconds for a request's headers to arrive.", flags=("--header-timeout",), at_least=0.001
    )
    body_timeout_s: float = setting(
        20.0,
        "Seconds for a JSON body to arrive, and for each next part of an upload.",
        flags=("--body-timeout",),
        at_least=0.001,
    )
    keep_alive_timeout_s: float = setting(
        5.0,
        "Seconds that a connection may wait for its next request.",
        env="VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
        flags=("--keep-alive-timeout",),
        at_least=0.001,
    )
    write_timeout_s: float = setting(
        30.0,
        "Seconds that a client may read nothing while there is something to read.",
        flags=("--write-timeout",),
        at_least=0.001,
    )
    request_timeout_s: float = setting(
        600.0,
        "Seconds that a request may take, queue and streaming included; 0 for no limit.",
        flags=("--request-timeout",),
        at_least=0,
    )
    template_timeout_s: float = setting(
        5.0,
        "Seconds for rendering a chat template.",
        env="VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT",
        flags=("--template-timeout",),
        at_least=0.001,
    )
    grammar_timeout_s: float = setting(
        5.0,
        "Seconds for compiling a schema, regular expression or grammar.",
        env="VLLM_REGEX_COMPILATION_TIMEOUT_S",
        flags=("--grammar-timeout",),
        at_least=0.001,
    )
    max_template_chars: int = setting(
        4 * 1024 * 1024, "Characters that a chat template may render.", flags=("--max-template-chars",), at_least=1
    )


@attrs.frozen(kw_only=True)
class Config:
    """Everything that can be set, by section."""

    server: ServerConfig = attrs.field(factory=ServerConfig)
    engine: EngineConfig = attrs.field(factory=EngineConfig)
    auth: AuthConfig = attrs.field(factory=AuthConfig)
    limits: LimitsConfig = attrs.field(factory=LimitsConfig)
