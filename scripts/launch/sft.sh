#!/usr/bin/env bash
# SFT on this node, or on one of many; LoRA unless SFT_LORA_TARGETS is empty. Run: SFT_DATA=sft.jsonl scripts/launch/sft.sh
# Variables: docs/launching.md. Further flags of sft_training/train_sft.py may follow; they win.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=${SFT_MODEL:-checkpoints/pretrain_run}
if [[ -n ${SFT_LORA_WEIGHTS:-} ]]; then  # an adapter folder names its base model itself
    [[ -z ${SFT_MODEL:-} ]] || note "[SFT] SFT_MODEL is not used: $SFT_LORA_WEIGHTS names its base model"
    model=$SFT_LORA_WEIGHTS
fi
flags=(
    --model_name_or_path "$model"
    --train_data_path "${SFT_DATA:-./filtered_conversational_dataset}"
    --num_train_epochs "${SFT_EPOCHS:-3}"
    --batch_size "${SFT_GLOBAL_BATCH:-128}"
    --micro_batch_size "${SFT_LOCAL_BATCH:-8}"
    --learning_rate "${SFT_LR:-1e-5}"
    --save_interval 100
)
train SFT "${SFT_OUTPUT:-checkpoints/sft_newdataset}" sft_training/train_sft.py "$@"
