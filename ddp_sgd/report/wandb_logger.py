"""Weights & Biases (W&B) logger: the trainer's, which starts a subprocess, and the run in W&B.

The logger can neither delay, hang nor stop training: all that touches wandb happens in the
subprocess (``wandb_follower``), and no row passes through a pipe. One pipe holds the request, and
is closed when the trainer has ended; another brings lines for the user.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

from ddp_sgd.config import RunConfig, WandbConfig, load_config
from ddp_sgd.console import fill_descriptors, silent_descriptors
from ddp_sgd.errors import ConfigError, DataError, ExitCode
from ddp_sgd.host import scaled
from ddp_sgd.report.journal import EventRow, RunRecord
from ddp_sgd.text import first_line

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 10.0
"""How long wandb may try its server, which takes under a second on a good link, before the run goes
offline."""

UPLOAD_TIMEOUT_S = 20.0
"""How long wandb may go on uploading at the end."""

FINISH_TIMEOUT_S = 30.0
"""How long the subprocess may run on when the trainer has ended: an upload that runs into
its limit (20 s), or a run that ends while its server is still being tried (10 s, 2 s to give up,
1 s to go offline), and room for the last rows."""

PROGRAM = "python -m ddp_sgd.report.wandb_follower"
"""How a user starts a follower."""

_FLUSH_INTERVAL_S = 0.2
"""How often wandb writes rows to its file; its own 15 s are what is read back and sent again."""

_MOST_ARGV = 4000
"""Characters of the command line that W&B shows: with them the pipe takes the request at once."""

_NICENESS = 10
"""Beside a rank that could use all of a CPU the subprocess gets a tenth of it."""

_HELD_BACK = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What a terminal or SLURM sends to all processes of a job; the trainer ends the subprocess."""

_OUTCOME = ("status", "exit_code", "weights_digest")

_ahead: list[subprocess.Popen[bytes]] = []
"""The subprocess that ``start_ahead`` has started, until a logger takes it."""


def start_ahead(config: WandbConfig) -> None:
    """Start the subprocess of the next run, so that it imports wandb while torch is being imported.

    Unless it is taken by a logger it ends with this process.
    """
    with suppress(OSError):  # the logger runs into the same error again
        if not _ahead and not is_disabled(config.mode):
            _ahead.append(_start_process())


class WandbLogger:
    """Logs a run to W&B, or to files for ``wandb sync`` where there is no server or no key.

    Args:
        config: Section ``wandb`` of the configuration.
        echo: Prints one plain line for the user; it is called from a thread of the logger's own.
    """

    def __init__(self, config: WandbConfig, *, echo: Callable[[str], None]) -> None:
        """Keep the configuration; nothing is started yet."""
        self._config = config
        self._print = echo
        self._process: subprocess.Popen[bytes] | None = None
        self._listener = Thread(target=self._listen, name="wandb lines", daemon=True)
        self._folder = Path()
        self._is_killed = False

    def start(self, record: RunRecord) -> None:
        """Start the subprocess that opens the run, unless W&B is disabled."""
        if is_disabled(self._config.mode):
            return
        self._folder = record.folder
        request = {
            "argv": sys.argv if sum(map(len, sys.argv)) < _MOST_ARGV else sys.argv[:1],
            "folder": str(record.folder.absolute()),
            "run_id": record.origin.run_id,
            "is_resumed": record.origin.has_rows,
            "init_timeout_s": scaled(INIT_TIMEOUT_S),
            "upload_timeout_s": scaled(UPLOAD_TIMEOUT_S),
        }
        try:
            self._process = _ahead.pop() if _ahead else _start_process()
            self._listener.start()
        except (OSError, RuntimeError) as error:  # the system has no process or thread left for us
            self._report(f"not started ({error}); metrics.jsonl has every row")
            self._kill()
            return
        with suppress(OSError):  # the subprocess is gone, and the listener reports it
            os.write(_stdin(self._process).fileno(), json.dumps(request).encode() + b"\n")

    def write(self, rows: Sequence[EventRow]) -> None:
        """Do nothing: the subprocess reads the rows from the journal."""

    def finish(self, result: Mapping[str, Any]) -> None:  # noqa: ARG002  it is in result.json
        """Close the run, and wait for that at most ``FINISH_TIMEOUT_S``."""
        if self._process is None:
            return
        limit_s = scaled(FINISH_TIMEOUT_S)
        _stdin(self._process).close()
        self._listener.join(limit_s)
        if self._listener.is_alive():
            self._report(f"not finished after {limit_s:g} s; complete it: {PROGRAM} {self._folder}")
            self._kill()

    def _report(self, text: str) -> None:
        self._print(f"W&B: {text}")

    def _listen(self) -> None:
        """Print lines of the subprocess until it ends, and how it ended unless by itself."""
        process = self._process
        if process is None or process.stdout is None:
            return
        with process.stdout as lines:
            for line in lines:
                self._report(line.decode(errors="replace").rstrip("\n"))
        code = process.wait()
        if code and not self._is_killed:
            self._report(
                f"stopped (its process ended with code {code}); training goes on, metrics.jsonl "
                "has every row"
            )

    def _kill(self) -> None:
        """End the subprocess, if there is one, in any state; wandb's helper follows it."""
        self._is_killed = True
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            _stdin(process).close()
            if process.stdout and self._listener.ident is None:  # else that one closes it
                process.stdout.close()


