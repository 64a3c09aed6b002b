"""The settings of the sections `auth` and `limits`: who may use the server, and how much of it (floor 0)."""

from __future__ import annotations

import attrs

from trio_llm.setting import setting


@attrs.frozen(kw_only=True)
class AuthConfig:
    """API keys and rate limits."""

    api_keys: tuple[str, ...] = setting(
        (), "Accepted API keys. Empty disables authentication.", env="VLLM_API_KEY", flags=("--api-key",), secret=True
    )
    api_key_file: str | None = setting(None, "File with one accepted API key per line.", flags=("--api-key-file",))
    admin_api_keys: tuple[str, ...] = setting(
        (),
        "API keys that may call /shutdown. If any is set, only these may. They are accepted everywhere else too.",
        env="VLLM_ADMIN_API_KEY",
        flags=("--admin-api-key",),
        secret=True,
    )
    public_metrics: bool = setting(False, "Serve /metrics without an API key.", flags=("--public-metrics",))
    require_auth: bool = setting(
        False, "Refuse to start without an API key.", env="VLLM_REQUIRE_AUTH", flags=("--require-auth",)
    )
    rate_limit_requests: int = setting(
        100,
        "Maximum number of requests per window for each API key or, without keys, for each client address other than "
        "this machine's. 0 means no limit.",
        flags=("--rate-limit-requests",),
        at_least=0,
    )
    rate_limit_tokens: int = setting(
        0,
        "Maximum number of prompt and output tokens per window for each API key or, without keys, for each client "
        "address other than this machine's. 0 means no limit.",
        flags=("--rate-limit-tokens",),
        at_least=0,
    )
    rate_limit_window_secs: float = setting(
        60.0, "Length of the rate limit window, in seconds.", flags=("--rate-limit-window-secs",), at_least=0.001
    )


