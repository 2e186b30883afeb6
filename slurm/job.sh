# shellcheck shell=bash
# What the batch scripts have in common; they read it, it does nothing by itself.
#
# What is known about the job comes from SLURM, what is known about the run from `python -m ddp_sgd.train` with the run's
# own options; what becomes of the job is decided by `python -m ddp_sgd.requeue`.

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
    local part times
    job=$SLURM_JOB_ID # in an array, the number of one task is that of the whole array
    [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    srun_pid='' stopping='' ending='' code=1
    trap 'stopping=yes; forward_stop' USR1
    trap 'stopping=yes; [[ $(job_state) == RUNNING ]] || ending=yes; [[ $ending ]] || forward_stop' TERM

    folder=$(here "$PYTHON" -m ddp_sgd.train --print_folder --print_timeout "$@") || exit # a wrong option ends the job here
    TIMEOUT_S=${folder##*$'\n'} folder=${folder%$'\n'*}
    logs=$folder.logs/$life
    if ! mkdir -p "$logs"; then
        printf 'ddp_sgd: error: %s cannot be written; set output_dir to a folder that you may write.\n' "$logs" >&2
        exit 73
    fi
    touch "$logs/begin"

    # Jobs that share a node have numbers of their own, and so ports; one that a stranger listens on is passed over.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    while (: <"/dev/tcp/localhost/$MASTER_PORT") 2>/dev/null; do ((MASTER_PORT += 1009)); done

    # 2(x2),1 -> 2 2 1: tasks of each node. Within a step SLURM says how many the step has.
    RANKS_OF_NODES=''
    for part in ${SLURM_TASKS_PER_NODE//,/ }; do
        [[ $part =~ ^([0-9]+)(\(x([0-9]+)\))?$ ]] || continue
        for ((times = ${BASH_REMATCH[3]:-1}; times > 0; times--)); do RANKS_OF_NODES+="${BASH_REMATCH[1]} "; done
    done

    export PYTHON MASTER_ADDR MASTER_PORT TIMEOUT_S RANKS_OF_NODES
    export LAUNCH_EXIT_CODE_FILE=$logs/exit_code # what ranks end with, should there be no result.json
    export SLURM_EXPORT_ENV=ALL                  # sbatch --export=NONE would reach the ranks, too
}

# launch COMMAND...: run a step of the job until rank 0 is through, and set code.
launch() {
    local word
    for word in + "$@"; do
        [[ $word == *$'\n'* ]] && word='...' # what each node does, it says itself
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
    local said=()
    [[ ! -s $logs/exit_code ]] || said=(--exit_code="$(<"$logs/exit_code")")
    here "$PYTHON" -m ddp_sgd.requeue "${said[@]}" --launcher_code="$code" --answer="$logs/requeue" \
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
        mv "$logs" "$folder/logs/job-$life"
        rmdir "$folder.logs" 2>/dev/null || true
        logs=$folder/logs/job-$life
    fi
    ((code == 0)) || echo "exit code $code; what every rank said is in $logs"
}