def _start_process() -> subprocess.Popen[bytes]:
    """Start the subprocess with this one's modules, without the signals that are for the trainer.

    Signals that are blocked stay blocked in a process that is started meanwhile.
    """
    fill_descriptors()
    work = "from ddp_sgd.report.wandb_follower import follow_trainer; follow_trainer()"
    path = list(map(str, sys.path))
    code = f"import os, sys; os.nice({_NICENESS}); sys.path[:] = {path}; {work}"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # A forked loader process would hold the pipe open for as long as it outlives a killed rank.
    os.register_at_fork(after_in_child=_stdin(process).close)
    return process


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdin is None:
        raise RuntimeError("the process was started without a pipe")
    return process.stdin


@dataclass(kw_only=True)
class WandbRun:
    """One attempt of a run in W&B: opened online or offline, and closed with its result.

    Args:
        folder: The run folder, as an absolute path; text, where it comes through a pipe.
        run_id: Identity of the run; W&B uses it, unless it has another one.
        is_resumed: Whether there are rows of an earlier attempt, which W&B may have.
        report: Prints a line for the user.
        mode: What to use instead of the mode of the configuration; None to use that.
        trainer: Process that trains, whose use of the machine W&B shows; None if it is elsewhere.
        init_timeout_s: How long wandb may try its server before the run goes offline.
        upload_timeout_s: How long wandb may go on uploading at the end.
    """

    folder: Path
    run_id: str
    is_resumed: bool
    report: Callable[[str], None]
    mode: str | None = None
    trainer: int | None = None
    init_timeout_s: float = field(default_factory=lambda: scaled(INIT_TIMEOUT_S))
    upload_timeout_s: float = field(default_factory=lambda: scaled(UPLOAD_TIMEOUT_S))

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self._config = load_config([f"--config={self.folder / 'config.yaml'}"], environ={})
        self._mode = self.mode or self._config.wandb.mode
        if self.trainer is None and self._mode == "disabled":  # while it trained
            self._mode = "auto"

    def open(self) -> "wandb.Run | None":
        """Start the run online or, where that fails, offline; None if the user disabled wandb."""
        import wandb

        settings = self._set_up()
        if settings.mode == "disabled" or is_disabled(self._mode):
            if self.trainer is None:
                raise ConfigError(
                    "W&B is disabled by WANDB_MODE, WANDB_DISABLED or wandb's settings file; give "
                    "--mode=online or --mode=offline."
                )
            return None
        arguments = self._init_arguments(settings)
        why = ""
        if settings.mode not in ("offline", "dryrun"):
            try:
                # Finds the key where wandb itself does, without a prompt or a request to a server.
                if wandb.login(prompt=False, verify=False):
                    run = wandb.init(**arguments)
                    self._opened(run, f"online, {run.url}")
                    return run
                why = " (no API key)"
            except Exception as error:  # any error: the run can go on offline
                why = f" ({first_line(error)})"
            tear_down()
            self._set_up()
        run = wandb.init(**arguments, mode="offline")
        folder = Path(run.dir).parent
        self._opened(run, f"offline{why}, in {folder}; send it later: wandb sync {folder}")
        return run

    def _set_up(self) -> "wandb.Settings":
        """Start wandb's helper, muted; returns the user's settings with the mode of ours on top.

        The helper logs to stderr where it cannot write to the home folder, hence the descriptors.
        """
        import wandb

        mode: dict[str, Any] = {} if self._mode == "auto" else {"mode": self._mode}
        with silent_descriptors():
            return wandb.setup(wandb.Settings(silent=True, **mode)).settings

    def _init_arguments(self, settings: "wandb.Settings") -> dict[str, Any]:
        """Give the arguments of ``wandb.init``; None leaves a value to the user's own settings."""
        import wandb

        config = self._config.wandb
        kept = kept_id(self.folder) if self.is_resumed else None
        own = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=self.init_timeout_s,
            finish_timeout=self.upload_timeout_s,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=_FLUSH_INTERVAL_S,
            x_stats_pid=self.trainer or os.getpid(),
            x_disable_stats=self.trainer is None,
            save_code=False,
            disable_code=True,
            disable_git=True,
            x_save_requirements=False,
        )
        return {
            "dir": None if os.environ.get("WANDB_DIR") else str(self.folder),
            "id": kept or (None if settings.run_id else self.run_id),
            # Also offline: `wandb sync` follows it, and appends the rows to those of before.
            "resume": "allow" if self.is_resumed else None,
            "allow_val_change": True,
            "project": config.project or (None if settings.project else "ddp_sgd"),
            "name": config.name or (None if settings.run_name else self._config.name),
            "entity": config.entity,
            "group": config.group,
            "tags": config.tags or None,
            "config": _shown(self._config, self.folder),
            "settings": own,
        }

    def _opened(self, run: "wandb.Run", text: str) -> None:
        """Keep what a resumed run needs, and name the axes."""
        (self.folder / "wandb" / "run_id").write_text(f"{run.id}\n", encoding="utf-8")
        run.define_metric("step")
        run.define_metric("samples")
        run.define_metric("*", step_metric="step")
        self.report(text)

    def close(self, run: "wandb.Run") -> None:
        """Write how the run ended, and upload what is left for at most ``upload_timeout_s``."""
        result: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            result = json.loads((self.folder / "result.json").read_bytes())
        run.summary.update({key: result[key] for key in _OUTCOME if key in result})
        if result.get("status") == "stopped":
            run.mark_preempting()  # with an exit code other than 0 W&B shows it as preempted
        try:
            run.finish(exit_code=result.get("exit_code", ExitCode.PEER.value))
        except TimeoutError:
            limit, folder = self.upload_timeout_s, wandb_file(run).parent
            self.report(f"not all sent after {limit:g} s; the rest: wandb sync {folder}")


def tear_down() -> None:
    """End wandb's helper and take away wandb's exit hook, in any state."""
    # BaseException: it leaves by sys.exit when the helper failed, which was reported.
    with suppress(BaseException):
        import wandb

        wandb.teardown()


def _shown(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Give what W&B shows as the configuration of the run."""
    try:
        plan = json.loads((folder / "plan.json").read_bytes())
        world_size = plan["world_size"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder / 'plan.json'} is not readable; name a run folder.") from error
    return {**config.model_dump(mode="json"), "plan": plan, "world_size": world_size}


def wandb_file(run: "wandb.Run") -> Path:
    """Return the file in which wandb keeps a run."""
    return Path(run.dir).parent / f"run-{run.id}.wandb"


def kept_id(folder: Path) -> str | None:
    """Read the id that W&B knows the run of a run folder by; None if none was kept."""
    try:
        return (folder / "wandb" / "run_id").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def is_disabled(mode: str) -> bool:
    """Whether ``wandb.mode`` or, where that is ``auto``, the environment disables W&B."""
    if mode != "auto":
        return mode == "disabled"
    is_off = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on")
    return is_off or os.environ.get("WANDB_MODE") == "disabled"
