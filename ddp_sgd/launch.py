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
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from time import monotonic, sleep

from ddp_sgd.cli import exit_code_of
from ddp_sgd.console import deliver, outlive_console, report_error, say_error
from ddp_sgd.errors import ConfigError, ExitCode
from ddp_sgd.host import count_gpus, scaled, usable_cpus, whereabouts
from ddp_sgd.run_files import RunFiles
from ddp_sgd.torchrun import Attempt, End, Ending, Rendezvous, StopSignals, Torchrun, decide

_ASKS_FOR_TEXT = ("-h", "--help", "--print_config")
_WITH_VALUE = ("--nnodes", "--nproc", "--max-restarts")
_PORT = "29400"
_ELASTIC_RESTARTS = "10"
"""Where machines come and go, each that leaves ends the processes of the others."""
_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """Parsed options of the launcher.

    Args:
        nproc: Processes on this machine.
        max_restarts: Times that all processes are started again after a failure.
        rendezvous: Where the machines meet.
        train: Options of ``ddp_sgd.train``.
    """

    nproc: int
    max_restarts: int
    rendezvous: Rendezvous
    train: tuple[str, ...]


def main(argv: Sequence[str] | None = None, stop: StopSignals | None = None) -> int:
    """Launch a run, and return its exit code.

    Args:
        argv: Arguments after the name of the command; None takes those of the process.
        stop: Signals that request a stop; None handles none.
    """
    argv = sys.argv[1:] if argv is None else argv

    def work() -> int:
        options = read_options(argv, os.environ)
        if options is None:
            deliver(f"{__doc__}")
            return 0
        return launch(options, os.environ, stop or StopSignals())

    return exit_code_of(work, debug="--debug" in argv)


def launch(options: LaunchOptions, environ: Mapping[str, str], stop: StopSignals) -> int:
    """Train under torchrun, with restarts, and return the exit code of the run.

    Args:
        options: Parsed options of the launcher.
        environ: Environment variables; the run gets them, and some more.
        stop: Signals that request a stop.

    Raises:
        ConfigError: The configuration of the run is at fault.
        OutputError: The logs cannot be written.
    """
    if any(option.partition("=")[0] in _ASKS_FOR_TEXT for option in options.train):
        os.execv(sys.executable, [sys.executable, "-m", "ddp_sgd.train", *options.train])
    from ddp_sgd.config import load_config  # takes longer to import than a signal can wait

    config = load_config(options.train, environ)
    files = RunFiles(Path(config.output_dir) / config.name)
    timeout_s = ceil(config.runtime.timeout_s)
    attempt = Attempt(returncode=0, has_begun=False)
    if not stop.is_requested:
        attempt = _run_with_restarts(options, environ, files, timeout_s, stop)
    is_stopped = stop.is_requested or attempt.ending is Ending.STOPPED
    code = (files.result() or {}).get("exit_code")
    if is_stopped and code not in (ExitCode.DONE, ExitCode.STOPPED) and files.is_result_outdated():
        code = None  # the failure of an attempt before
    end = decide(
        attempt,
        options.rendezvous,
        timeout_s,
        result_code=code,
        left_code=files.left_code(),
        is_reported=files.has_reported(),
        is_stopped=is_stopped,
    )
    _report_end(end, files, may_restore=options.rendezvous.is_standalone, is_stopped=is_stopped)
    return end.code


def _report_end(end: End, files: RunFiles, *, may_restore: bool, is_stopped: bool) -> None:
    """Report how the run ended, and put its logs in place."""
    if end.error:
        report_error(end.error)
    has_result = end.is_from_result
    is_lost = not has_result or files.result() is None  # the next attempt may have removed it
    if end.code == ExitCode.STOPPED and may_restore and is_lost:
        has_result = files.restore_stop_result() or has_result
    if has_result:
        files.move_into_run_folder()
    elif end.code == ExitCode.DONE or (is_stopped and not files.attempts()):
        files.remove()  # nothing was left to do, or nothing was begun
    if end.code != ExitCode.DONE and files.logs.exists():
        say_error(f"ddp_sgd: exit code {end.code}; the output of every rank is in {files.logs}")


