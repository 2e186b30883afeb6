#!/usr/bin/env bash
# Train on several machines: call this once on each of them, with the same variables and options.
#
# usage: MASTER_ADDR=node1 launch/multinode.sh --nnodes N [--nproc N] [--max-restarts N] [--] [--key=value of
#        ddp_sgd.train]...
#
# This is python -m ddp_sgd.launch --nnodes, for a copy of the repository; PYTHON names the interpreter, else python.
# For options, variables, signals, logs and exit codes: python -m ddp_sgd.launch --help

set -euo pipefail

case ${1:-} in
-h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
esac
exec "${PYTHON:-python}" -m ddp_sgd.launch --nnodes="${NNODES:-}" "$@"
