#!/usr/bin/env bash
# Pretraining on this node, or on one of many. Run: PRETRAIN_DATA=corpus/train scripts/launch/pretrain.sh
# Variables: docs/launching.md. Further flags of pretraining/pretrain.py may follow; they win.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ -n ${PRETRAIN_CONFIG:-} ]]; then  # from scratch
    [[ -z ${PRETRAIN_MODEL:-} ]] || die "give PRETRAIN_MODEL (continue) or PRETRAIN_CONFIG (from scratch), not both"
    flags=(--config_name "$PRETRAIN_CONFIG" --tokenizer_name "${PRETRAIN_TOKENIZER:-tokenizer}")
else
    flags=(--model_name_or_path "${PRETRAIN_MODEL:-GSAI-ML/LLaDA-8B-Base}")
fi
flags+=(
    --train_data_path "${PRETRAIN_DATA:-data_pretrain_stratified/train_new.txt}"
    --batch_size "${PRETRAIN_GLOBAL_BATCH:-64}"
    --micro_batch_size "${PRETRAIN_LOCAL_BATCH:-8}"
    --learning_rate "${PRETRAIN_LR:-1e-5}"
    --save_interval 100
)
train PRETRAIN "${PRETRAIN_OUTPUT:-checkpoints/pretrain_run}" pretraining/pretrain.py "$@"
