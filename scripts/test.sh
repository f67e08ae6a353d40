#!/usr/bin/env bash
# Lint, then the tests that need neither a GPU nor the hub. Run: bash scripts/test.sh
# Arguments go to pytest, for example: bash scripts/test.sh tests/test_masking.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1  # a process for each core, not all cores for each process
ruff check .
ruff format --check .
exec python -m pytest -q --numprocesses auto "$@"
