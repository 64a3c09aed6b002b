#!/bin/sh
# Talk to a server with curl. Usage: curl.sh [BASE_URL]
set -eu
base=${1:-${OPENAI_BASE_URL:-http://localhost:8000/v1}}
post() { curl -sS --fail-with-body -H "Authorization: Bearer ${VLLM_API_KEY:-none}" -H 'Content-Type: application/json' "$@"; }

echo "== a chat"
post "$base/chat/completions" -d '{"messages": [{"role": "user", "content": "What is the capital of Japan?"}]}'

echo; echo "== a stream of events"
post -N "$base/completions" -d '{"prompt": "Once upon a time", "max_tokens": 8, "stream": true}'

echo "== what is served"
post "$base/models"

echo; echo "== the tokens of a text"
post "${base%/v1}/tokenize" -d '{"prompt": "Once upon a time"}'

echo; echo "== health"
post "${base%/v1}/health"
