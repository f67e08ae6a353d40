#!/usr/bin/env bash
# One answer to the terminal, or a file of prompts on all GPUs. Run: GEN_MODEL=runs/sft GEN_PROMPT="Who are you?" scripts/launch/generate.sh
# Variables: docs/launching.md. Further flags of inference/generate.py may follow; they win.
# shellcheck source=scripts/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

model=${GEN_MODEL:-checkpoints/sft_newdataset}
if [[ -n ${GEN_PROMPTS_FILE:-} ]]; then
    prompts=(--prompts_file "$GEN_PROMPTS_FILE" --output_path "${GEN_OUTPUT:-answers.jsonl}")
else
    prompts=(--prompt "${GEN_PROMPT:-Hello}")
    NPROC_PER_NODE=1  # a single prompt cannot be shared out
fi
# GEN_ARGS holds flags, or name=value pairs with commas between them.
split_words "${GEN_ARGS-temperature=0.7}"
flags=()
for word in "${WORDS[@]}"; do
    if [[ $word == --* || $word != *=* ]]; then
        flags+=("$word")
    else
        IFS=, read -ra pairs <<<"$word"
        flags+=("${pairs[@]/#/--}")
    fi
done
note "[GEN] $model, ${prompts[*]}"
launch inference/generate.py --model_name_or_path "$model" "${prompts[@]}" \
    --gen_length "${GEN_MAX_TOKENS:-64}" "${flags[@]}" "$@"
