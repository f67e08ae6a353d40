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
    where+=(--nproc-per-node="${NPROC_PER_NODE:-${NUM_GPUS:-$(count_gpus)}}")
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
    if [[ -n ${PRINT_OUTPUT_DIR:-} ]]; then
        printf '%s\n' "$output_dir"
        exit 0
    fi
    launch --signals-to-handle=SIGTERM,SIGUSR1,SIGHUP --shutdown-timeout="${SHUTDOWN_TIMEOUT:-300}" \
        --max-restarts="${MAX_RESTARTS:-3}" "$1" --output_dir "$output_dir" "${@:2}"
}
