"""Two starts of one run on two hosts that share its folder."""

import subprocess
import sys
import time
from contextlib import suppress

import pytest
from launching import environment
from network.hosts import result_in, two_hosts

from ddp_sgd.errors import ExitCode
from ddp_sgd.report.folder_lock import LOCK_NAME, OWNER_NAME, RENEW_S, SILENT_RENEWALS

pytestmark = pytest.mark.timeout(300)
LIMIT_S = 120


class Start:
    """``python -m ddp_sgd.train`` on a host, without a launcher, in a folder that both share."""

    def __init__(self, host, folder, **variables):
        patience = f"{{pause_s: 1, until: {folder / 'hurry'}}}"
        words = ["--epochs=10", "--log.every_steps=1", "--name=x"]
        words.append(f"--model={{class_path: user_code.Slow, init_args: {patience}}}")
        self.folder = folder / "runs" / "x"
        self._process = subprocess.Popen(
            host.command("env", f"--chdir={folder}", sys.executable, "-m", "ddp_sgd.train", *words),
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_it_trains(self):
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(OSError):
                if '"event": "train"' in (self.folder / "metrics.jsonl").read_text():
                    return
            time.sleep(0.02)
        pytest.fail("it does not train")

    def clean_up(self):
        """Close the pipe of one that died with its host."""
        self._process.communicate(timeout=LIMIT_S)

    def end(self):
        """Give the exit code and the errors."""
        _, errors = self._process.communicate(timeout=LIMIT_S)
        return self._process.returncode, errors


@pytest.fixture
def hosts(tmp_path):
    with two_hosts(tmp_path) as network:
        yield network.hosts


@pytest.fixture
def start(hosts, tmp_path):
    """Start the run on one of the hosts; all that is left ends with its host."""
    runs = []

    def begin(host, **variables):
        runs.append(Start(host, tmp_path, **variables))
        return runs[-1]

    yield begin
    for host in hosts:
        host.power_off()
    for run in runs:
        run.clean_up()


def hide_lock(folder):
    """Make the lock one that a second host does not see, as on a file system without locks."""
    copy = folder / "copy"
    copy.write_bytes(b"")
    copy.rename(folder / LOCK_NAME)


@pytest.mark.parametrize("is_lock_seen", [True, False])
def test_the_second_start_is_refused_and_names_the_host_of_the_first(
    is_lock_seen, hosts, start, tmp_path
):
    first = start(hosts[0])
    first.wait_until_it_trains()
    if not is_lock_seen:
        hide_lock(first.folder)
    for resume in ("auto", "never"):
        second = start(hosts[1], DDP_SGD_RESUME=resume)
        code, errors = second.end()
        assert code == ExitCode.REFUSED, errors
        assert errors.startswith("ddp_sgd: error: runs/x is in use by process ")
        assert " on node1, last seen " in errors
        assert errors.endswith(" s ago; wait for its end, or choose another name.\n")
        assert errors.count("\n") == 1
    (tmp_path / "hurry").touch()
    code, errors = first.end()
    assert code == ExitCode.DONE, errors
    assert result_in(first.folder)["status"] == "finished"
    assert not (first.folder / OWNER_NAME).exists()


@pytest.mark.parametrize("job", [None, "45"])
def test_a_run_of_a_host_that_died_goes_on_elsewhere(job, hosts, start, tmp_path):
    """At once as the next life of the same SLURM job; else when the note has been silent."""
    named = {"SLURM_JOB_ID": job} if job else {}
    first = start(hosts[0], **named)
    first.wait_until_it_trains()
    hosts[0].power_off()
    first.end()
    assert (first.folder / OWNER_NAME).exists()
    (tmp_path / "hurry").touch()
    begin = time.monotonic()
    if job:
        named["SLURM_RESTART_COUNT"] = "1"
    code, errors = start(hosts[1], **named).end()
    assert code == ExitCode.DONE, errors
    assert result_in(first.folder)["status"] == "finished"
    if not job:
        assert time.monotonic() - begin >= SILENT_RENEWALS * RENEW_S
