#!/usr/bin/env bash
# Every stage, small, on a CPU, on real tasks, without the hub. Run: bash scripts/quickstart.sh
# A second run continues where the first stopped; arguments are passed on (for example --stage sft, --dry_run).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python scripts/train_pipeline.py --config configs/quickstart.yaml "$@"
