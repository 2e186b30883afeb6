"""Machines on one switch, of which each is a namespace with a cable of its own. Linux, as root."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def machines(number: int) -> Iterator[list[Any]]:
    """Start machines on one switch; they and what they run end with the block."""
    sys.path.append(str(ROOT / "tests"))
    from machines import Machine

    started: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        names = [f"10.213.79.{rank + 1} node{rank}\n" for rank in range(number)]
        Path(folder, "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))
        Path(folder, "nsswitch.conf").write_text("hosts: files\n")
        try:
            for name in ("switch", *(f"node{rank}" for rank in range(number))):
                started += [Machine(name, Path(folder))]
            switch, *nodes = started
            switch.run("ip", "link", "add", "br0", "type", "bridge")
            switch.run("ip", "link", "set", "br0", "up")
            for rank, node in enumerate(nodes):
                ends = [("name", "eth0", "netns", str(node.pid))]
                ends.append(("name", f"port{rank}", "netns", str(switch.pid)))
                add = ["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]]
                subprocess.run(add, check=True, timeout=20)
                switch.run("ip", "link", "set", f"port{rank}", "master", "br0", "up")
                node.run("ip", "address", "add", f"10.213.79.{rank + 1}/24", "dev", "eth0")
                node.run("ip", "link", "set", "eth0", "up")
            yield nodes
        finally:
            for machine in started:
                machine.power_off()


def limit(nodes: list[Any], rate: str) -> None:
    """Limit what each machine sends, to a rate such as ``100mbit``."""
    for node in nodes:
        shape = ("rate", rate, "burst", "128kb", "latency", "50ms")
        node.run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *shape)


def sent_bytes(node: Any) -> int:
    """Return what a machine has sent since its start, headers included."""
    (link,) = json.loads(node.run("ip", "-json", "-statistics", "link", "show", "eth0"))
    return int(link["stats64"]["tx"]["bytes"])


def environment_of(rank: int, world_size: int) -> Mapping[str, object]:
    """Return the variables of a rank that is alone on its machine, with one thread."""
    return {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "node0",
        "MASTER_PORT": 29400,
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": 1,
    }


def start_on_all(
    nodes: list[Any], *words: str, said: int | None = subprocess.PIPE
) -> list[subprocess.Popen[str]]:
    """Start one rank of a Python program on each machine.

    Args:
        nodes: The machines.
        words: Arguments of Python.
        said: Where stderr goes; None shows it.
    """
    processes = []
    for rank, node in enumerate(nodes):
        variables = [f"{key}={value}" for key, value in environment_of(rank, len(nodes)).items()]
        command = node.command("env", *variables, sys.executable, *words)
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True))
    return processes
