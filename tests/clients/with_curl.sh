#!/usr/bin/env bash
# curl: create, stream, suffix, an error, abort.
set -euo pipefail
url=$1
json='Content-Type: application/json'
question='{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples does he have?"}'

curl -sSf "$url/v1/models" | grep -q gsm-student && echo "models: ok"
curl -sSf "$url/v1/chat/completions" -H "$json" -d "{\"messages\": [$question], \"max_tokens\": 16}" | grep -q '"finish_reason"' && echo "create: ok"
curl -sSfN "$url/v1/chat/completions" -H "$json" -d "{\"messages\": [$question], \"max_tokens\": 16, \"stream\": true}" | grep -q 'data: \[DONE\]' && echo "stream: ok"
curl -sSf "$url/v1/completions" -H "$json" -d '{"model": "gsm-teacher", "prompt": "Tom has 3+4=", "suffix": " apples.", "max_tokens": 6}' | grep -q '"text"' && echo "suffix: ok"
[ "$(curl -s -o /dev/null -w '%{http_code}' "$url/v1/completions" -H "$json" -d '{"prompt": "a", "echo": true}')" = 400 ] && echo "error: ok"
timeout 0.2 curl -sN "$url/v1/chat/completions" -H "$json" -d "{\"messages\": [$question], \"stream\": true}" > /dev/null || echo "abort: ok"
