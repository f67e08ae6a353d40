#!/usr/bin/env bash
# GRPO on this node, or on one of many; LoRA unless GRPO_LORA_TARGETS is empty. Run: GRPO_REWARDS=math scripts/launch/grpo.sh
# The default reward is a judge: start scripts/launch/server_ollama.sh and judge_ollama.sh first.
# Variables: docs/launching.md. Further flags of rlhf/train_grpo.py may follow; they win.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=${GRPO_MODEL:-checkpoints/sft_newdataset}
data=${GRPO_DATA:-openai/gsm8k@main}
output_dir=${GRPO_OUTPUT:-checkpoints/grpo_run}
adapter=()
if [[ -n ${GRPO_ADAPTER:-} ]]; then  # an adapter on the model, which training continues
    adapter=(--sft_adapter_path "$GRPO_ADAPTER")
fi
split_words "${GRPO_LORA_TARGETS-q_proj v_proj k_proj attn_out}"
lora=()
if ((${#WORDS[@]})); then
    lora=(--use_lora --lora_target_modules "${WORDS[@]}")
fi
split_words "${GRPO_REWARDS:-judge}"
rewards=(--reward_funcs "${WORDS[@]}")
split_words "${GRPO_ARGS:-}"
note "[GRPO] $model on $data, ${rewards[*]} -> $output_dir"
launch_training "$output_dir" rlhf/train_grpo.py \
    --model_name_or_path "$model" \
    "${adapter[@]}" \
    --train_data_path "$data" \
    "${rewards[@]}" \
    --num_generations "${GRPO_GROUP:-4}" \
    --batch_size "${GRPO_GLOBAL_BATCH:-32}" \
    --micro_batch_size "${GRPO_LOCAL_BATCH:-1}" \
    --learning_rate "${GRPO_LR:-1e-6}" \
    --gen_length "${GRPO_GEN_LENGTH:-256}" \
    --block_length "${GRPO_BLOCK_LENGTH:-32}" \
    "${lora[@]}" \
    --dtype bfloat16 \
    --gradient_checkpointing \
    --save_interval 20 \
    "${WORDS[@]}" "$@"
