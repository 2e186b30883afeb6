# shellcheck shell=bash
# What the batch scripts have in common; they read it, it does nothing by itself.
#
# What is known about the job and the run comes from `python -m ddp_sgd.requeue --prepare` with the run's own options; what
# becomes of the job is decided by `python -m ddp_sgd.requeue`. Here are the traps, and what calls SLURM.

PYTHON=${PYTHON:-python}
MAX_REQUEUES=${MAX_REQUEUES:-100}
read -ra CONTAINER <<<"${CONTAINER_ARGS:-}"

# here COMMAND...: run a command of the batch shell, in the container if there is one.
here() {
    if ((${#CONTAINER[@]})); then
        srun --nodes=1 --ntasks=1 --overlap "${CONTAINER[@]}" "$@"
    else
        "$@"
    fi
}

# prepare OPTION...: learn from SLURM where the ranks meet and how many there are, and from the run where its logs go.
prepare() {
    local facts
    job='' attempt='' folder='' logs='' srun_pid='' stopping='' ending='' code=1
    trap 'stopping=yes; forward_stop' USR1
    trap 'stopping=yes; [[ $(job_state) == RUNNING ]] || ending=yes; [[ $ending ]] || forward_stop' TERM

    # Within a step, as in a container, the variable holds the tasks of that step. A wrong option ends the job here.
    facts=$(here "$PYTHON" -m ddp_sgd.requeue --prepare --tasks_per_node="$SLURM_TASKS_PER_NODE" "$@") || exit
    [[ $facts == job=* ]] || { echo "$facts" && exit; } # the options ask for a text, and for no training
    eval "$facts"
    touch "$logs/begin" || exit 73 # whatever is older in the run folder belongs to an earlier attempt
    export PYTHON MASTER_ADDR MASTER_PORT TIMEOUT_S RANKS_OF_NODES LAUNCH_EXIT_CODE_FILE
    export SLURM_EXPORT_ENV=ALL # sbatch --export=NONE would reach the ranks, too
}

# launch COMMAND...: run a step of the job until rank 0 is through, and set code.
launch() {
    local word
    for word in + "$@"; do
        [[ $word == *$'\n'* ]] && word='...' # each node prints its own command
        printf '%q ' "$word"
    done
    echo
    "$@" &
    srun_pid=$!
    [[ ! $stopping ]] || forward_stop
    while is_up; do # a trap interrupts wait
        if [[ $ending ]]; then sleep 0.1; else wait "$srun_pid" && code=0 || code=$?; fi
    done
}

# is_up: whether to wait for the step. Where SLURM ends the job itself, it signals the ranks and gives us some seconds.
is_up() {
    kill -0 "$srun_pid" 2>/dev/null && ! [[ $ending && $folder/result.json -nt $logs/begin ]]
}

job_state() {
    squeue --noheader --jobs="$job" --format=%T
}

# forward_stop: let all ranks save and leave. srun passes on SIGUSR1; SIGTERM would make it kill them.
forward_stop() {
    [[ ! $srun_pid ]] || kill -USR1 "$srun_pid" 2>/dev/null || true
}

# conclude OPTION...: requeue the job if the run is to go on, and exit with the code of the run.
conclude() {
    local left=()
    [[ ! -s $logs/exit_code ]] || left=(--exit_code="$(<"$logs/exit_code")")
    here "$PYTHON" -m ddp_sgd.requeue "${left[@]}" --launcher_code="$code" --answer="$logs/requeue" \
        --job_state="$(job_state)" --max_requeues="$MAX_REQUEUES" "$@"
    code=$?
    answer=$(cat "$logs/requeue" 2>/dev/null)
    keep_logs
    case $answer in
    now) requeue ;;
    later) # SLURM requeues the job without the dead node, once it has noticed; if none is dead, we do
        wait_s=$(scontrol show config | awk '$1 == "SlurmdTimeout" { print int($3 * 4 / 3) + 10 }')
        echo "a node may be dead; the job goes back into the queue within $wait_s s"
        sleep "$wait_s" &
        wait $!
        [[ $ending ]] || requeue
        ;;
    esac
    exit "$code"
}

# requeue: put the job, or this task of an array, back into the queue; SLURM then ends this script.
requeue() {
    if scontrol requeue "$job"; then
        sleep 60 &
        wait $!
    else
        echo "ddp_sgd: error: job $job cannot be requeued; submit it again, it goes on where it was saved." >&2
    fi
}

# keep_logs: the run folder is rank 0's to make, so the logs began beside it; they move in if it was made or entered.
keep_logs() {
    if [[ $folder/metrics.jsonl -nt $logs/begin ]] && mkdir -p "$folder/logs"; then
        mv "$logs" "$folder/logs/job-$attempt"
        rmdir "$folder.logs" 2>/dev/null || true
        logs=$folder/logs/job-$attempt
    fi
    ((code == 0)) || echo "exit code $code; the output of every rank is in $logs"
}