def _run_with_restarts(
    options: LaunchOptions,
    environ: Mapping[str, str],
    files: RunFiles,
    timeout_s: int,
    stop: StopSignals,
) -> Attempt:
    """Start torchrun, again and again where it is killed or loses its host; return the last."""
    rendezvous, nproc, left = options.rendezvous, options.nproc, options.max_restarts
    torchrun = Torchrun(files, rendezvous, timeout_s, has_restarts=left > 0)
    flags = torchrun_flags(rendezvous, nproc, files.folder.name, files.logs, timeout_s)
    ours = torchrun_environment(environ, nproc, usable_cpus())
    while True:
        program = (f"--max-restarts={left}", "-m", "ddp_sgd.train", *options.train)
        attempt = torchrun.run([*flags, *program], ours, stop)
        if attempt.is_killed and (left or stop.is_requested):
            _let_workers_save(files, stop)
        if attempt.loss is None or left == 0 or stop.is_requested:
            return attempt
        left -= 1
        number = options.max_restarts - left
        restart = f"it is started again ({number} of {options.max_restarts})"
        say_error(f"ddp_sgd: {attempt.loss}; {restart}")
        files.forget_results()
        ours["LAUNCH_RESTART_COUNT"] = str(number)


def _let_workers_save(files: RunFiles, stop: StopSignals) -> None:
    """Wait until the workers of a torchrun that was killed have saved, which they do unasked."""
    files.forget_results()
    deadline = monotonic() + scaled(15.0)
    while files.result() is None and not stop.is_urgent and monotonic() < deadline:
        sleep(_POLL_S)


def torchrun_flags(
    rendezvous: Rendezvous, nproc: int, name: str, logs: Path, timeout_s: int
) -> list[str]:
    """Build the flags of torchrun, but for ``--max-restarts`` and the program.

    torchrun waits for other machines as long as ranks wait for each other, instead of 600 s; it
    counts a machine as lost after 10 s of silence instead of 15, and goes on with fewer 10 s later
    instead of 30. It tries twice to reach the host of the rendezvous.

    Args:
        rendezvous: Where the machines meet.
        nproc: Processes on this machine.
        name: Name of the run.
        logs: Folder for the output of every process.
        timeout_s: How long machines wait for each other.
    """
    conf = {
        "join_timeout": timeout_s,
        "read_timeout": (timeout_s + 1) // 2,
        "last_call_timeout": min(timeout_s, 10),
        "keep_alive_interval": 2,
        "keep_alive_max_attempt": 5,
    }
    if rendezvous.is_host is not None:
        conf["is_host"] = int(rendezvous.is_host)
    flags = [
        f"--nproc-per-node={nproc}",
        f"--rdzv-conf={','.join(f'{key}={value}' for key, value in conf.items())}",
        f"--log-dir={logs}",
        "--tee=3",
    ]
    if rendezvous.is_standalone:
        return ["--standalone", *flags]
    return [
        f"--nnodes={rendezvous.nodes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={rendezvous.address}:{rendezvous.port}",
        f"--rdzv-id={rendezvous.run_id or name}",
        *flags,
    ]


