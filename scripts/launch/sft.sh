#!/usr/bin/env bash
# SFT on this node, or on one of many; LoRA unless SFT_LORA_TARGETS is empty. Run: SFT_DATA=sft.jsonl scripts/launch/sft.sh
# Variables: docs/launching.md. Further flags of sft_training/train_sft.py may follow; they win.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=${SFT_MODEL:-checkpoints/pretrain_run}
data=${SFT_DATA:-./filtered_conversational_dataset}
output_dir=${SFT_OUTPUT:-checkpoints/sft_newdataset}
lora=()
if [[ -n ${SFT_LORA_WEIGHTS:-} ]]; then  # an adapter folder names its base model itself
    [[ -z ${SFT_MODEL:-} ]] || note "[SFT] SFT_MODEL is not used: $SFT_LORA_WEIGHTS names its base model"
    model=$SFT_LORA_WEIGHTS
fi
split_words "${SFT_LORA_TARGETS-q_proj v_proj k_proj attn_out}"
if ((${#WORDS[@]})); then
    lora=(--use_lora --lora_target_modules "${WORDS[@]}")
fi
split_words "${SFT_ARGS:-}"
note "[SFT] $model on $data -> $output_dir"
launch_training "$output_dir" sft_training/train_sft.py \
    --model_name_or_path "$model" \
    --train_data_path "$data" \
    --num_train_epochs "${SFT_EPOCHS:-3}" \
    --batch_size "${SFT_GLOBAL_BATCH:-128}" \
    --micro_batch_size "${SFT_LOCAL_BATCH:-8}" \
    --learning_rate "${SFT_LR:-1e-5}" \
    "${lora[@]}" \
    --dtype bfloat16 \
    --gradient_checkpointing \
    --save_interval 100 \
    "${WORDS[@]}" "$@"
