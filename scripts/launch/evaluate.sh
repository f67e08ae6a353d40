#!/usr/bin/env bash
# lm_eval on this node, or on one of many. Run: MODEL_PATH=runs/sft TASKS=gsm8k scripts/launch/evaluate.sh
# Variables: docs/launching.md. Further flags of eval/eval_llada.py may follow; they win.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=${MODEL_PATH:-checkpoints/sft_newdataset}
tasks=${TASKS:-gsm8k}
output_path=${EVAL_OUTPUT:-eval_logs}
model_args=${EXTRA_ARGS-cfg=0.0,is_check_greedy=False,num_masks=64,gen_length=256,steps=256,block_length=16,temperature=0.0}
note "[EVAL] $model on $tasks -> $output_path"
launch eval/eval_llada.py \
    --model llada_dist \
    --tasks "$tasks" \
    --num_fewshot "${FEWSHOT:-5}" \
    --batch_size "${BATCH_SIZE:-1}" \
    --model_args "model_path=$model${model_args:+,$model_args}" \
    --output_path "$output_path" \
    "$@"
