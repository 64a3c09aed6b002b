"""Every setting, once: name, type, default, limits, environment variable, flags and help (floor 0).

The command line, the environment, config.yaml, `--print-config` and the table in docs/settings.md are all made from
these classes. Precedence: defaults < config.yaml < environment < flags.
"""

from __future__ import annotations

from typing import Literal

import attrs

from trio_llm.errors import ConfigError
from trio_llm.limits import AuthConfig, LimitsConfig
from trio_llm.setting import setting


@attrs.frozen(kw_only=True)
class ServerConfig:
    """Where the HTTP server listens, what it logs, and how it shuts down."""

    host: str = setting("0.0.0.0", "Address to listen on.", env="VLLM_HOST", flags=("--host",))
    port: int = setting(
        8000,
        "Port to listen on. 0 picks a free port.",
        env="VLLM_PORT",
        flags=("--port", "-p"),
        at_least=0,
        at_most=65535,
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Least severe level logged.", env="VLLM_LOG_LEVEL", flags=("--log-level",)
    )
    log_dir: str | None = setting(None, "Directory for JSON logs, in addition to the console.", flags=("--log-dir",))
    log_stats_interval_s: float = setting(
        10.0,
        "Seconds between log lines with throughput, queue and cache figures while requests run. 0 disables them.",
        env="VLLM_LOG_STATS_INTERVAL",
        flags=("--log-stats-interval",),
        at_least=0,
    )
    served_model_name: tuple[str, ...] = setting(
        (),
        "Model names that requests may use. Default: the name of the model's directory or file.",
        flags=("--served-model-name",),
    )
    chat_template: str | None = setting(
        None, "File with a Jinja chat template. Default: the model's own.", flags=("--chat-template",)
    )
    tool_prompt: bool = setting(
        True,
        "Describe tools in a built-in prompt where the chat template knows none. If off, such requests are refused.",
        flags=("--tool-prompt",),
    )
    log_probes: bool = setting(
        False, "Log requests for /health, /ready, /ping and /metrics too.", flags=("--log-probes",)
    )
    drain_delay_s: float = setting(
        0.0,
        "Seconds for which new requests are still served after SIGTERM, while /ready answers 503. Load balancers see "
        "it meanwhile.",
        flags=("--drain-delay",),
        at_least=0,
    )
    shutdown_timeout_s: float = setting(
        30.0, "Seconds that accepted requests have to finish after SIGTERM.", flags=("--shutdown-timeout",), at_least=0
    )
    data_dir: str | None = setting(
        None,
        "Directory for uploaded files and batches. Default: trio-llm/PORT in $XDG_STATE_HOME or ~/.local/state.",
        flags=("--data-dir",),
    )
    otlp_traces_endpoint: str | None = setting(
        None,
        "OTLP/HTTP URL that receives OpenTelemetry traces, e.g. http://localhost:4318/v1/traces. Needs trio-llm[otel].",
        flags=("--otlp-traces-endpoint",),
    )
    trusted_proxies: tuple[str, ...] = setting(
        (),
        "Addresses or networks of reverse proxies whose Forwarded and X-Forwarded-For headers are trusted.",
        flags=("--trusted-proxies",),
    )
    allowed_origins: tuple[str, ...] = setting(
        (),
        "Origins of web pages that may call the API. * allows all. Empty disables CORS.",
        flags=("--allowed-origins",),
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "Host names by which clients on this machine may call without an API key, besides addresses and local names. "
        "* allows all.",
        flags=("--allowed-hosts",),
    )
    allowed_methods: tuple[str, ...] = setting(
        (), "HTTP methods that these web pages may use. Empty allows all.", flags=("--allowed-methods",)
    )
    allowed_headers: tuple[str, ...] = setting(
        (), "Request headers that these web pages may send. Empty allows all.", flags=("--allowed-headers",)
    )
    allow_credentials: bool = setting(
        False, "Let these web pages send cookies. Not valid with origin *.", flags=("--allow-credentials",)
    )
    sse_keep_alive_interval: float = setting(
        0.0,
        "Seconds of silence after which a stream sends a comment, so that proxies keep it open. 0 disables comments.",
        flags=("--sse-keep-alive-interval",),
        at_least=0,
    )
    ui: bool = setting(True, "Serve the web page at /.", env="VLLM_UI", flags=("--ui",))
    enable_shutdown: bool = setting(
        True, "Enable the /shutdown endpoint.", env="VLLM_ENABLE_SHUTDOWN", flags=("--enable-shutdown",)
    )


