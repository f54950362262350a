#!/bin/sh
# `ivl serve` without any client library: a question about a picture, then the same as a stream.
#
#   ivl serve runs/quickstart/model
#   sh examples/serve_curl.sh picture.png [http://127.0.0.1:8000]
#
# IVL_API_KEY holds the key if the server has any. The body goes through a pipe: pictures are too long for a command line.
set -eu
picture=${1:?usage: serve_curl.sh IMAGE [URL]}
url=${2:-http://127.0.0.1:8000}
key="Authorization: Bearer ${IVL_API_KEY:-none}"

model=$(curl -sSf -H "$key" "$url/v1/models" | sed 's/.*"data":[^"]*"id":"\([^"]*\)".*/\1/')
echo "model: $model"

body() {
    printf '{"model": "%s", "max_tokens": 16, "stream": %s, "messages": [{"role": "user", "content": [' "$model" "$1"
    printf '{"type": "image_url", "image_url": {"url": "data:image/png;base64,%s"}},' "$(base64 <"$picture" | tr -d '\n')"
    printf '{"type": "text", "text": "what shape is in the image?"}]}]}'
}

body false | curl -sSf -H "$key" -H "Content-Type: application/json" -d @- "$url/v1/chat/completions"
echo
body true | curl -sSfN -H "$key" -H "Content-Type: application/json" -d @- "$url/v1/chat/completions"
