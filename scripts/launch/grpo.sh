#!/usr/bin/env bash
# GRPO on this node, or on one of many; LoRA unless GRPO_LORA_TARGETS is empty. Run: GRPO_REWARDS=math scripts/launch/grpo.sh
# The default reward is a judge: start scripts/launch/server_ollama.sh and judge_ollama.sh first.
# Variables: docs/launching.md. Further flags of rlhf/train_grpo.py may follow; they win.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

split_words "${GRPO_REWARDS:-judge}"
flags=(
    --model_name_or_path "${GRPO_MODEL:-checkpoints/sft_newdataset}"
    --train_data_path "${GRPO_DATA:-openai/gsm8k@main}"
    --reward_funcs "${WORDS[@]}"
    --num_generations "${GRPO_GROUP:-4}"
    --batch_size "${GRPO_GLOBAL_BATCH:-32}"
    --micro_batch_size "${GRPO_LOCAL_BATCH:-1}"
    --learning_rate "${GRPO_LR:-1e-6}"
    --gen_length "${GRPO_GEN_LENGTH:-256}"
    --block_length "${GRPO_BLOCK_LENGTH:-32}"
    --save_interval 20
)
train GRPO "${GRPO_OUTPUT:-checkpoints/grpo_run}" rlhf/train_grpo.py "$@"
