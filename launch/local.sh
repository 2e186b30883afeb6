#!/usr/bin/env bash
# Train on this machine, with one process for each GPU: of NVIDIA, AMD (ROCm) or Intel (XPU).
#
# usage: launch/local.sh [--nproc N] [--max-restarts N] [--] [--key=value of ddp_sgd.train]...
#
#   --nproc N         number of processes; else NPROC, else the number of GPUs, else 2 (1 on a single CPU)
#   --max-restarts N  times that all processes are started again after a failure; else 0
#
# PYTHON names the interpreter, else python. OMP_NUM_THREADS is shared fairly if unset. SIGTERM, SIGINT, SIGHUP and
# SIGUSR1 end the run between two steps.
#
# Exit code: that of the run, as result.json has it; see docs/troubleshooting.md. While the run lasts, the output of
# every process is in OUTPUT_DIR/NAME.logs.*, afterwards in logs/ of the run folder. For the keys of the configuration:
# python -m ddp_sgd.train --help

set -euo pipefail

# shellcheck source=launch/torchrun.sh
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"

nproc=${NPROC:-}
restarts=0
while (($#)); do
    case $1 in
    -h | --help) usage "$0" && exit ;;
    --nproc=* | --max-restarts=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --nproc) nproc=${2-none} && shift $(($# > 1 ? 2 : 1)) ;;
    --max-restarts) restarts=${2-none} && shift $(($# > 1 ? 2 : 1)) ;;
    --) shift && break ;;
    *) break ;;
    esac
done

train_under_torchrun "${nproc:-$(count_processes)}" "$restarts" --standalone -- "$@"