def torchrun_environment(environ: Mapping[str, str], nproc: int, cpus: int) -> dict[str, str]:
    """Build the environment of torchrun; what the user has set stays."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cpus // nproc)),
        # One rank prints, so lines need no name in front; torchrun takes no empty text for that.
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": " ",
        # Every flag has such a variable; a release of torchrun that lacks the flag ignores it.
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    }
    unset = {name: value for name, value in defaults.items() if not environ.get(name)}
    # A restart must not read the addresses of the attempt before.
    return {**environ, **unset, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def read_options(argv: Sequence[str], environ: Mapping[str, str]) -> LaunchOptions | None:
    """Read the options of the launcher, which come before those of ``ddp_sgd.train``.

    Returns:
        The options; None if help was requested.

    Raises:
        ConfigError: An option or a variable is at fault, or one is missing.
    """
    given, train = _split(argv)
    if "--help" in given:
        return None
    nodes = None if "--standalone" in given else given.get("--nnodes", environ.get("NNODES"))
    rendezvous = Rendezvous() if nodes is None else _read_rendezvous(nodes, environ)
    nproc = given.get("--nproc", environ.get("NPROC", ""))
    nproc = nproc or str(count_gpus(environ) or min(2, usable_cpus()))
    restarts = given.get("--max-restarts", environ.get("MAX_RESTARTS", ""))
    restarts = restarts or (_ELASTIC_RESTARTS if rendezvous.is_elastic else "0")
    _check("the number of processes", nproc, "[1-9][0-9]*", "set NPROC=2, for example.")
    _check("--max-restarts", restarts, "[0-9]+", "give a number, such as --max-restarts=3.")
    return LaunchOptions(
        nproc=int(nproc), max_restarts=int(restarts), rendezvous=rendezvous, train=tuple(train)
    )


def _read_rendezvous(nodes: str, environ: Mapping[str, str]) -> Rendezvous:
    """Read where several machines meet."""
    if not nodes:
        raise ConfigError("NNODES is not set; set it to the number of machines, such as NNODES=2.")
    remedy = "set a number of machines, such as NNODES=2, or MIN:MAX, such as NNODES=2:4."
    _check("NNODES", nodes, "[1-9][0-9]*(:[1-9][0-9]*)?", remedy)
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT") or _PORT
    if not address:
        raise ConfigError(
            "MASTER_ADDR is not set; set it, on every machine, to the name of the one where all "
            "meet, such as node1."
        )
    remedy = f"set a port that is free on {address}, such as MASTER_PORT={_PORT}."
    _check("MASTER_PORT", port, "[1-9][0-9]*", remedy)
    rank = environ.get("NODE_RANK", "")
    _check("NODE_RANK", rank, "[0-9]*", f"set 0 on {address} and 1, 2, ... elsewhere, or unset it.")
    is_host, remedy = _locate(address)
    return Rendezvous(
        nodes=nodes,
        address=address,
        port=port,
        run_id=environ.get("RUN_ID", ""),
        is_host=int(rank) == 0 if rank else is_host,
        remedy=remedy,
    )


def _check(name: str, value: str, pattern: str, remedy: str) -> None:
    if not re.fullmatch(pattern, value):
        raise ConfigError(f"{name} is {value!r}; {remedy}")


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the arguments into options of the launcher, by name, and those of the run."""
    given: dict[str, str] = {}
    rest = list(argv)
    while rest:
        name, equals, value = rest[0].partition("=")
        if rest[0] == "--":
            return given, rest[1:]
        if rest[0] in ("-h", "--help"):
            return {"--help": ""}, []
        if rest[0] == "--standalone":
            given[rest.pop(0)] = ""
        elif name in _WITH_VALUE:
            del rest[0]
            given[name] = value if equals else rest.pop(0) if rest else "none"
        else:
            break
    return given, rest


def _locate(address: str) -> tuple[bool | None, str]:
    """Find out whether this machine hosts the rendezvous, and what to do if no machine is there.

    torchrun would host it where it takes the address for its own, and else, or if the port is
    taken, join any rendezvous there: so ``is_host`` is set.
    """
    where = whereabouts(address)
    if where == "loopback":
        name = "set MASTER_ADDR to the name of one, as the others see it."
        return None, f"{address} is another machine on every host; {name}"
    if where == "unknown":
        name = "set MASTER_ADDR to a name that every host knows, or add it to /etc/hosts."
        return None, f"this host does not know {address}; {name}"
    return where == "here", (
        "start this on every machine, with the same MASTER_ADDR, MASTER_PORT and RUN_ID, which no "
        "other run has, and see that the port is open."
    )


if __name__ == "__main__":
    signals = StopSignals()
    signals.listen()
    outlive_console()
    sys.exit(main(stop=signals))
