"""The run of a launcher: torchrun, its restarts, and the exit code in the end. No torch."""

import os
import sys
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from ddp_sgd.checkpointing.store import FOLDER_NAME, CheckpointFolder
from ddp_sgd.config import load_config
from ddp_sgd.console import report_error, say_error
from ddp_sgd.distributed.cpus import usable_cpus
from ddp_sgd.distributed.launcher_files import EXIT_CODE_FILE
from ddp_sgd.errors import DataError, ExitCode, UserError
from ddp_sgd.launch.options import LaunchOptions
from ddp_sgd.launch.run_files import RunFiles
from ddp_sgd.launch.torchrun import (
    Attempt,
    Ending,
    Evidence,
    Rendezvous,
    StopSignals,
    Torchrun,
    decide,
)
from ddp_sgd.report.folder_lock import FolderLock
from ddp_sgd.report.journal import read_journal
from ddp_sgd.report.run_folder import BEGINNINGS, result_from_rows, write_result
from ddp_sgd.time_limits import scaled

_ASKS_FOR_TEXT = ("-h", "--help", "--print_config")
_POLL_S = 0.1
_STOPPED_LINE = "the run was stopped while it was starting again; start it again to go on."


def launch(options: LaunchOptions, environ: Mapping[str, str], stop: StopSignals) -> int:
    """Train under torchrun, with restarts, and return the exit code of the run.

    Args:
        options: What the user asked for.
        environ: Environment variables; the run gets them, and some more.
        stop: Signals that ask to stop.

    Raises:
        ConfigError: The configuration of the run is at fault.
        OutputError: The logs cannot be written.
    """
    if any(option.partition("=")[0] in _ASKS_FOR_TEXT for option in options.train):
        # It asks for a text, and for no training.
        os.execv(sys.executable, [sys.executable, "-m", "ddp_sgd.train", *options.train])
    config = load_config(options.train, environ)
    files = RunFiles(Path(config.output_dir) / config.name)
    timeout_s = ceil(config.runtime.timeout_s)
    attempt = Attempt(returncode=0, has_begun=False)
    if not stop.is_requested:
        attempt = _run_with_restarts(options, environ, files, timeout_s, stop)
    return _final_code(
        attempt,
        files,
        _rendezvous(options, timeout_s),
        is_alone=options.nodes is None,
        is_stopped=stop.is_requested,
    )


