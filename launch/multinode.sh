#!/usr/bin/env bash
# Train on several machines: call this once on each of them, with the same variables and options.
#
# usage: MASTER_ADDR=node1 launch/multinode.sh --nnodes N [--nproc N] [--max-restarts N] [--] [--key=value of
#        ddp_sgd.train]...
#
#   --nnodes N        number of machines, or MIN:MAX for a run that machines may leave and join; else NNODES
#   --nproc N         processes on this machine; else NPROC, else its number of GPUs, else 2 (1 on a single CPU)
#   --max-restarts N  times that all processes are started again after a failure; else MAX_RESTARTS, else 0, or 10 with
#                     MIN:MAX, where a machine that leaves ends the processes of the others
#
#   MASTER_ADDR  name of the machine where all meet, as the others see it; not localhost
#   MASTER_PORT  free port on it; else 29400
#   RUN_ID       word that tells this run from others at the same port; else its name
#   NODE_RANK    0 on MASTER_ADDR, above 0 elsewhere; only needed where a machine does not know its own name
#
# PYTHON names the interpreter, else python. If machines do not find each other by their host names, set PET_LOCAL_ADDR
# to the address of each. Machines wait for each other for runtime.timeout_s seconds. Signals and logs are those of
# launch/local.sh; with MIN:MAX a signal takes this machine out, and the others go on. See docs/restarts.md.
#
# Exit code: that of the run, as result.json has it, on every machine, with or without a shared disk; the folder is made by
# rank 0. 69 if this machine finds no others or loses them, or if its torchrun was killed and no restart is left.

set -euo pipefail

# shellcheck source=launch/torchrun.sh
source "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh"

nnodes=${NNODES:-} nproc=${NPROC:-} restarts=${MAX_RESTARTS:-}
while (($#)); do
    case $1 in
    -h | --help) usage "$0" && exit ;;
    --nnodes=* | --nproc=* | --max-restarts=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --nnodes) nnodes=${2-none} && shift $(($# > 1 ? 2 : 1)) ;;
    --nproc) nproc=${2-none} && shift $(($# > 1 ? 2 : 1)) ;;
    --max-restarts) restarts=${2-none} && shift $(($# > 1 ? 2 : 1)) ;;
    --) shift && break ;;
    *) break ;;
    esac
done

[[ $nnodes ]] || fail "NNODES is not set; set it to the number of machines, such as NNODES=2."
number='^[1-9][0-9]*(:[1-9][0-9]*)?$' # in a variable, since bash 3.2 of macOS takes no ( in place of it
[[ $nnodes =~ $number ]] ||
    fail "NNODES is '$nnodes'; set a number of machines, such as NNODES=2, or MIN:MAX, such as NNODES=2:4."
[[ ${MASTER_ADDR:-} ]] ||
    fail "MASTER_ADDR is not set; set it, on every machine, to the name of the one where all meet, such as node1."
[[ ${MASTER_PORT:=29400} =~ ^[1-9][0-9]*$ ]] ||
    fail "MASTER_PORT is '$MASTER_PORT'; set a port that is free on $MASTER_ADDR, such as MASTER_PORT=29400."
[[ ${NODE_RANK:-0} =~ ^[0-9]+$ ]] ||
    fail "NODE_RANK is '$NODE_RANK'; set 0 on $MASTER_ADDR and 1, 2, ... elsewhere, or unset it."

MEETING="$nnodes machines at $MASTER_ADDR:$MASTER_PORT"
REMEDY="start this on every machine, with the same MASTER_ADDR, MASTER_PORT and RUN_ID, which no other run has, and see \
that the port is open."
# torchrun would host the meeting where it takes MASTER_ADDR for itself, and else, or if the port is taken, join whatever
# meets there: so say which it is.
place=$("$PYTHON" -c 'if 1:
    import sys
    from ddp_sgd.distributed.rendezvous import whereabouts
    print(whereabouts(sys.argv[1]))' "$MASTER_ADDR")
case $place in
loopback) REMEDY="$MASTER_ADDR is another machine on every host; set MASTER_ADDR to the name of one, as the others see it." ;;
unknown) REMEDY="this host does not know $MASTER_ADDR; set MASTER_ADDR to a name that every host knows, or add it to /etc/hosts." ;;
here) RDZV_CONF='is_host=1' ;;
elsewhere) RDZV_CONF='is_host=0' ;;
esac
[[ -z ${NODE_RANK:-} ]] || RDZV_CONF="is_host=$((NODE_RANK == 0))"
restarts=${restarts:-$([[ $nnodes == *:* ]] && echo 10 || echo 0)}

train_under_torchrun "${nproc:-$(count_processes)}" "$restarts" --nnodes="$nnodes" --rdzv-backend=c10d \
    --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" -- "$@"
