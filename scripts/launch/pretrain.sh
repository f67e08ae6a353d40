#!/usr/bin/env bash
# Pretraining on this node, or on one of many. Run: PRETRAIN_DATA=corpus/train scripts/launch/pretrain.sh
# Variables: docs/launching.md. Further flags of pretraining/pretrain.py may follow; they win.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

output_dir=${PRETRAIN_OUTPUT:-checkpoints/pretrain_run}
data=${PRETRAIN_DATA:-data_pretrain_stratified/train_new.txt}
if [[ -n ${PRETRAIN_CONFIG:-} ]]; then  # from scratch
    [[ -z ${PRETRAIN_MODEL:-} ]] || die "give PRETRAIN_MODEL (continue) or PRETRAIN_CONFIG (from scratch), not both"
    model=(--config_name "$PRETRAIN_CONFIG" --tokenizer_name "${PRETRAIN_TOKENIZER:-tokenizer}")
else
    model=(--model_name_or_path "${PRETRAIN_MODEL:-GSAI-ML/LLaDA-8B-Base}")
fi
split_words "${PRETRAIN_ARGS:-}"
note "[PRETRAIN] ${model[1]} on $data -> $output_dir"
launch_training "$output_dir" pretraining/pretrain.py "${model[@]}" \
    --train_data_path "$data" \
    --batch_size "${PRETRAIN_GLOBAL_BATCH:-64}" \
    --micro_batch_size "${PRETRAIN_LOCAL_BATCH:-8}" \
    --learning_rate "${PRETRAIN_LR:-1e-5}" \
    --dtype bfloat16 \
    --gradient_checkpointing \
    --save_interval 100 \
    "${WORDS[@]}" "$@"
