# shellcheck shell=bash
# What local.sh and multinode.sh have in common; they read it, it does nothing by itself.

PYTHON=${PYTHON:-python}

# fail MESSAGE: one line and the code of a wrong call.
fail() {
    printf 'ddp_sgd: error: %s\n' "$1" >&2
    exit 64
}

# usage FILE: the comment at the head of a script.
usage() {
    sed -n '2,/^$/s/^#\( \|$\)//p' "$1"
}

count_cpus() {
    nproc 2>/dev/null || getconf _NPROCESSORS_ONLN
}

# One process for each GPU. Without any: two, since that is what these scripts are for, but not more than CPUs.
count_processes() {
    local gpus=0 cpus
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[0-9GM]' || true)
    elif command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    fi
    cpus=$(count_cpus)
    echo $((gpus > 0 ? gpus : cpus < 2 ? 1 : 2))
}

# train_under_torchrun NPROC [FLAG OF TORCHRUN]... -- [OPTION OF ddp_sgd.train]...: train, and exit with the run's code.
train_under_torchrun() {
    local nproc=$1 flags=() folder logs agent code=0 signalled='' again=yes
    while shift && [[ $1 != -- ]]; do flags+=("$1"); done
    shift
    [[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "the number of processes is '$nproc'; set NPROC=2, for example."
    if [[ " $* " =~ \ (-h|--help|--print_config)[=\ ] ]]; then exec "$PYTHON" -m ddp_sgd.train "$@"; fi
    folder=$("$PYTHON" -m ddp_sgd.train --print_folder "$@") # a wrong configuration ends here

    # The run folder is rank 0's to make, so the logs begin beside it, and move in when the run is over.
    if ! mkdir -p "${folder%/*}" || ! logs=$(mktemp -d "$folder.logs.XXXXXX"); then
        printf 'ddp_sgd: error: %s cannot be written; set output_dir to a folder that you may write.\n' "$folder" >&2
        exit 73
    fi
    touch "$logs/start" # whatever is older in the run folder belongs to an earlier run

    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((nproc < $(count_cpus) ? $(count_cpus) / nproc : 1))}
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restart must not read addresses of the attempt before
    # Every flag of torchrun has such a variable; a release that lacks the flag does not mind the variable.
    # Only one rank speaks, so lines need no name in front; torchrun takes the shortest that is not empty.
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:- }
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}

    # In a process group of its own torchrun gets a signal once, from here, and not a second time from the terminal.
    set -m
    "$PYTHON" -m torch.distributed.run --nproc-per-node="$nproc" "${flags[@]}" \
        --log-dir="$logs" --tee=3 -m ddp_sgd.train "$@" &
    agent=$!
    set +m
    # A second signal would end torchrun at once and leave ranks behind, so only the first is passed on.
    trap 'again=yes; [[ $signalled ]] || { signalled=yes; kill -TERM "$agent" 2>/dev/null || true; }' TERM INT HUP USR1
    while [[ $again ]]; do # a trap interrupts wait
        again='' code=0
        wait "$agent" || code=$?
    done

    if [[ $folder/result.json -nt $logs/start ]]; then
        code=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["exit_code"])' "$folder/result.json")
        mkdir -p "$folder/logs"
        mv "$logs"/*/ "$folder/logs/"
        rm -r "$logs"
        logs=$folder/logs
    elif [[ $signalled ]]; then
        code=75 # it came before the ranks could write anything
    fi
    ((code == 0)) || echo "$0: exit code $code; what every rank said is in $logs" >&2
    exit "$code"
}
