#!/usr/bin/env bash
# DPO on this node, or on one of many; LoRA unless DPO_LORA_TARGETS is empty. Run: DPO_DATA=pairs.jsonl scripts/launch/dpo.sh
# Variables: docs/launching.md. Further flags of rlhf/train_dpo.py may follow; they win.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flags=(
    --model_name_or_path "${DPO_MODEL:-checkpoints/sft_newdataset}"
    --train_data_path "${DPO_DATA:-preferences/paired.jsonl}"
    --num_train_epochs "${DPO_EPOCHS:-1}"
    --batch_size "${DPO_GLOBAL_BATCH:-64}"
    --micro_batch_size "${DPO_LOCAL_BATCH:-2}"
    --learning_rate "${DPO_LR:-5e-5}"
    --beta "${DPO_BETA:-0.2}"
    --save_interval 100
)
train DPO "${DPO_OUTPUT:-checkpoints/dpo_run}" rlhf/train_dpo.py "$@"
