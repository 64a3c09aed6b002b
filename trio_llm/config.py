"""Every setting, once: name, type, default, environment variable, flags and help (floor 0).

The command line, the environment, config.yaml, `--print-config` and the README's table are all made from
these classes. Precedence: defaults < config.yaml < environment < flags.
"""

from __future__ import annotations

from typing import Any, Literal

import attrs


def setting(default: Any, help: str, *, env: str | None = None, flags: tuple[str, ...] = ()) -> Any:
    """Declare one setting. `flags` are its spellings on the command line, the first one shown."""
    return attrs.field(default=default, metadata={"help": help, "env": env, "flags": flags})


@attrs.frozen(kw_only=True)
class ServerConfig:
    host: str = setting("0.0.0.0", "Address to listen on.", env="VLLM_HOST", flags=("--host",))
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", env="VLLM_PORT", flags=("--port", "-p"))
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Least severe level logged.", env="VLLM_LOG_LEVEL", flags=("--log-level",)
    )
    log_dir: str | None = setting(None, "Write JSON logs to this directory too.", flags=("--log-dir",))
    served_model_name: tuple[str, ...] = setting(
        (), "Names the model answers to; default: the model's directory name.", flags=("--served-model-name",)
    )
    chat_template: str | None = setting(None, "File with a Jinja chat template.", flags=("--chat-template",))
    shutdown_timeout_s: float = setting(
        30.0, "Seconds that accepted requests get to finish after SIGTERM.", flags=("--shutdown-timeout",)
    )
    max_connections: int = setting(4096, "Open connections; one more is answered 503.", flags=("--max-connections",))
    max_body_bytes: int = setting(2 * 1024 * 1024, "Largest JSON request body.", flags=("--max-body-bytes",))


@attrs.frozen(kw_only=True)
class EngineConfig:
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
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Where the model runs.", flags=("--device",))
    max_model_len: int | None = setting(
        None, "Longest prompt plus output, in tokens; default: the model's, capped to what the KV pool holds.",
        flags=("--max-model-len",),
    )
    max_batch_size: int = setting(
        256, "Sequences in one step.", flags=("--max-batch-size", "--max-num-seqs")
    )
    max_num_batched_tokens: int = setting(2048, "Tokens in one step.", flags=("--max-num-batched-tokens",))
    max_waiting_batches: int = setting(
        2, "Requests that may wait, in units of max_batch_size; one more is answered 503.",
        flags=("--max-waiting-batches",),
    )
    num_kv_blocks: int = setting(
        1024, "KV-cache blocks.", env="VLLM_KV_BLOCKS", flags=("--kv-blocks", "--num-gpu-blocks-override")
    )
    block_size: int = setting(16, "Tokens in one KV block; a power of two.", flags=("--block-size",))
    enable_prefix_caching: bool = setting(
        True, "Share KV blocks between requests that begin alike.", flags=("--enable-prefix-caching",)
    )
    long_prefill_token_threshold: int = setting(
        0, "At most so many prompt tokens of one sequence in a step; 0 for no limit.",
        flags=("--long-prefill-token-threshold",),
    )
    scheduling_policy: Literal["fcfs", "priority"] = setting(
        "fcfs", "Order of waiting requests.", flags=("--scheduling-policy",)
    )
    kv_quantization: bool = setting(
        False, "Store keys and values as INT8.", env="VLLM_KV_QUANTIZATION", flags=("--kv-quantization",)
    )
    quantization: Literal["int8"] | None = setting(
        None, "Quantize weights on load: int8 per output channel.", flags=("--quantization",)
    )
    tensor_parallel_size: int = setting(
        1, "Devices that share every layer.", env="VLLM_TENSOR_PARALLEL_SIZE", flags=("--tensor-parallel-size", "-t", "-tp")
    )
    max_draft_tokens: int = setting(
        8, "Tokens drafted per step when speculating; inert without a speculative method.",
        env="VLLM_MAX_DRAFT_TOKENS", flags=("--max-draft-tokens",),
    )
    max_logprobs: int = setting(20, "Most logprobs one request may ask for.", flags=("--max-logprobs",))
    seed: int = setting(0, "Seed of dummy weights.", flags=("--seed",))


@attrs.frozen(kw_only=True)
class AuthConfig:
    api_keys: tuple[str, ...] = setting((), "Keys that open the API; none leaves it open.", env="VLLM_API_KEY", flags=("--api-key",))
    api_key_file: str | None = setting(None, "File with one API key a line.", flags=("--api-key-file",))
    rate_limit_requests: int = setting(
        100, "Requests a key, or without keys a remote peer, may make in a window; 0 for no limit.", flags=("--rate-limit-requests",)
    )
    rate_limit_window_secs: float = setting(60.0, "Length of that window.", flags=("--rate-limit-window-secs",))


@attrs.frozen(kw_only=True)
class Config:
    server: ServerConfig = attrs.field(factory=ServerConfig)
    engine: EngineConfig = attrs.field(factory=EngineConfig)
    auth: AuthConfig = attrs.field(factory=AuthConfig)
