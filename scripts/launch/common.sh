# shellcheck shell=bash
# Sourced by the launchers of this folder: turns environment variables into one torchrun command and runs it.
# What the variables mean: docs/launching.md. DRY_RUN=1 prints the command instead, and needs nothing installed.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# The visible GPUs, or 1 where there are none: one process then runs on the CPU.
count_gpus() {
    local count=0 devices
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
        count=${#devices[@]}
    elif command -v nvidia-smi >/dev/null; then
        count=$(nvidia-smi --list-gpus | grep -c '^GPU') || count=0
    fi
    echo $((count > 0 ? count : 1))
}

# Splits "$1" into the array WORDS as a shell would, quotes included, but expands and runs nothing in it.
split_words() {
    local lines
    WORDS=()
    [[ $1 =~ [^[:space:]] ]] || return 0
    lines=$(xargs printf '%s\n' <<<"$1")
    # shellcheck disable=SC2034  # read by the launchers
    mapfile -t WORDS <<<"$lines"
}

# A line for the reader; standard output is for the command alone.
note() {
    echo "$@" >&2
}

die() {
    note "$0: $*"
    exit 2
}

# The processes of a node.
processes() {
    echo "${NPROC_PER_NODE:-${NUM_GPUS:-$(count_gpus)}}"
}

# shard_if_shared: adds --shard full to `flags` where several processes share the work: 8B is too large for each.
shard_if_shared() {
    [[ $(processes) == 1 && ${NNODES:-1} == 1 ]] || flags+=(--shard full)
}

# launch [torchrun flags --] script [flags]: runs the script on every process of this node.
launch() {
    local torchrun=torchrun where nnodes=${NNODES:-1} flags=()
    while [[ $1 == --* ]]; do flags+=("$1") && shift; done
    if [[ $nnodes == 1 ]]; then
        where=(--standalone)
    else
        [[ -n ${RDZV_ENDPOINT:-}${MASTER_ADDR:-} ]] || die "NNODES=$nnodes needs MASTER_ADDR, the host of node 0"
        where=(--nnodes="$nnodes" --rdzv-backend=c10d --rdzv-id="${RDZV_ID:-llada}")
        where+=(--rdzv-endpoint="${RDZV_ENDPOINT:-$MASTER_ADDR:${MASTER_PORT:-29500}}")
        if [[ -n ${NODE_RANK:-} ]]; then
            # Said outright: torchrun's guess fails where MASTER_ADDR is no name of the host's own.
            where+=(--rdzv-conf=is_host="$([[ $NODE_RANK == 0 ]] && echo true || echo false)")
        fi
    fi
    where+=(--nproc-per-node="$(processes)")
    if ! command -v torchrun >/dev/null && [[ -x $ROOT/.venv/bin/torchrun ]]; then
        torchrun=$ROOT/.venv/bin/torchrun
    fi
    set -- "$torchrun" "${where[@]}" "${flags[@]}" "$ROOT/$1" "${@:2}"
    if [[ ${DRY_RUN:-0} != 0 ]]; then
        printf '[DRY_RUN]'
        printf ' %q' "$@"
        printf '\n'
        exit 0
    fi
    exec "$@" # a signal sent to the launcher then reaches torchrun
}

# print_output_dir folder: answers slurm.sbatch, which asks where the markers will be, and ends.
print_output_dir() {
    [[ -z ${PRINT_OUTPUT_DIR:-} ]] || { printf '%s\n' "$1" && exit 0; }
}

# launch_training output_dir script [flags]: survives signals (torchrun passes them on and waits for the save,
# its own limit is 30 s) and dead ranks. The flags come before the caller's, which therefore win.
launch_training() {
    local output_dir=$1 flag
    shift
    for flag in "${@:2}"; do
        case $flag in
            --output_dir | --output_dir=* | --output-dir | --output-dir=*)
                die "$flag: the folder comes from PRETRAIN_OUTPUT, SFT_OUTPUT, ..., where SLURM looks for markers" ;;
        esac
    done
    print_output_dir "$output_dir"
    launch --signals-to-handle=SIGTERM,SIGINT,SIGUSR1,SIGHUP --shutdown-timeout="${SHUTDOWN_TIMEOUT:-300}" \
        --max-restarts="${MAX_RESTARTS:-3}" "$1" --output_dir "$output_dir" "${@:2}"
}

# train STAGE output_dir script [flags]: what the training launchers share. STAGE_LORA_TARGETS, STAGE_ADAPTER and
# STAGE_ARGS are read here; the launcher's own flags stand in the array `flags`.
train() {
    local stage=$1 output_dir=$2 targets=$1_LORA_TARGETS adapter=$1_ADAPTER arguments=$1_ARGS
    WORDS=()
    [[ $stage == PRETRAIN ]] || split_words "${!targets-q_proj v_proj k_proj attn_out}"
    if ((${#WORDS[@]})); then
        flags+=(--use_lora --lora_target_modules "${WORDS[@]}")
    else
        shard_if_shared
    fi
    [[ -z ${!adapter:-} ]] || flags+=(--sft_adapter_path "${!adapter}")
    split_words "${!arguments:-}"
    note "[$stage] ${flags[1]} -> $output_dir"
    launch_training "$output_dir" "$3" "${flags[@]}" --dtype bfloat16 --gradient_checkpointing \
        "${WORDS[@]}" "${@:4}"
}

# prepare script input output: makes training rows; PREPROCESS_ARGS are further flags.
prepare() {
    split_words "${PREPROCESS_ARGS:-}"
    note "[1/3] $2 -> $3"
    (NPROC_PER_NODE=1 launch "$1" --input "$2" --output_dir "$3" --tokenizer "$MODEL" --max_length "$MAX_LENGTH" "${WORDS[@]}")
}

# align rows output_dir [flags]: trains $MODEL on the rows, then shows an answer of the result.
align() {
    local flags=() processes
    processes=$(processes)
    shard_if_shared
    note "[2/3] $MODEL on $1 -> $2"
    (launch_training "$2" alignment/train_kl.py \
        --model_name_or_path "$MODEL" \
        --train_data_path "$1" \
        --temperature "${TEMPERATURE:-1.0}" \
        --batch_size "${BATCH_SIZE:-$((processes > 2 ? processes : 2))}" \
        --learning_rate "${LEARNING_RATE:-2.5e-5}" \
        --weight_decay "${WEIGHT_DECAY:-0.1}" \
        --num_train_epochs "${EPOCHS:-3}" \
        --warmup_steps "${WARMUP_STEPS:-50}" \
        --max_length "$MAX_LENGTH" \
        --gradient_checkpointing "${flags[@]}" \
        "${@:3}")
    note "[3/3] an answer of $2"
    (NPROC_PER_NODE=1 launch inference/generate.py --model_name_or_path "$2/final" --is_instruct \
        --prompt "${PROMPT:-What is the capital of France?}" \
        --method semi_autoregressive_padding --gen_length 128 --steps 128 --block_length 32)
}
