"""What to do instead of vLLM's flags that do not exist here. A flag that nothing reads is never accepted."""

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
