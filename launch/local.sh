#!/usr/bin/env bash
# Train on this machine, with one process for each GPU: of NVIDIA, AMD (ROCm) or Intel (XPU).
#
# usage: launch/local.sh [--nproc N] [--max-restarts N] [--] [--key=value of ddp_sgd.train]...
#
# This is python -m ddp_sgd.launch --standalone, for a copy of the repository; PYTHON names the interpreter, else python.
# For options, signals, logs and exit codes: python -m ddp_sgd.launch --help

set -euo pipefail

case ${1:-} in
-h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
esac
exec "${PYTHON:-python}" -m ddp_sgd.launch --standalone "$@"