def torchrun_flags(options: LaunchOptions, name: str, logs: Path, timeout_s: int) -> list[str]:
    """Build the flags of torchrun, but for ``--max-restarts`` and the program.

    torchrun waits for other machines as long as ranks wait for each other, instead of 600 s; it
    counts a machine as lost after 10 s of silence instead of 15, and goes on with fewer 10 s later
    instead of 30. It tries twice to reach the host of the rendezvous.

    Args:
        options: What the user asked for.
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
    nodes = options.nodes
    place = ["--standalone"]
    own_id = []
    if nodes is not None:
        place = [f"--nnodes={nodes.count}", "--rdzv-backend=c10d"]
        place.append(f"--rdzv-endpoint={nodes.address}:{nodes.port}")
        own_id = [f"--rdzv-id={nodes.run_id or name}"]
        if nodes.is_host is not None:
            conf["is_host"] = int(nodes.is_host)
    return [
        *place,
        f"--nproc-per-node={options.nproc}",
        f"--rdzv-conf={','.join(f'{key}={value}' for key, value in conf.items())}",
        f"--log-dir={logs}",
        "--tee=3",
        *own_id,
    ]


def torchrun_environment(
    environ: Mapping[str, str], nproc: int, cpus: int, exit_code_file: Path
) -> dict[str, str]:
    """Build the environment of torchrun; what the user has set stays.

    Args:
        environ: Environment variables of the launcher.
        nproc: Processes on this machine.
        cpus: CPUs that this machine has for them.
        exit_code_file: Where rank 0 leaves its exit code, should it leave no ``result.json``.
    """
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cpus // nproc)),
        # One rank prints, so lines need no name in front; torchrun takes no empty text for that.
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": " ",
        # Every flag has such a variable; a release of torchrun that lacks the flag ignores it.
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    }
    ours = {
        EXIT_CODE_FILE: str(exit_code_file),
        # A restart must not read the addresses of the attempt before.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    unset = {name: value for name, value in defaults.items() if not environ.get(name)}
    return {**environ, **unset, **ours}


def _run_with_restarts(
    options: LaunchOptions,
    environ: Mapping[str, str],
    files: RunFiles,
    timeout_s: int,
    stop: StopSignals,
) -> Attempt:
    """Start torchrun, again and again where it is killed or loses its host; return the last."""
    torchrun = Torchrun(
        files,
        timeout_s=timeout_s,
        has_restarts=options.max_restarts > 0,
        is_alone=options.nodes is None,
        is_elastic=options.nodes is not None and options.nodes.is_elastic,
    )
    flags = torchrun_flags(options, files.folder.name, files.logs, timeout_s)
    ours = torchrun_environment(environ, options.nproc, usable_cpus(), files.exit_code)
    for restarts in range(options.max_restarts + 1):
        left = options.max_restarts - restarts
        program = (f"--max-restarts={left}", "-m", "ddp_sgd.train", *options.train)
        attempt = torchrun.run([*flags, *program], ours, stop)
        if attempt.is_killed and (left or stop.is_requested):
            _let_workers_save(files, stop)
        if not attempt.is_restarted(restarts_left=left, is_stopped=stop.is_requested):
            break
        number = f"{restarts + 1} of {options.max_restarts}"
        say_error(f"ddp_sgd: {attempt.loss}; it is started again ({number})")
        files.forget_results()
        ours["LAUNCH_RESTART_COUNT"] = str(restarts + 1)
    return attempt


def _let_workers_save(files: RunFiles, stop: StopSignals) -> None:
    """Wait until the workers of a torchrun that was killed have saved, which they do unasked."""
    files.forget_results()
    deadline = monotonic() + scaled(15.0)
    while files.result() is None and not stop.is_urgent and monotonic() < deadline:
        sleep(_POLL_S)


def _final_code(
    attempt: Attempt,
    files: RunFiles,
    rendezvous: Rendezvous,
    *,
    is_alone: bool,
    is_stopped: bool,
) -> int:
    """Report how the run ended, put its logs in place, and return its exit code."""
    is_stopped = is_stopped or attempt.ending is Ending.STOPPED
    end = decide(attempt, _gather(files, is_stopped=is_stopped), rendezvous)
    if end.error:
        report_error(end.error)
    has_result = end.is_from_result
    if end.code == ExitCode.STOPPED and is_alone and not has_result:
        has_result = restore_stop_result(files)
    if has_result:
        files.move_into_run_folder()
    elif end.code == ExitCode.DONE or (is_stopped and not files.attempts()):
        files.remove()  # nothing was left to do, or nothing was begun
    if end.code != ExitCode.DONE and files.logs.exists():
        say_error(f"ddp_sgd: exit code {end.code}; the output of every rank is in {files.logs}")
    return end.code


def _gather(files: RunFiles, *, is_stopped: bool) -> Evidence:
    """Read what the run left; an attempt that was stopped does not end with the failure before."""
    result = files.result() or {}
    code = result.get("exit_code")
    if is_stopped and code not in (ExitCode.DONE, ExitCode.STOPPED) and files.is_result_outdated():
        code = None
    return Evidence(
        result_code=code,
        left_code=files.left_code(),
        is_reported=files.has_reported(),
        is_stopped=is_stopped,
    )


def restore_stop_result(files: RunFiles) -> bool:
    """Write result.json for a run that was stopped while torchrun was starting it again.

    The workers of the attempt before have ended, those of the next one may not have come so far as
    to write it, but may have removed the last one.

    Args:
        files: Files of the launch.

    Returns:
        Whether it was written: the run began, and no other run has its folder.
    """
    result = _find_stop_result(files) if files.has_begun() else None
    if result is None:
        return False
    try:
        lock = FolderLock(files.folder, patience_s=0.0)
    except (OSError, UserError):
        return False
    try:
        write_result(files.folder / "result.json", result)
    except UserError as error:
        report_error(error)
        return False
    finally:
        lock.release()
    return True


def _find_stop_result(files: RunFiles) -> dict[str, Any] | None:
    """Find where the run goes on: at its newest checkpoint, whose result may have been seen."""
    try:
        rows = read_journal(files.folder / "metrics.jsonl")
        manifests = CheckpointFolder(files.folder / FOLDER_NAME).manifests()
    except DataError:
        return None
    if not any(row["event"] in BEGINNINGS for row in rows):
        return None
    header = manifests[-1].header if manifests else None
    seen = files.stop_result
    if seen and (header is None or seen["samples"] == header.samples):
        return seen
    result = result_from_rows(rows, exit_code=ExitCode.STOPPED, error=_STOPPED_LINE)
    if header is None:
        return {**result, "step": 0, "epoch": 0.0, "samples": 0}
    epoch = header.epoch + header.position / header.plan["samples_per_epoch"]
    return {**result, "step": header.step, "epoch": epoch, "samples": header.samples}


def _rendezvous(options: LaunchOptions, timeout_s: int) -> Rendezvous:
    """Describe where the machines meet, for an error."""
    nodes = options.nodes
    if nodes is None:
        return Rendezvous(timeout_s=timeout_s)
    return Rendezvous(
        name=f"{nodes.count} machines at {nodes.address}:{nodes.port}",
        remedy=nodes.remedy,
        timeout_s=timeout_s,
        address=nodes.address,
        port=nodes.port,
    )
