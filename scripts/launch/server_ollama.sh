#!/usr/bin/env bash
# The server of the judge, in the foreground. Run: scripts/launch/server_ollama.sh
# CUDA_VISIBLE_DEVICES, OLLAMA_MODELS and every other variable of Ollama pass through; DRY_RUN=1 prints the command.
set -euo pipefail

# Ollama cuts longer prompts off without a word; a group of answers is long.
export OLLAMA_CONTEXT_LENGTH=${OLLAMA_CONTEXT_LENGTH:-40960}
export OLLAMA_HOST=${OLLAMA_HOST:-127.0.0.1:11435}
# As many questions as --judge_concurrency asks at a time; by default it answers one after the other.
export OLLAMA_NUM_PARALLEL=${OLLAMA_NUM_PARALLEL:-4}
if [[ ${DRY_RUN:-0} != 0 ]]; then
    echo "[DRY_RUN] OLLAMA_CONTEXT_LENGTH=$OLLAMA_CONTEXT_LENGTH OLLAMA_HOST=$OLLAMA_HOST" \
        "OLLAMA_NUM_PARALLEL=$OLLAMA_NUM_PARALLEL ollama serve"
    exit 0
fi
exec ollama serve
