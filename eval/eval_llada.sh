#!/usr/bin/env bash
# The three evaluations of a chat model: MMLU (5-shot), GSM8K (5-shot) and HumanEval, each with its published sampler.
#
#   MODEL_PATH=CHECKPOINT bash eval/eval_llada.sh                 # all three, from the hub
#   DRY_RUN=1 MODEL_PATH=CHECKPOINT bash eval/eval_llada.sh       # only print the commands
#   LLADA_EVAL_DATA=FOLDER TASKS="gsm8k humaneval" LIMIT=100 MODEL_PATH=CHECKPOINT bash eval/eval_llada.sh
#
# MODEL_PATH (or LLADA_INSTRUCT)  checkpoint folder or hub name; GSAI-ML/LLaDA-8B-Instruct
# ADAPTER_PATH     LoRA adapter to put on it
# TASKS            some of: mmlu gsm8k humaneval
# LLADA_EVAL_DATA  folder of local data (docs/evaluation.md); the tasks' local versions are used, offline
# NUM_GPUS         processes, one per GPU; all GPUs that nvidia-smi lists, else 1
# OUTPUT_DIR       results and finished requests; runs/eval
# FEWSHOT, LIMIT, BATCH_SIZE, EXTRA_ARGS (more --model_args), EXTRA_FLAGS (more flags), DRY_RUN
set -euo pipefail
FOLDER="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

MODEL_PATH="${MODEL_PATH:-${LLADA_INSTRUCT:-GSAI-ML/LLaDA-8B-Instruct}}"
TASKS="${TASKS:-mmlu gsm8k humaneval}"
FEWSHOT="${FEWSHOT:-5}"
OUTPUT_DIR="${OUTPUT_DIR:-runs/eval}"
PYTHON="${PYTHON:-python}"
if [[ -z "${NUM_GPUS:-}" ]]; then
  NUM_GPUS=1
  if command -v nvidia-smi >/dev/null && GPUS="$(nvidia-smi --list-gpus 2>/dev/null)"; then
    NUM_GPUS="$(grep -c . <<<"$GPUS" || true)"
    [[ "$NUM_GPUS" -ge 1 ]] || NUM_GPUS=1
  fi
fi

LOCAL=""
if [[ -n "${LLADA_EVAL_DATA:-}" ]]; then
  LOCAL="_local"
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
fi

LAUNCH=("$PYTHON")
if [[ "$NUM_GPUS" -gt 1 ]]; then
  LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NUM_GPUS")
fi

run() {  # task, flags of the task, sampler arguments
  local task="$1" flags="$2" model_args="model_path=$MODEL_PATH,$3"
  [[ -z "${ADAPTER_PATH:-}" ]] || model_args+=",adapter_path=$ADAPTER_PATH"
  [[ -z "${BATCH_SIZE:-}" ]] || model_args+=",generate_batch_size=$BATCH_SIZE"
  [[ -z "${EXTRA_ARGS:-}" ]] || model_args+=",$EXTRA_ARGS"
  # flags and EXTRA_FLAGS are lists of words
  # shellcheck disable=SC2206
  local command=("${LAUNCH[@]}" "$FOLDER/eval_llada.py" --model llada_dist --tasks "$task" --include_path "$FOLDER/tasks"
    --apply_chat_template --model_args "$model_args" --output_path "$OUTPUT_DIR/$task" --log_samples
    $flags ${LIMIT:+--limit "$LIMIT"} ${EXTRA_FLAGS:-})
  if [[ "${DRY_RUN:-0}" != 0 ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

for name in $TASKS; do
  case "$name" in
    mmlu) run "mmlu_generative$LOCAL" "--num_fewshot $FEWSHOT" "gen_length=3,steps=3,block_length=3" ;;
    gsm8k) run "gsm8k$LOCAL" "--num_fewshot $FEWSHOT" "gen_length=256,steps=256,block_length=8" ;;
    humaneval)
      run humaneval_instruct_sanitized "--confirm_run_unsafe_code" "gen_length=512,steps=512,block_length=32" ;;
    *) echo "TASKS: unknown task '$name'; choose from mmlu gsm8k humaneval" >&2; exit 2 ;;
  esac
done
