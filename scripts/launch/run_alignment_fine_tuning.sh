#!/usr/bin/env bash
# From a file of teacher logits to an aligned model: preprocess, train (KL at all answer positions), answer a prompt.
# Run: INPUT_FILE=sft_data/llama_logits.json MODEL_NAME=models/LLaDA-8B-Instruct scripts/launch/run_alignment_fine_tuning.sh
# Variables: docs/alignment.md. Further flags of alignment/train_kl.py may follow; they win. Stops at the first failure.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODEL=${MODEL_NAME:-GSAI-ML/LLaDA-8B-Instruct} MAX_LENGTH=${MAX_LENGTH:-256}
output_dir=${OUTPUT_DIR:-alignment_output}
rows=${PROCESSED_FILE:-sft_data/processed_alignment.pt}
print_output_dir "$output_dir"
prepare alignment/precompute_teacher.py "${INPUT_FILE:-sft_data/llama_logits.json}" "$rows"
align "$rows" "$output_dir" --positions answer --loss_type kl --log_interval "${LOG_INTERVAL:-100}" "$@"
