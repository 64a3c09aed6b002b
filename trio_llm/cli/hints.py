"""What to do instead of flags of vLLM, and commands of Ollama and vLLM, that do not exist here."""

_PROXY = "Terminate TLS in a reverse proxy; trio-llm speaks plain HTTP/1.1."
_ONE_DEVICE = "Not built: the model runs on one device."
_PARSED = "Tool calls and reasoning are always parsed, in the form that the chat template shows."

HINTS = {
    "--kv-cache-memory-bytes": "The KV pool is counted in blocks: --kv-blocks, or on a GPU --gpu-memory-utilization.",
    "--cpu-offload-gb": "Not built: weights stay on the device.",
    "--swap-space": "Nothing is swapped: a preempted sequence is computed again.",
    "--enable-chunked-prefill": "Always on; --max-num-batched-tokens is the size of a chunk.",
    "--no-enable-chunked-prefill": "Prefill is always chunked; raise --max-num-batched-tokens for larger chunks.",
    "--trust-remote-code": "Code from a model's directory is never run.",
    "--hf-overrides": "Edit the model's config.json.",
    "--pipeline-parallel-size": _ONE_DEVICE,
    "--data-parallel-size": _ONE_DEVICE,
    "--speculative-config": "Its parts are flags: --spec-method, --spec-model, --max-draft-tokens.",
    "--spec-tokens": "Use --max-draft-tokens.",
    "--enable-auto-tool-choice": _PARSED,
    "--tool-call-parser": _PARSED,
    "--reasoning-parser": _PARSED,
    "--enable-lora": "Not built: adapters cannot be loaded.",
    "--max-num-queued-reqs": "The queue holds --max-waiting-batches times --max-batch-size requests.",
    "--disable-log-stats": "Use --log-stats-interval 0.",
    "--uvicorn-log-level": "There is no uvicorn here: use --log-level.",
    "--uds": "Unix sockets are not built: use --host and --port.",
    "--ssl-keyfile": _PROXY,
    "--ssl-certfile": _PROXY,
    "--ssl-ca-certs": _PROXY,
}

_SERVE = "To serve a model, use `trio-llm serve MODEL`, MODEL being a directory or a hub id."

COMMANDS = {
    "download": "To fetch a model from the hub, use `trio-llm pull OWNER/NAME`.",
    "run": "To talk to a model, use `trio-llm chat -m MODEL`; for one answer, `trio-llm generate -m MODEL PROMPT`.",
    "complete": "For one answer, use `trio-llm generate --raw -m MODEL PROMPT`.",
    "list": "To see which models came from the hub, use `trio-llm models`.",
    "ls": "To see which models came from the hub, use `trio-llm models`.",
    "ps": "A server lists what it serves: `curl http://localhost:8000/v1/models`.",
    "show": "To see what a model needs, use `trio-llm plan MODEL --users N --context TOKENS`.",
    "rm": "Nothing is stored: delete the model's directory, or use `hf cache` for what came from the hub.",
    "stop": "Press Ctrl-C in the server's terminal, or send SIGTERM to its process.",
    "create": f"There are no Modelfiles. {_SERVE}",
    "start": _SERVE,
    "server": _SERVE,
    "benchmark": "Use `trio-llm bench`.",
    "version": "Use `trio-llm --version`.",
    "help": "Use `trio-llm --help`.",
}
