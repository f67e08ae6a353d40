#!/usr/bin/env bash
# SFT on conversations, or distillation from a file of teacher logits: preprocess, train, answer a prompt.
# Run: LOGITS_FILE=sft_data/llama_logits.json MODEL_NAME=models/LLaDA-8B-Instruct scripts/launch/run_fine_tuning.sh
# Variables: docs/alignment.md. Further flags of alignment/train_kl.py may follow; they win. Stops at the first failure.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=${MODEL_NAME:-GSAI-ML/LLaDA-8B-Instruct}
output_dir=${OUTPUT_DIR:-sft_output}
max_length=${MAX_LENGTH:-4096}
if [[ -n ${PRINT_OUTPUT_DIR:-} ]]; then
    printf '%s\n' "$output_dir"
    exit 0
fi
split_words "${PREPROCESS_ARGS:-}"

if [[ ${USE_LOGITS:-true} == true ]]; then
    rows=${PROCESSED_LOGITS_FILE:-sft_data/processed_logits.pt}
    note "[1/3] ${LOGITS_FILE:=sft_data/llama_logits.json} -> $rows"
    (NPROC_PER_NODE=1 launch alignment/precompute_teacher.py --input "$LOGITS_FILE" --output_dir "$rows" \
        --tokenizer "$model" --max_length "$max_length" "${WORDS[@]}")
else
    rows=${PROCESSED_FILE:-sft_data/processed_conversations.pt}
    note "[1/3] ${INPUT_FILE:=sft_data/conversations.json} -> $rows"
    (NPROC_PER_NODE=1 launch sft_training/prepare_sft.py --input "$INPUT_FILE" --output_dir "$rows" \
        --tokenizer "$model" --max_length "$max_length" "${WORDS[@]}")
    rows=$rows/train
fi
note "[2/3] $model on $rows -> $output_dir"
(launch_training "$output_dir" alignment/train_kl.py \
    --model_name_or_path "$model" \
    --train_data_path "$rows" \
    --positions masked \
    --loss_type "${LOSS_TYPE:-auto}" \
    --temperature "${TEMPERATURE:-1.0}" \
    --alpha "${ALPHA:-0.5}" \
    --beta "${BETA:-0.5}" \
    --batch_size "${BATCH_SIZE:-2}" \
    --learning_rate "${LEARNING_RATE:-2.5e-5}" \
    --weight_decay "${WEIGHT_DECAY:-0.1}" \
    --num_train_epochs "${EPOCHS:-3}" \
    --warmup_steps "${WARMUP_STEPS:-50}" \
    --max_length "$max_length" \
    "$@")
note "[3/3] an answer of $output_dir"
(NPROC_PER_NODE=1 launch inference/generate.py --model_name_or_path "$output_dir/final" --is_instruct \
    --prompt "${PROMPT:-What is the capital of France?}" \
    --method semi_autoregressive_padding --gen_length 128 --steps 128 --block_length 32)