@attrs.frozen(kw_only=True)
class LimitsConfig:
    """Limits per client, connection and request. The error for exceeding one names its value and its flag."""

    strict: bool = setting(
        False,
        "Refuse unknown request fields and a missing model. By default such fields are ignored, with a Warning header.",
        flags=("--strict",),
    )
    max_body_bytes: int = setting(
        2 * 1024 * 1024,
        "Maximum size of a JSON request body, in bytes.",
        env="VLLM_HTTP_MAX_REQUEST_BODY_SIZE",
        flags=("--max-body-bytes",),
        at_least=1,
    )
    max_file_bytes: int = setting(
        100 * 1024 * 1024, "Maximum size of an uploaded file, in bytes.", flags=("--max-file-bytes",), at_least=1
    )
    max_stored_bytes: int = setting(
        20 * 1024**3,
        "Maximum size of all stored files together, in bytes. 0 means no limit.",
        flags=("--max-stored-bytes",),
        at_least=0,
    )
    max_stored_bytes_per_key: int = setting(
        10 * 1024**3,
        "Maximum size of the stored files of one API key, or of all clients without keys, in bytes. 0 means no limit.",
        flags=("--max-stored-bytes-per-key",),
        at_least=0,
    )
    max_json_depth: int = setting(
        32,
        "Maximum nesting depth of arrays and objects in a body.",
        flags=("--max-json-depth",),
        at_least=1,
        at_most=256,
    )
    max_json_nodes: int = setting(
        20_000, "Maximum number of arrays and objects in a body.", flags=("--max-json-nodes",), at_least=1
    )
    max_json_keys: int = setting(
        50_000, "Maximum number of keys in a body, over all objects.", flags=("--max-json-keys",), at_least=1
    )
    max_json_digits: int = setting(
        20, "Maximum number of digits of an integer in a body.", flags=("--max-json-digits",), at_least=1, at_most=4300
    )
    max_messages: int = setting(
        2048, "Maximum number of messages in a conversation.", flags=("--max-messages",), at_least=1
    )
    max_prompts: int = setting(
        1024,
        "Maximum number of prompts in a completion request.",
        env="VLLM_MAX_COMPLETION_PROMPTS",
        flags=("--max-prompts",),
        at_least=1,
    )
    max_inputs: int = setting(
        2048, "Maximum number of inputs in an embedding request.", flags=("--max-inputs",), at_least=1
    )
    max_n: int = setting(
        128, "Maximum number of samples of one prompt (n).", env="VLLM_MAX_N_SEQUENCES", flags=("--max-n",), at_least=1
    )
    max_samples: int = setting(
        1024,
        "Maximum number of samples over all prompts of a request. The engine's own capacity is a further limit.",
        flags=("--max-samples",),
        at_least=1,
    )
    max_caller_share: float = setting(
        0.5,
        "Part of the engine's places that one API key, remote peer or request may hold. More than that gets a 429 or "
        "400.",
        flags=("--max-caller-share",),
        at_least=0.001,
        at_most=1,
    )
    max_queued_tokens: int = setting(
        4 * 1024 * 1024,
        "Maximum number of prompt tokens over all waiting and running requests. Further requests get a 503. "
        "0 means no limit.",
        flags=("--max-queued-tokens", "--max-num-queued-tokens"),
        at_least=0,
    )
    max_stop_strings: int = setting(
        4,
        "Maximum number of stop strings in a request.",
        env="VLLM_MAX_STOP_STRINGS",
        flags=("--max-stop-strings",),
        at_least=0,
    )
    max_stop_bytes: int = setting(
        256, "Maximum size of a stop string, in bytes.", flags=("--max-stop-bytes",), at_least=1
    )
    max_stop_token_ids: int = setting(
        64, "Maximum number of stop token ids in a request.", flags=("--max-stop-token-ids",), at_least=0
    )
    max_logit_bias: int = setting(
        1024, "Maximum number of entries in logit_bias.", flags=("--max-logit-bias",), at_least=0
    )
    max_metadata_pairs: int = setting(
        16, "Maximum number of key-value pairs in metadata.", flags=("--max-metadata-pairs",), at_least=0
    )
    max_metadata_key_chars: int = setting(
        64, "Maximum length of a metadata key, in characters.", flags=("--max-metadata-key-chars",), at_least=1
    )
    max_metadata_value_chars: int = setting(
        512, "Maximum length of a metadata value, in characters.", flags=("--max-metadata-value-chars",), at_least=1
    )
    max_header_bytes: int = setting(
        16 * 1024,
        "Maximum size of a request's target and headers, in bytes.",
        flags=("--max-header-bytes",),
        at_least=256,
    )
    max_headers: int = setting(100, "Maximum number of headers in a request.", flags=("--max-headers",), at_least=1)
    max_connections: int = setting(
        4096,
        "Maximum number of open connections. Further connections get a 503.",
        flags=("--max-connections",),
        at_least=1,
    )
    max_connections_per_peer: int = setting(
        1024,
        "Maximum number of open connections per client address, or per /64 network of IPv6. Further "
        "connections get a 503. 0 means no limit.",
        flags=("--max-connections-per-peer",),
        at_least=0,
    )
    header_timeout_s: float = setting(
        5.0, "Seconds for a request's headers to arrive.", flags=("--header-timeout",), at_least=0.001
    )
    body_timeout_s: float = setting(
        20.0,
        "Seconds for a JSON body to arrive, and for each part of an upload.",
        flags=("--body-timeout",),
        at_least=0.001,
    )
    keep_alive_timeout_s: float = setting(
        5.0,
        "Seconds that an idle connection stays open.",
        env="VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
        flags=("--keep-alive-timeout",),
        at_least=0.001,
    )
    write_timeout_s: float = setting(
        30.0,
        "Seconds that a client may read nothing before its connection is dropped.",
        flags=("--write-timeout",),
        at_least=0.001,
    )
    request_timeout_s: float = setting(
        600.0,
        "Maximum duration of a request in seconds, including queueing and streaming. 0 means no limit.",
        flags=("--request-timeout",),
        at_least=0,
    )
    template_timeout_s: float = setting(
        5.0,
        "Maximum CPU time for rendering a chat template, in seconds.",
        env="VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT",
        flags=("--template-timeout",),
        at_least=0.001,
    )
    grammar_timeout_s: float = setting(
        5.0,
        "Maximum time for compiling a schema, regular expression or grammar, in seconds.",
        env="VLLM_REGEX_COMPILATION_TIMEOUT_S",
        flags=("--grammar-timeout",),
        at_least=0.001,
    )
    max_template_chars: int = setting(
        4 * 1024 * 1024,
        "Maximum length of a rendered chat template, in characters.",
        flags=("--max-template-chars",),
        at_least=1,
    )
