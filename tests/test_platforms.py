"""What differs between systems: names of the standard library that Linux has and macOS has not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment
from limits import WAIT_S

ROOT = Path(__file__).resolve().parents[1]

WITHOUT_LINUX = """
import fcntl, os, resource, select, signal, socket, time

def forget(module, *names):
    for name in [name for name in vars(module) if name.startswith(names)]:
        delattr(module, name)

forget(os, "posix_fallocate", "posix_fadvise", "POSIX_FADV_", "sched_", "SCHED_BATCH", "SCHED_IDLE")
forget(os, "memfd_create", "MFD_", "eventfd", "EFD_", "pidfd_open", "copy_file_range", "splice")
forget(os, "pipe2", "fdatasync", "getrandom", "O_DIRECT", "O_TMPFILE", "O_PATH")
forget(fcntl, "F_SETPIPE_SZ", "F_GETPIPE_SZ", "F_ADD_SEALS", "F_GET_SEALS")
forget(signal, "sigtimedwait", "sigwaitinfo", "SIGRT", "SIGPWR", "SIGSTKFLT", "SIGPOLL")
forget(socket, "SOCK_CLOEXEC", "SOCK_NONBLOCK", "TCP_USER_TIMEOUT", "AF_NETLINK", "SO_BINDTODEVICE")
forget(select, "epoll", "EPOLL")
forget(resource, "prlimit")
forget(time, "CLOCK_BOOTTIME")
"""
"""Run by every interpreter of the run at its start: the processes that write have it, too."""


@pytest.fixture
def without_linux(tmp_path):
    """An environment whose Python lacks what only Linux has."""
    folder = tmp_path / "start"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(WITHOUT_LINUX)
    given = environment()
    return given | {"PYTHONPATH": f"{folder}:{given['PYTHONPATH']}"}


def run(command, folder, variables):
    done = subprocess.run(
        command,
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_python_really_lacks_them(without_linux, tmp_path):
    code = "import os, fcntl; print(hasattr(os, 'posix_fallocate'), hasattr(fcntl, 'F_SETPIPE_SZ'))"
    assert run([sys.executable, "-c", code], tmp_path, without_linux) == "False False\n"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_without_what_only_linux_has_saves_and_goes_on(ranks, without_linux, tmp_path):
    if ranks == 1:
        command = [sys.executable, "-m", "ddp_sgd.train"]
    else:
        command = [str(ROOT / "launch" / "local.sh"), "--nproc", str(ranks)]
    said = ""
    for epochs in (1, 2):
        said += run([*command, f"--epochs={epochs}"], tmp_path, without_linux)
    result = json.loads((tmp_path / "runs" / "digits" / "result.json").read_text())
    assert (result["status"], result["epoch"]) == ("finished", 2)
    assert "warning" not in said.lower()
    listed = run(
        [sys.executable, "-m", "ddp_sgd.checkpoint", "verify", "runs/digits"],
        tmp_path,
        without_linux,
    )
    assert "whole" in listed or "ok" in listed.lower(), listed