@attrs.frozen(kw_only=True)
class EngineConfig:
    """Model, device, batch sizes and KV cache."""

    model: str | None = setting(
        None,
        "Directory of a Hugging Face checkpoint, a GGUF file, or a hub id: owner/name, or owner/name:Q4_K_M for one of "
        "several GGUF files. Default: /models/Qwen2.5-0.5B-Instruct if it exists, else the demo model that ships with "
        "trio-llm.",
        flags=("--model", "-m"),
    )
    revision: str | None = setting(
        None,
        "Branch, tag or commit of the model's repository, if the model is a hub id. Default: its default branch.",
        flags=("--revision",),
    )
    tokenizer: str | None = setting(
        None, "Directory of the tokenizer. Default: the model's own.", flags=("--tokenizer",)
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto",
        "Data type of weights and activations. auto uses the checkpoint's; on a CPU without native kernels and "
        "bfloat16 arithmetic, float32.",
        flags=("--dtype",),
    )
    load_format: Literal["auto", "dummy"] = setting(
        "auto",
        "auto reads the checkpoint's weights. dummy creates random weights from config.json alone.",
        flags=("--load-format",),
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "Device that runs the model. auto uses a GPU if there is one.", flags=("--device",)
    )
    cpu_threads: int | None = setting(
        None,
        "Number of threads that compute on a CPU, divided among the ranks. Default: OMP_NUM_THREADS, or the physical "
        "cores that the process may use, within its control group's quota; 1 for weights below 16 MiB.",
        flags=("--cpu-threads",),
        at_least=1,
        at_most=1024,
    )
    gpu_memory_utilization: float = setting(
        0.9,
        "Fraction of the GPU's memory for weights, KV cache and workspace.",
        flags=("--gpu-memory-utilization",),
        at_least=0.01,
        at_most=1,
    )
    enforce_eager: bool = setting(
        False, "Disable CUDA graphs: launch every kernel of a decode separately.", flags=("--enforce-eager",)
    )
    max_model_len: int | None = setting(
        None,
        "Maximum length of prompt plus output, in tokens. Default: the model's maximum, limited by the KV cache.",
        flags=("--max-model-len",),
        at_least=1,
    )
    max_batch_size: int = setting(
        256,
        "Maximum number of sequences in one step.",
        flags=("--max-batch-size", "--max-num-seqs"),
        at_least=1,
        at_most=65_536,
    )
    max_num_batched_tokens: int | None = setting(
        None,
        "Maximum number of tokens in one step. Default: 512 on a CPU (more make a step longer and no token cheaper), "
        "2048 on a GPU; at least max_batch_size.",
        flags=("--max-num-batched-tokens",),
        at_least=1,
    )
    target_step_s: float | None = setting(
        None,
        "While several requests run or wait, split prompts so that a step takes about this long, in seconds. 0 means "
        "that only max_num_batched_tokens limits a step. Default: 0.15 on a CPU, 0 on a GPU.",
        flags=("--target-step-secs",),
        at_least=0,
        at_most=60,
    )
    max_waiting_batches: int = setting(
        2,
        "Maximum number of waiting requests, in multiples of max_batch_size. Further requests get a 503.",
        flags=("--max-waiting-batches",),
        at_least=0,
        at_most=1_000_000,
    )
    num_kv_blocks: int | None = setting(
        None,
        "Number of KV cache blocks. Default: 1024 on a CPU; on a GPU, as many as --gpu-memory-utilization allows.",
        env="VLLM_KV_BLOCKS",
        flags=("--kv-blocks", "--num-gpu-blocks-override"),
        at_least=2,
    )
    block_size: int = setting(
        16,
        "Tokens in one KV cache block. A power of two.",
        flags=("--block-size",),
        at_least=1,
        at_most=65_536,
        power_of_two=True,
    )
    enable_prefix_caching: bool = setting(
        True, "Share KV cache blocks between requests with the same prefix.", flags=("--enable-prefix-caching",)
    )
    prefix_hash_seed: str | None = setting(
        None,
        "Seed of the hashes of cached blocks: processes with one seed give equal blocks equal hashes. Default, like "
        "random: a new one in each process.",
        env="PYTHONHASHSEED",
        flags=("--prefix-hash-seed",),
    )
    kv_events_config: str | None = setting(
        None,
        "Publish what enters and leaves the prefix cache over ZeroMQ: JSON as for vLLM, e.g. "
        '{"enable_kv_cache_events": true}. Needs trio-llm[events]. Default: nothing is published.',
        flags=("--kv-events-config",),
    )
    long_prefill_token_threshold: int = setting(
        0,
        "Maximum number of prompt tokens of one sequence in a step. 0 means no limit.",
        flags=("--long-prefill-token-threshold",),
        at_least=0,
    )
    scheduling_policy: Literal["fcfs", "priority"] = setting(
        "fcfs", "Order in which waiting requests are scheduled.", flags=("--scheduling-policy",)
    )
    async_scheduling: bool | None = setting(
        None,
        "Plan the next step while the model runs the current one. Default: on a GPU only.",
        flags=("--async-scheduling",),
    )
    kv_quantization: bool = setting(
        False, "Store keys and values as INT8.", env="VLLM_KV_QUANTIZATION", flags=("--kv-quantization",)
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8", "fp8_e4m3"] = setting(
        "auto",
        "Type of stored keys and values. auto: --dtype, or INT8 by kv_quantization.",
        flags=("--kv-cache-dtype",),
    )
    quantization: Literal["int8", "int8-weights"] | None = setting(
        None,
        "Quantize weights on load, with one scale per output channel. With int8, kernels may round activations to 8 "
        "bits, too (on a CPU; on a GPU those of steps above 64 rows); with int8-weights they never do.",
        flags=("--quantization",),
    )
    tensor_parallel_size: int = setting(
        1,
        "Number of processes (ranks) that share every layer, on this machine. On GPUs each has one of its own.",
        env="VLLM_TENSOR_PARALLEL_SIZE",
        flags=("--tensor-parallel-size", "-t", "-tp"),
        at_least=1,
        at_most=1024,
    )
    distributed_timeout_s: float = setting(
        120.0,
        "Seconds without an answer after which a rank counts as hung. The engine then ends.",
        flags=("--distributed-timeout-seconds",),
        at_least=1,
        at_most=86_400,
    )
    spec_method: Literal["none", "ngram", "draft_model"] = setting(
        "none",
        "Speculative decoding. ngram drafts tokens by prompt look-up, draft_model with a smaller model. The "
        "output does not change.",
        flags=("--spec-method",),
    )
    spec_model: str | None = setting(
        None,
        "Draft model: a directory or hub id, with the tokenizer of --model. Default: the demo model's own draft model.",
        flags=("--spec-model",),
    )
    max_draft_tokens: int = setting(
        8,
        "Maximum number of draft tokens per sequence and step, with --spec-method.",
        env="VLLM_MAX_DRAFT_TOKENS",
        flags=("--max-draft-tokens",),
        at_least=0,
        at_most=1024,
    )
    prompt_lookup_min: int = setting(
        2, "ngram: length of the shortest n-gram to match.", flags=("--prompt-lookup-min",), at_least=1, at_most=1024
    )
    prompt_lookup_max: int = setting(
        4,
        "ngram: length of the longest n-gram to match, which is tried first.",
        flags=("--prompt-lookup-max",),
        at_least=1,
        at_most=1024,
    )
    max_logprobs: int = setting(
        20,
        "Maximum number of logprobs per token that a request may ask for. -1 allows the whole vocabulary.",
        flags=("--max-logprobs",),
        at_least=-1,
    )
    record: str | None = setting(
        None,
        "Directory for a record of every step, without text, to replay with trio-llm trace or in a notebook. Default: "
        "none is made.",
        flags=("--record",),
    )
    record_tokens: bool = setting(
        False,
        "Keep the token ids of prompts and outputs in the record too. Who reads it can read the text.",
        flags=("--record-tokens",),
    )
    record_max_bytes: int = setting(
        256 * 2**20,
        "Maximum size of all files of the record. The oldest are deleted.",
        flags=("--record-max-bytes",),
        at_least=2**14,
    )
    seed: int = setting(
        0, "Seed of the random weights of --load-format dummy.", flags=("--seed",), at_least=0, at_most=2**63 - 1
    )

    def __attrs_post_init__(self) -> None:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            allowed = f"must be at most prompt_lookup_max, which is {self.prompt_lookup_max}"
            raise ConfigError("prompt_lookup_min", self.prompt_lookup_min, "EngineConfig", allowed)

    def decided(self, *, on_gpu: bool) -> EngineConfig:
        """Return a copy in which `async_scheduling`, `max_num_batched_tokens` and `target_step_s` are decided."""
        tokens = self.max_num_batched_tokens or max(2048 if on_gpu else 512, self.max_batch_size)
        overlap = on_gpu if self.async_scheduling is None else self.async_scheduling
        target_s = (0.0 if on_gpu else 0.15) if self.target_step_s is None else self.target_step_s
        return attrs.evolve(self, async_scheduling=overlap, max_num_batched_tokens=tokens, target_step_s=target_s)

    @property
    def step_tokens(self) -> int:
        """Maximum number of tokens in one step."""
        assert self.max_num_batched_tokens is not None, "call decided() first"
        return self.max_num_batched_tokens

    @property
    def steps_in_flight(self) -> int:
        """Maximum number of planned steps that have not finished.

        With speculative decoding it is 1. A sequence whose drafts are unverified cannot be scheduled, so with 2 each
        sequence would sit out every other step.
        """
        assert self.async_scheduling is not None, "call decided() first"
        return 2 if self.async_scheduling and self.spec_method == "none" else 1

    @property
    def max_tokens_in_flight(self) -> int:
        """Maximum number of tokens of one sequence in these steps."""
        return self.steps_in_flight * min(self.long_prefill_token_threshold or self.step_tokens, self.step_tokens)


@attrs.frozen(kw_only=True)
class Config:
    """All settings, by section."""

    server: ServerConfig = attrs.field(factory=ServerConfig)
    engine: EngineConfig = attrs.field(factory=EngineConfig)
    auth: AuthConfig = attrs.field(factory=AuthConfig)
    limits: LimitsConfig = attrs.field(factory=LimitsConfig)
