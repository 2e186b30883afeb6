"""Machines in one: namespaces with a name, a network and processes of their own.

What a machine starts dies with it.
"""

import os
import shutil
import subprocess
from pathlib import Path

from limits import WAIT_S

NAMESPACES = ("--mount", "--uts", "--ipc", "--pid", "--net")
UNSHARE = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc")
BOOT = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
# Names from that file only: each question that no name server answers costs seconds.
[ ! -e /etc/nsswitch.conf ] || mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o mode=1777 shm /dev/shm
ip link set lo up
echo up
read -r _ # bash waits for orphans meanwhile, as the first process must
"""


class Machine:
    """A machine; ``run`` does a command on it.

    Args:
        name: Its host name.
        folder: Holds ``hosts`` and ``nsswitch.conf``, which it sees as its own.
    """

    def __init__(self, name, folder):
        self.name = name
        self._process = subprocess.Popen(
            [*UNSHARE, "bash", "-c", BOOT, "boot", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "up\n", f"{name} did not come up"
        pid = self._process.pid
        self.pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def command(self, *words):
        enter = ["nsenter", f"--target={self.pid}", *NAMESPACES, f"--wdns={Path.cwd()}"]
        return [*enter, *map(str, words)]

    def run(self, *words, **options):
        """Return what a command prints; it must not fail."""
        done = subprocess.run(
            self.command(*words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
            **options,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def power_off(self):
        self._process.kill()
        self._process.wait(WAIT_S)
        self._process.stdin.close()
        self._process.stdout.close()


def what_is_missing(tools):
    """Say what this machine lacks, and how to get it; empty if nothing.

    Args:
        tools: Commands that are needed, each with the package that has it.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "machines in namespaces need root; run as root, in a container if you like"
    needed = {"unshare": "util-linux", "nsenter": "util-linux", **tools}
    lacking = sorted({package for tool, package in needed.items() if not shutil.which(tool)})
    if lacking:
        return f"tools are missing: apt-get install --no-install-recommends {' '.join(lacking)}"
    probe = [*UNSHARE, "ip", "link", "add", "type", "veth"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "network namespaces are not allowed here; run in a privileged container"
    return ""
