"""The launcher, started from tests, and the processes below it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import commands
from commands import name_of
from limits import WAIT_S, scaled

from ddp_sgd.errors import DataError
from ddp_sgd.host import free_port
from ddp_sgd.report.journal import read_journal

ROOT = Path(__file__).parent.parent
LOCAL = ROOT / "launch" / "local.sh"
MULTINODE = ROOT / "launch" / "multinode.sh"


def environment(**extra):
    """The environment of a script: ours, without what a launcher or a user may have set.

    And without coverage, which makes a start half as long again: other tests go through the same
    lines of the package.
    """
    foreign = ("SLURM_", "DDP_SGD_", "PET_", "MASTER_", "NODE_", "COV")
    named = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NPROC", "NNODES", "RUN_ID", "MAX_RESTARTS")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and name not in named
    }
    ours = {
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "DDP_SGD_WANDB__MODE": "disabled",
        "DDP_SGD_RUNTIME__DEVICE": "cpu",
    }
    return kept | ours | extra


class Launch:
    """A launcher that is under way; what it says goes to files: orphans may hold a pipe open.

    Args:
        folder: Where it is started; the run folder is ``runs/digits`` below.
        script: Whose command it is; the scripts themselves are tested in ``launch/test_main.py``.
        options: Of the script, and then of the run.
        variables: Environment.
    """

    def __init__(self, folder, script, *options, **variables):
        self._said = folder / f"said-{free_port()}.txt"
        self.run_folder = folder / "runs" / "digits"
        where = {LOCAL: "--standalone", MULTINODE: f"--nnodes={variables.get('NNODES', '')}"}[
            script
        ]
        with self._said.open("w") as said:
            self.script = commands.Popen(
                [sys.executable, "-m", "ddp_sgd.launch", where, *options],
                cwd=folder,
                env=environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    @property
    def said(self):
        return self._said.read_text()

    @property
    def agent(self):
        """Process of torchrun."""
        below = [pid for pid in children(self.script.pid) if is_torchrun(pid)]
        return below[0] if below else None

    @property
    def ranks(self):
        """Processes by rank."""
        agent = self.agent
        names = {pid: name_of(pid) for pid in (children(agent) if agent else [])}
        return {int(name[5:]): pid for pid, name in names.items() if name.startswith("rank ")}

    def rows(self, event="train"):
        try:
            rows = read_journal(self.run_folder / "metrics.jsonl")
        except DataError:  # not there yet
            return []
        return [row for row in rows if row["event"] == event]

    def rows_since(self, instant):
        return [row for row in self.rows() if row["time"] > instant]

    def result(self):
        return json.loads((self.run_folder / "result.json").read_text())

    def wait_until(self, holds, *, deadline_s=WAIT_S):
        deadline = time.monotonic() + deadline_s
        while not (found := holds()):
            assert self.script.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)
        return found

    def end(self, *, deadline_s=WAIT_S):
        return self.script.wait(deadline_s)

    def clean_up(self):
        """End it as a user would; whatever is left after that is killed."""
        if self.script.poll() is None:
            pids = [self.agent, *self.ranks.values()]
            self.script.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.script.wait(scaled(30))
            for pid in filter(None, [*pids, self.script.pid]):
                kill(pid)


def kill(pid, number=signal.SIGKILL):
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def is_alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def has_signal(pid, field, number):
    """Whether a signal is in a set of /proc/PID/status, such as SigCgt, those with a handler."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def is_torchrun(pid):
    with suppress(OSError):
        is_real = "ddp_sgd.torchrun" in Path(f"/proc/{pid}/cmdline").read_text()
        return is_real or name_of(pid) == "torchrun"
    return False


def children(parent):
    """Processes that a process has started, but for servers of ``commands``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[1] == str(parent):
                found.append(int(path.parent.name))
    return [pid for pid in found if name_of(pid) != commands.SERVER]
