#!/usr/bin/env bash
# DPO on this node, or on one of many; LoRA unless DPO_LORA_TARGETS is empty. Run: DPO_DATA=pairs.jsonl scripts/launch/dpo.sh
# Variables: docs/launching.md. Further flags of rlhf/train_dpo.py may follow; they win.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=${DPO_MODEL:-checkpoints/sft_newdataset}
data=${DPO_DATA:-preferences/paired.jsonl}
output_dir=${DPO_OUTPUT:-checkpoints/dpo_run}
adapter=()
if [[ -n ${DPO_ADAPTER:-} ]]; then  # an adapter on the model, which training continues
    adapter=(--sft_adapter_path "$DPO_ADAPTER")
fi
split_words "${DPO_LORA_TARGETS-q_proj v_proj k_proj attn_out}"
lora=()
if ((${#WORDS[@]})); then
    lora=(--use_lora --lora_target_modules "${WORDS[@]}")
fi
split_words "${DPO_ARGS:-}"
note "[DPO] $model on $data -> $output_dir"
launch_training "$output_dir" rlhf/train_dpo.py \
    --model_name_or_path "$model" \
    "${adapter[@]}" \
    --train_data_path "$data" \
    --num_train_epochs "${DPO_EPOCHS:-1}" \
    --batch_size "${DPO_GLOBAL_BATCH:-64}" \
    --micro_batch_size "${DPO_LOCAL_BATCH:-2}" \
    --learning_rate "${DPO_LR:-5e-5}" \
    --beta "${DPO_BETA:-0.2}" \
    "${lora[@]}" \
    --dtype bfloat16 \
    --gradient_checkpointing \
    --save_interval 100 \
    "${WORDS[@]}" "$@"
