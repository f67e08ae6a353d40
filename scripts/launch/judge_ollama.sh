#!/usr/bin/env bash
# Fetches the judge and loads it into the server's memory, so that the first judgement does not wait for it.
# Run: scripts/launch/judge_ollama.sh        or: JUDGE_MODEL=qwen3:8b scripts/launch/judge_ollama.sh
# A prompt for trying it out follows; leave with /bye. DRY_RUN=1 prints the command.
set -euo pipefail

export OLLAMA_HOST=${OLLAMA_HOST:-127.0.0.1:11435}
command=(ollama run "${JUDGE_MODEL:-qwen3:30b-a3b-fp16}" "$@")
if [[ ${DRY_RUN:-0} != 0 ]]; then
    printf '[DRY_RUN] OLLAMA_HOST=%s' "$OLLAMA_HOST"
    printf ' %q' "${command[@]}"
    printf '\n'
    exit 0
fi
exec "${command[@]}"
