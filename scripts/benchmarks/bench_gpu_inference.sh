#!/usr/bin/env bash
# Times the sampler on one GPU of about 80 GB: the 8B shape in bfloat16 with random weights, at prompt/answer
# lengths 128/128 and 768/256, without a cache and with the dual cache, beside the published loop and the
# hardware's floor. About ten minutes; nothing is downloaded.
#
#   bash scripts/benchmarks/bench_gpu_inference.sh                  # tables in the terminal, numbers in runs/bench/*.json
#   OUTPUT=elsewhere PEER_PATH=path/to/Fast-dLLM bash scripts/benchmarks/bench_gpu_inference.sh
#   BANDWIDTH=4.8 bash scripts/benchmarks/bench_gpu_inference.sh    # TB/s; default 3.35 (H100 SXM), or 4.8 on an H200
#   DRY_RUN=1 bash scripts/benchmarks/bench_gpu_inference.sh        # prints the commands
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUTPUT=${OUTPUT:-runs/bench}
if [[ -z "${BANDWIDTH:-}" ]]; then
    BANDWIDTH=3.35
    if command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name --format=csv,noheader | grep -q H200; then
        BANDWIDTH=4.8
    fi
fi

bench() {
    local name=$1
    shift
    local command=("${PYTHON:-python}" scripts/benchmarks/bench_inference.py --shape 8b-random --device cuda
        --bandwidth "$BANDWIDTH" --output "$OUTPUT/$name.json" "$@")
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

# One token a step, against the published loop; then what parallel decoding would give at 2, 4 and 8 a step.
bench inference-8b --arms reference exact exact+graphs dual dual+graphs prefix --repeats 10
bench inference-8b-parallel --arms exact+graphs dual+graphs --tokens_per_step 2 4 8 --repeats 5
# Batching helps while a step is bound by reading the weights, which with a cache it is up to about 150 rows.
bench inference-8b-batch --arms dual+graphs --batch_size 1 4 8 --repeats 5
