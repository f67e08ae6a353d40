#!/usr/bin/env bash
# Times the training step on one GPU of about 80 GB: the 1B shape at 4,096 tokens and LoRA on the 8B shape at
# 1 x 2,048, against the published step and dllm's. About ten minutes; weights are random, nothing is downloaded.
#
#   bash scripts/benchmarks/bench_gpu_step.sh                  # tables in the terminal, numbers in runs/bench/*.json
#   OUTPUT=elsewhere PEER_PATH=path/to/dllm bash scripts/benchmarks/bench_gpu_step.sh
#   DRY_RUN=1 bash scripts/benchmarks/bench_gpu_step.sh        # prints the commands
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUTPUT=${OUTPUT:-runs/bench}

bench() {
    local name=$1
    shift
    local command=("${PYTHON:-python}" scripts/benchmarks/bench_step.py --device cuda --dtype bfloat16 --compile --memory
        --output "$OUTPUT/$name.json" "$@")
    if [[ -n "${PEER_PATH:-}" ]]; then
        command+=(--peer_path "$PEER_PATH")
    fi
    if [[ -n "${DRY_RUN:-}" ]]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    mkdir -p "$OUTPUT"
    "${command[@]}"
}

# One sequence and four: the optimizer's share of the step falls, and MFU with it rises.
bench 1b-1x4096 --shape 1b --ablations
bench 1b-4x4096 --shape 1b --batch_size 4
bench 8b-lora-1x2048 --shape 8b-lora --gradient_checkpointing
bench 8b-lora-1x2048-no-recompute --shape 8b-lora
