#!/usr/bin/env bash
# Everything worth timing on one GPU of about 80 GB, at most ten minutes; weights are random, nothing is downloaded.
# Needs torch 2.11, transformers 5.17, peft and accelerate, or newer; neither datasets nor lm_eval. A line appears
# as each arm ends, so that a machine that is taken away leaves what it had measured. Numbers go to $OUTPUT/*.json.
#
#   bash scripts/benchmarks/gpu.sh                       # all parts but those of `more`
#   bash scripts/benchmarks/gpu.sh step-8b-lora grpo     # these
#   bash scripts/benchmarks/gpu.sh more                  # ablations, larger batches, batches of prompts
#   DLLM=path FAST_DLLM=path bash scripts/benchmarks/gpu.sh    # beside these checkouts
#   MICRO=1 bash scripts/benchmarks/gpu.sh               # tiny shapes on the CPU: does it run here?
#   DRY_RUN=1 bash scripts/benchmarks/gpu.sh             # prints the commands
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUTPUT=${OUTPUT:-runs/bench/$(date +%Y%m%d-%H%M%S)} LIMIT=${LIMIT:-600}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
wanted=" $* "

# part NAME SECONDS PROGRAM FLAGS...: runs it if it is wanted, for so long at most; the next one runs even so.
part() {
    local name=$1 seconds=$2 left=$((LIMIT - SECONDS)) command
    [[ $wanted == "  " && $name != *-more || $wanted == *" $name "* || $wanted == *" more "* && $name == *-more ]] || return 0
    command=("${PYTHON:-python}" "scripts/benchmarks/$3" "${@:4}")
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    echo "== $name (after $SECONDS s)"
    if ((left < 10)); then
        echo "   left out: LIMIT=$LIMIT seconds are over"
    elif ! timeout "$((seconds < left ? seconds : left))" "${command[@]}"; then
        echo "   did not end well"
        failed+=("$name")
    fi
}

failed=()
[[ -n ${DRY_RUN:-} ]] || mkdir -p "$OUTPUT"
dllm=(${DLLM:+--peer_path "$DLLM"}) fast_dllm=(${FAST_DLLM:+--peer_path "$FAST_DLLM"})
if [[ -n ${MICRO:-} ]]; then
    device=(--device cpu) gpu=() size=(--config_name 1m) one=micro eight=micro random=micro-random packed=64 masks=32
    answers=(--gen_length 16 --prompt_length 16 --num_prompts 1) block=8
else
    bandwidth=3.35  # TB/s of an H100
    [[ $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) != *H200* ]] || bandwidth=4.8
    device=(--device cuda --dtype bfloat16) gpu=(--bandwidth "${BANDWIDTH:-$bandwidth}") size=(--config_name 1b --vocab_size 126464)
    one=1b eight=8b-lora random=8b-random packed=4096 masks=128 block=32
    answers=(--gen_length 128 --prompt_length 128 --block_length 32)
fi
step=(bench_step.py "${device[@]}" --mask_ratio 0.5 --repeats 3 "${dllm[@]}")
[[ -n ${MICRO:-} ]] || step+=(--compile --memory)
lora=(${MICRO:+--lora_r 4})
sampler=(bench_inference.py --shape "$random" "${device[@]:0:2}" --block_length "$block" "${gpu[@]}" "${fast_dllm[@]}")
graphs=(${MICRO:-exact+graphs dual+graphs}) && [[ -z ${MICRO:-} ]] || graphs=()

part step-1b 150 "${step[@]}" --shape "$one" --output "$OUTPUT/step-1b.json"
part step-8b-lora 130 "${step[@]}" --shape "$eight" "${lora[@]}" --gradient_checkpointing --output "$OUTPUT/step-8b-lora.json"
part sampler 150 "${sampler[@]}" --arms reference exact dual threshold "${graphs[@]}" --repeats 2 --output "$OUTPUT/sampler.json"
part likelihood 60 bench_forward.py --what likelihood "${size[@]}" "${device[@]}" --num_masks "$masks" --repeats 3
part packed 40 bench_forward.py --what packed "${size[@]}" "${device[@]}" --packed_length "$packed"
part grpo 90 bench_grpo.py "${size[@]}" "${device[@]}" "${answers[@]}" --sharded --repeats 2

part step-1b-ablations-more 300 "${step[@]}" --shape "$one" --ablations
part step-1b-4-more 200 "${step[@]}" --shape "$one" --batch_size 4
part step-8b-lora-whole-more 200 "${step[@]}" --shape "$eight" "${lora[@]}"
part sampler-parallel-more 200 "${sampler[@]}" --arms exact dual "${graphs[@]}" --tokens_per_step 2 4 8
part sampler-batch-more 200 "${sampler[@]}" --arms dual "${graphs[@]}" --batch_size 1 4 8
((${#failed[@]} == 0)) || { echo "did not end well: ${failed[*]}" && exit 1; }
