import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from limits import WAIT_S

from ddp_sgd.errors import ExitCode, RefusedError
from ddp_sgd.report import folder_lock as module
from ddp_sgd.report.folder_lock import LOCK_NAME, OWNER_NAME, FolderLock, Owner, OwnerWatch

HOLD = (
    "import sys; from pathlib import Path; "
    "from ddp_sgd.report import folder_lock as module; module.RENEW_S = float(sys.argv[2]); "
    "lock = module.FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read(); "
    "lock.release()"
)
OTHER_HOST = {"host": "elsewhere", "boot": "1-2-3", "pid": 7, "job": None, "restarts": 0}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Waits as in life, a tenth as long; tests wait for what happens, not for these."""
    monkeypatch.setattr(module, "_PATIENCE_S", 1.0)
    monkeypatch.setattr(module, "RENEW_S", 0.5)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hold():
    """Start a process that holds a folder and renews its note; all end with the test."""
    started = []

    def start(folder, *, renew_s=0.2, host=None):
        command = [sys.executable, "-c", HOLD, str(folder), str(renew_s)]
        if host:
            if os.geteuid() != 0:
                pytest.skip("another host name needs root")
            script = f'hostname {host} && exec "$0" "$@"'
            command = ["unshare", "--uts", "--", "sh", "-c", script, *command]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(WAIT_S)
        process.stdin.close()
        process.stdout.close()


def out_of_reach(folder):
    """Have a lock that is held no effect on who comes now, as on a file system without them."""
    path = folder / LOCK_NAME
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


def leave_note(folder, **changes):
    note = {**OTHER_HOST, "token": "0a1b2c3d", "renewed": 0.0, **changes}
    (folder / OWNER_NAME).write_text(json.dumps(note))


def test_a_note_names_the_owner_and_goes_with_it(tmp_path):
    lock = FolderLock(tmp_path)
    note = json.loads((tmp_path / OWNER_NAME).read_text())
    assert note["pid"] == os.getpid()
    assert note["host"] == os.uname().nodename
    assert note["job"] is None
    assert abs(note["renewed"] - time.time()) < 60
    lock.release()
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    assert (tmp_path / LOCK_NAME).read_bytes() == b""


def test_a_note_is_renewed(tmp_path):
    lock = FolderLock(tmp_path)
    before = (tmp_path / OWNER_NAME).read_bytes()
    deadline = time.monotonic() + 60
    while (tmp_path / OWNER_NAME).read_bytes() in (before, b""):
        assert time.monotonic() < deadline
    lock.release()


def test_who_has_the_lock_is_named(tmp_path, hold, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "45")
    process = hold(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(RefusedError) as caught:
        FolderLock(tmp_path)
    host = os.uname().nodename
    start, end = str(caught.value).split(", last seen ")
    assert start == f"{tmp_path} is in use by process {process.pid} of job 45 on {host}"
    assert end.endswith(" s ago; wait for its end, or choose another name.")
    assert 0 <= float(end.split()[0]) < 60
    assert caught.value.exit_code == ExitCode.REFUSED


def test_the_lock_alone_is_enough(tmp_path, hold):
    hold(tmp_path, renew_s=1000)
    (tmp_path / OWNER_NAME).unlink()
    with pytest.raises(RefusedError, match="is in use by a run that is going on; wait for its"):
        FolderLock(tmp_path)


def test_the_note_alone_is_enough_where_locks_do_not_reach(tmp_path, hold):
    process = hold(tmp_path, host="node7")
    out_of_reach(tmp_path)
    with pytest.raises(RefusedError, match=f"in use by process {process.pid} on node7, last seen"):
        FolderLock(tmp_path)
    process.communicate(timeout=WAIT_S)  # the first was not disturbed, and leaves nothing behind
    assert process.returncode == 0
    assert not (tmp_path / OWNER_NAME).exists()
    FolderLock(tmp_path).release()


def test_an_owner_that_leaves_is_waited_for(tmp_path, hold, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 120.0)
    process = hold(tmp_path, host="node7")
    out_of_reach(tmp_path)
    process.stdin.close()
    FolderLock(tmp_path).release()
    assert process.wait(WAIT_S) == 0


def test_a_host_that_died_is_waited_for_and_then_gives_way(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 0.0)
    leave_note(tmp_path)
    start = time.monotonic()
    lock = FolderLock(tmp_path)
    assert time.monotonic() - start >= module.SILENT_RENEWALS * module.RENEW_S
    assert json.loads((tmp_path / OWNER_NAME).read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "x"}', "7", "\xff"])
def test_a_note_that_says_nothing_is_none_of_a_run_that_renews_it(text, tmp_path):
    (tmp_path / OWNER_NAME).write_text(text)
    FolderLock(tmp_path).release()
    assert not (tmp_path / OWNER_NAME).exists()


def _patience_is_for_others(monkeypatch):
    """Make a wait for a note so long that the test would run into its limit."""
    monkeypatch.setattr(module, "RENEW_S", 1000.0)


def test_a_run_that_was_killed_here_gives_way_at_once(tmp_path, hold, monkeypatch):
    process = hold(tmp_path)
    process.kill()
    process.wait(WAIT_S)
    assert (tmp_path / OWNER_NAME).exists()
    _patience_is_for_others(monkeypatch)
    FolderLock(tmp_path).release()


def test_the_next_life_of_a_job_need_not_wait(tmp_path, monkeypatch):
    leave_note(tmp_path, job="45", restarts=1)
    _patience_is_for_others(monkeypatch)
    monkeypatch.setenv("SLURM_JOB_ID", "45")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    FolderLock(tmp_path).release()


@pytest.mark.parametrize(
    ("job", "restarts", "succeeds"),
    [("45", 2, True), ("45", 1, False), ("45", 0, False), ("46", 2, False), (None, 2, False)],
)
def test_only_a_later_life_of_the_same_job_succeeds(job, restarts, succeeds):
    before = Owner("a", "", 1, "45", 1, "x")
    assert Owner("b", "", 1, job, restarts, "y").succeeds(before) == succeeds
    assert not Owner("b", "", 1, None, 1, "y").succeeds(before._replace(job=None, restarts=0))


def test_who_was_suspended_too_long_finds_out(tmp_path):
    lock = FolderLock(tmp_path)
    lock.check()
    leave_note(tmp_path)
    deadline = time.monotonic() + 60
    with pytest.raises(RefusedError, match="in use by process 7 on elsewhere now, which took it"):
        while time.monotonic() < deadline:
            lock.check()
    lock.release()
    assert json.loads((tmp_path / OWNER_NAME).read_text())["pid"] == 7


def test_a_process_that_was_forked_changes_nothing(tmp_path):
    lock = FolderLock(tmp_path)
    if (child := os.fork()) == 0:
        lock.release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / OWNER_NAME).exists()
    with pytest.raises(RefusedError):
        FolderLock(tmp_path)
    lock.release()


def test_a_folder_that_was_moved_aside_keeps_no_note(tmp_path):
    (tmp_path / "x").mkdir()
    lock = FolderLock(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "x.1")
    lock.follow(tmp_path / "x.1")
    lock.release()
    assert [path.name for path in (tmp_path / "x.1").iterdir()] == [LOCK_NAME]


@pytest.mark.parametrize("name", [LOCK_NAME, OWNER_NAME])
def test_a_link_in_the_way_is_not_followed(name, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / name).symlink_to(precious)
    with pytest.raises(RefusedError, match=rf"x/{name} is a link; remove it, or choose another"):
        FolderLock(folder)
    assert precious.read_text() == "precious"


def test_the_kernel_is_known_on_linux():
    path = Path("/proc/sys/kernel/random/boot_id")
    if not path.exists():
        pytest.skip("no /proc")
    assert Owner.here({}).boot == path.read_text().strip()


def test_a_run_is_alive_until_it_ends(tmp_path, hold):
    assert not OwnerWatch(tmp_path).is_alive()
    run = hold(tmp_path)
    watch = OwnerWatch(tmp_path)
    assert watch.is_alive()
    assert not watch.wait_for_end(0.0)
    run.communicate(b"\n", timeout=WAIT_S)
    assert watch.wait_for_end(0.0)


def test_a_run_that_was_killed_on_this_host_is_dead_at_once(tmp_path, hold, monkeypatch):
    monkeypatch.setattr(module, "RENEW_S", 1e6)
    run = hold(tmp_path)
    watch = OwnerWatch(tmp_path)
    assert watch.is_alive()
    run.kill()
    run.wait(WAIT_S)
    assert not watch.is_alive()


def test_a_run_on_another_host_is_dead_when_its_note_is_not_renewed(tmp_path, monkeypatch):
    leave_note(tmp_path)
    watch = OwnerWatch(tmp_path)
    assert watch.is_alive()
    leave_note(tmp_path, renewed=1.0)
    monkeypatch.setattr(module, "RENEW_S", 0.0)
    assert not watch.is_alive()
    monkeypatch.setattr(module, "RENEW_S", 1e6)
    assert watch.is_alive()


def test_a_folder_that_is_out_of_reach_says_nothing_about_its_run(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "_read", fail)
    assert OwnerWatch(tmp_path).is_alive()
