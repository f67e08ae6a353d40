#!/usr/bin/env bash
# The suite's claims, each with the command that proves it, into docs/proofs.md. Under an hour on two CPU cores, no hub.
# Run: bash scripts/prove.sh                         # --input d1_generations/*.jsonl.gz regrades published generations too
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=2
exec python scripts/benchmarks/prove.py --overwrite "$@"
