# shellcheck shell=bash
# What local.sh and multinode.sh have in common; they read it, it starts nothing by itself.

# A console that is gone, as after "| head", must neither end the script nor change its exit code.
trap '' PIPE

PYTHON=${PYTHON:-python}
RDZV_CONF=''                   # more settings of the rendezvous
MEETING='torchrun on one host' # who waits for whom, in an error
REMEDY='start it again.'
FACTOR=${DDP_SGD_TIMEOUT_FACTOR:-1} FACTOR=${FACTOR%%.*} # of the waits that are fixed below, in whole numbers
[[ $FACTOR =~ ^[1-9][0-9]*$ ]] || FACTOR=1

tell() {
    printf 'ddp_sgd: error: %s\n' "$1" >&2 || true
}

# fail MESSAGE: one line and the code of a wrong call.
fail() {
    tell "$1"
    exit 64
}

# usage FILE: the comment at the head of a script.
usage() {
    sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

# nproc counts no more CPUs than OMP_NUM_THREADS says.
count_cpus() {
    env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN
}

# One process for each GPU. Without any: two, since that is what these scripts are for, but not more than CPUs.
count_processes() {
    local gpus cpus
    gpus=$(count_gpus)
    cpus=$(count_cpus)
    echo $((gpus > 0 ? gpus : cpus < 2 ? 1 : 2))
}

# count_gpus: those that this shell may use, of NVIDIA (CUDA), AMD (ROCm) or Intel (XPU).
count_gpus() {
    local name named gpus=''
    # SLURM sets all of these, whatever the GPUs are, and a user narrows one of them: the least counts.
    for name in CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES ZE_AFFINITY_MASK; do
        [[ -n ${!name+set} ]] || continue
        named=$(tr ',' '\n' <<<"${!name}" | grep -c '^[0-9GM]' || true)
        if [[ ! $gpus ]] || ((named < gpus)); then gpus=$named; fi
    done
    if [[ ! $gpus ]] && command -v nvidia-smi >/dev/null; then
        gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
        ((gpus)) || gpus='' # its driver is missing, or the GPUs are others
    fi
    # Tools of the others differ by release; torch knows what it can use, but takes seconds to import.
    if [[ ! $gpus ]] && may_have_gpus; then
        gpus=$("$PYTHON" -c 'import torch; print(torch.accelerator.device_count())' 2>/dev/null | tail -n 1) || true
    fi
    [[ $gpus =~ ^[0-9]+$ ]] || gpus=0
    echo "$gpus"
}

# may_have_gpus: whether there is a driver of ROCm or XPU, or a tool of theirs.
may_have_gpus() {
    [[ -e /dev/kfd ]] || compgen -G '/dev/dri/render*' >/dev/null ||
        command -v rocm-smi amd-smi rocminfo xpu-smi sycl-ls >/dev/null
}

# run_torchrun FLAG...: run it to its end, and set code. Reads folder and logs; sets signalled.
run_torchrun() {
    local watcher again=yes begun
    begun=$(count_attempts)
    touch "$logs/life"
    rm -f "$logs/torchrun.json" "$logs/exit_code" "$logs/stuck" "$logs/spare" "$logs/entered"
    # In a process group of its own torchrun gets a signal once, from here, and not a second time from the terminal.
    set -m
    TORCHELASTIC_ERROR_FILE=$logs/torchrun.json "$PYTHON" -c 'if 1:
        import pathlib, sys
        from torch.distributed.run import main
        pathlib.Path(sys.argv.pop(1)).touch() # the time of importing is over
        main()' "$logs/entered" "$@" &
    agent=$!
    set +m
    watch_torchrun "$agent" </dev/null &>/dev/null &
    watcher=$!
    # A second signal would end torchrun at once and leave ranks behind, so only the first is passed on.
    trap 'again=yes; [[ $signalled ]] || { signalled=yes; [[ ! $agent ]] || kill -TERM "$agent" 2>/dev/null || true; }' TERM INT HUP USR1
    [[ ! $signalled ]] || kill -TERM "$agent" || true # it came between two lives
    while [[ $again ]]; do                            # a trap interrupts wait
        again='' code=0
        wait "$agent" || code=$?
    done
    agent=''
    kill "$watcher" 2>/dev/null || true
}

# watch_torchrun PID: end a torchrun that starts all processes again, where the run is not to go on, or that waits in vain:
# as a spare machine of a run that needs none, or for the answer of a host that is gone, which it does without a timeout.
watch_torchrun() {
    local waiting=$SECONDS left=$SECONDS
    while sleep 0.5 && kill -0 "$1"; do
        is_spare || waiting=$SECONDS
        has_left "$1" || left=$SECONDS
        if has_restarted "$folder/failures.jsonl" '"gives_up": true' ||
            { [[ $alone ]] && has_restarted "$folder/result.json" '"exit_code": 75'; }; then
            kill -TERM "$1"
            return
        elif ((SECONDS - waiting > timeout_s + 10 * FACTOR)); then
            touch "$logs/spare"
            kill -TERM "$1"
            return
        elif ((SECONDS - left > (restarts > 0 ? timeout_s + 20 * FACTOR : 5 * FACTOR))); then
            touch "$logs/stuck"
            kill -KILL "$1"
            return
        fi
    done
}

# is_spare: whether torchrun waits for others, though the number of machines is fixed. It counts, since an attempt may begin
# in the same second, which is all that bash 3.2 sees of the age of a file.
is_spare() {
    [[ -e $logs/entered && ${nnodes:-} != *:* ]] && (($(count_attempts) <= begun))
}

# count_attempts: how many attempts of this script have begun.
count_attempts() {
    local attempts=("$logs"/*/attempt_*/)
    if [[ -d ${attempts[0]} ]]; then echo "${#attempts[@]}"; else echo 0; fi
}

# has_left PID: whether the processes of a torchrun have ended with an error, and no others were started.
has_left() {
    [[ -s $logs/exit_code && $(<"$logs/exit_code") != 0 ]] && ! has_begun_after "$logs/exit_code" && ! has_ranks "$1"
}

# has_ranks PID: whether a torchrun has a process that lives; always, where /proc does not tell.
has_ranks() {
    local child children state
    [[ -r /proc/$1/task/$1/children ]] || return 0
    children=$(cat "/proc/$1"/task/*/children)
    for child in $children; do
        read -r _ state _ < <(sed 's/.*) /- /' "/proc/$child/stat") || continue
        [[ $state == Z ]] || return 0
    done
    return 1
}

# has_restarted FILE TEXT: whether FILE, written since the start, says TEXT, and an attempt began after that.
has_restarted() {
    [[ $1 -nt $logs/start ]] && grep -q "$2" "$1" && has_begun_after "$1"
}

# has_begun_after FILE: whether an attempt of this script is younger than FILE.
has_begun_after() {
    local attempt
    for attempt in "$logs"/*/attempt_*/; do
        [[ ! $attempt -nt $1 ]] || return 0
    done
    return 1
}

# why_lost: what became of torchrun, if it ended for another reason than the run; else nothing.
why_lost() {
    local name=''
    ((code <= 128)) || name=$(kill -l "$code")
    if [[ -e $logs/stuck ]]; then
        echo "torchrun lost the machine where all meet"
    elif [[ $name && " HUP INT QUIT USR1 TERM " != *" $name "* ]]; then
        echo "torchrun was ended by SIG$name"
    elif has_begun_after "$logs/life" && grep -qs RendezvousConnectionError "$logs/torchrun.json"; then
        echo "torchrun lost the machine where all meet"
    fi
}

# let_ranks_leave: wait until the processes of a torchrun that was killed have saved; they find out by themselves.
let_ranks_leave() {
    local tries
    touch "$logs/lost"
    for ((tries = 0; tries < 75 * FACTOR; tries++)); do
        [[ ! $folder/result.json -nt $logs/lost && ! $signalled ]] || break
        sleep 0.2
    done
}

# asks_only OPTION...: whether the options ask for a text, and for no training.
asks_only() {
    local option
    for option; do
        case $option in
        -h | --help | --print_config | -h=* | --help=* | --print_config=*) return 0 ;;
        esac
    done
    return 1
}

# train_under_torchrun NPROC RESTARTS [FLAG OF TORCHRUN]... -- [OPTION OF ddp_sgd.train]...: train, and exit with the
# run's code. If torchrun is killed, it is started again, RESTARTS times at most; and so it starts the processes.
train_under_torchrun() {
    local nproc=$1 restarts=$2 flags=() folder timeout_s logs alone='' code=0 signalled='' lives=0 why='' conf agent=''
    trap 'signalled=yes' TERM INT HUP USR1 # until there is a torchrun to pass it on to
    while shift && [[ $2 != -- ]]; do flags+=("$2"); done
    shift 2
    [[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "the number of processes is '$nproc'; set NPROC=2, for example."
    [[ $restarts =~ ^[0-9]+$ ]] || fail "--max-restarts is '$restarts'; give a number, such as --max-restarts=3."
    if asks_only "$@"; then exec "$PYTHON" -m ddp_sgd.train "$@"; fi
    folder=$("$PYTHON" -m ddp_sgd.train --print_folder --print_timeout "$@") # a wrong configuration ends here
    timeout_s=${folder##*$'\n'} folder=${folder%$'\n'*}

    # The run folder is rank 0's to make, so the logs begin beside it, and move in when the run is over.
    if ! mkdir -p "${folder%/*}" || ! logs=$(mktemp -d "$folder.logs.XXXXXX"); then
        tell "$folder cannot be written; set output_dir to a folder that you may write."
        exit 73
    fi
    touch "$logs/start" # whatever is older in the run folder belongs to an earlier run

    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((nproc < $(count_cpus) ? $(count_cpus) / nproc : 1))}
    export LAUNCH_EXIT_CODE_FILE=$logs/exit_code # what rank 0 ends with, should it leave no result.json
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a restart must not read addresses of the attempt before
    # Every flag of torchrun has such a variable; a release that lacks the flag does not mind the variable.
    # Only one rank speaks, so lines need no name in front; torchrun takes the shortest that is not empty.
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=${TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE:- }
    export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}

    # torchrun waits for other machines as long as ranks wait for each other, instead of 600 s; and it believes a machine
    # lost after 10 s of silence instead of 15, and goes on with fewer 10 s later instead of 30. It tries twice to reach
    # the place where all meet.
    conf=join_timeout=$timeout_s,read_timeout=$(((timeout_s + 1) / 2)),last_call_timeout=$((timeout_s < 10 ? timeout_s : 10))
    conf+=,keep_alive_interval=2,keep_alive_max_attempt=5${RDZV_CONF:+,$RDZV_CONF}
    flags+=(--nproc-per-node="$nproc" --rdzv-conf="$conf" --log-dir="$logs" --tee=3)
    if [[ " ${flags[*]} " == *" --standalone "* ]]; then alone=yes; else flags+=(--rdzv-id="${RUN_ID:-${folder##*/}}"); fi

    while [[ ! $signalled ]]; do
        run_torchrun "${flags[@]}" --max-restarts=$((restarts - lives)) -m ddp_sgd.train "$@"
        why=$(why_lost)
        if [[ ! $why ]] || ((++lives > restarts)); then break; fi
        echo "$0: $why; it is started again ($lives of $restarts)" >&2 || true
        [[ ! $why =~ SIG ]] || let_ranks_leave # else torchrun has ended them
        touch "$logs/start"
        export LAUNCH_RESTART_COUNT=$lives
    done
    conclude
}

# conclude: exit with the code of the run, or with the best that is known.
conclude() {
    local attempts told=''
    ! grep -rqs --include=stderr.log 'ddp_sgd: error: ' "$logs" || told=yes
    if [[ $why && ! -e $logs/stuck && ! $signalled ]]; then
        [[ $told ]] || tell "$why; its processes save and end by themselves, start it again."
        code=69
    elif [[ $folder/result.json -nt $logs/start ]]; then
        code=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["exit_code"])' "$folder/result.json")
        attempts=("$logs"/*/)
        mkdir -p "$folder/logs"
        [[ ! -d ${attempts[0]} ]] || mv "${attempts[@]}" "$folder/logs/"
        rm -r "$logs"
        logs=$folder/logs
    elif [[ -s $logs/exit_code && ! $signalled ]]; then
        code=$(<"$logs/exit_code")
        ((code)) || rm -r "$logs" # nothing was left to do
    elif [[ $signalled ]]; then
        code=75 # it came before the ranks could write anything
    elif grep -qs EADDRINUSE "$logs/torchrun.json"; then
        tell "port $MASTER_PORT on $MASTER_ADDR is held by another program; set MASTER_PORT to a free one, the same on every machine."
        code=69
    elif [[ -e $logs/spare ]] || grep -qs 'Rendezvous[A-Za-z]*Error' "$logs/torchrun.json"; then
        tell "$MEETING did not come together within $timeout_s s; $REMEDY"
        code=69
    elif ((code == 1)); then
        code=$(grep -os 'exitcode *: [1-9][0-9]*' "$logs/torchrun.json" | grep -om 1 '[0-9]*$' || echo 1)
    fi
    ((code == 0)) || echo "$0: exit code $code; what every rank said is in $logs" >&2 || true
    exit "$code"
}
