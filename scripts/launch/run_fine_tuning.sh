#!/usr/bin/env bash
# SFT on conversations, or distillation from a file of teacher logits: preprocess, train, answer a prompt.
# Run: LOGITS_FILE=sft_data/llama_logits.json MODEL_NAME=models/LLaDA-8B-Instruct scripts/launch/run_fine_tuning.sh
# Variables: docs/alignment.md. Further flags of alignment/train_kl.py may follow; they win. Stops at the first failure.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODEL=${MODEL_NAME:-GSAI-ML/LLaDA-8B-Instruct} MAX_LENGTH=${MAX_LENGTH:-4096}
output_dir=${OUTPUT_DIR:-sft_output}
print_output_dir "$output_dir"
if [[ ${USE_LOGITS:-true} == true ]]; then
    rows=${PROCESSED_LOGITS_FILE:-sft_data/processed_logits.pt}
    prepare alignment/precompute_teacher.py "${LOGITS_FILE:-sft_data/llama_logits.json}" "$rows"
else
    rows=${PROCESSED_FILE:-sft_data/processed_conversations.pt}
    prepare sft_training/prepare_sft.py "${INPUT_FILE:-sft_data/conversations.json}" "$rows"
    rows=$rows/train
fi
align "$rows" "$output_dir" --positions masked --loss_type "${LOSS_TYPE:-auto}" \
    --alpha "${ALPHA:-0.5}" --beta "${BETA:-0.5}" "$@"
