"""Launcher: train on this machine or on several, with one process for each GPU, by torchrun.

usage: python -m ddp_sgd.launch [--nproc N] [--nnodes N | --standalone] [--max-restarts N] [--]
       [--key=value of ddp_sgd.train]...

  --nproc N         processes on this machine; else NPROC, else the number of its GPUs (NVIDIA,
                    AMD by ROCm, Intel by XPU), else 2 (1 on a single CPU)
  --nnodes N        number of machines, or MIN:MAX for a run that machines may leave and join; else
                    NNODES, else this machine alone
  --standalone      this machine alone, whatever NNODES is
  --max-restarts N  times that all processes are started again after a failure; else MAX_RESTARTS,
                    else 0, or 10 with MIN:MAX, where a machine that leaves ends the processes of
                    the others

On several machines call this once on each of them, with the same options and variables:

  MASTER_ADDR  name of the machine where all meet, as the others see it; not localhost
  MASTER_PORT  free port on it; else 29400
  RUN_ID       word that tells this run from others at the same port; else its name
  NODE_RANK    0 on MASTER_ADDR, above 0 elsewhere; only needed where a machine does not know its
               own name

If machines do not find each other by their host names, set PET_LOCAL_ADDR to the address of each.
Machines wait for each other for runtime.timeout_s seconds. OMP_NUM_THREADS is shared fairly if
unset. SIGTERM, SIGINT, SIGHUP and SIGUSR1 end the run between two steps; with MIN:MAX they take
this machine out, and the others go on. A second Ctrl-C ends all processes at once (130).

Exit code: that of the run, as result.json has it, on every machine; 69 if this machine finds no
others or loses them, or if its torchrun was killed and no restart is left. While the run lasts, the
output of every process is in OUTPUT_DIR/NAME.logs.*, afterwards in logs/ of the run folder.

For the keys of the configuration: python -m ddp_sgd.train --help
"""

import os
import sys
from collections.abc import Sequence

from ddp_sgd.cli import exit_code_of
from ddp_sgd.console import deliver, outlive_console
from ddp_sgd.launch.torchrun import StopSignals


def main(argv: Sequence[str] | None = None, stop: StopSignals | None = None) -> int:
    """Launch a run, and return its exit code.

    Args:
        argv: Arguments after the name of the command; None takes those of the process.
        stop: Signals that ask to stop; None listens to none.
    """
    argv = sys.argv[1:] if argv is None else argv
    stop = stop or StopSignals()

    def work() -> int:
        # The handlers are there by now: what takes longer to import comes after them.
        from ddp_sgd.launch.options import read_options
        from ddp_sgd.launch.run import launch

        options = read_options(argv, os.environ)
        if options is None:
            deliver(f"{__doc__}")
            return 0
        return launch(options, os.environ, stop)

    return exit_code_of(work, debug="--debug" in argv)


if __name__ == "__main__":
    signals = StopSignals()
    signals.listen()
    outlive_console()
    sys.exit(main(stop=signals))
