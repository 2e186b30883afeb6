"""Machines on one switch, of which each is a namespace with a cable of its own. Linux, as root."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machines import Machine

from benchmarks.harness import rank_environment

RATES = {"100 Mbit/s": "100mbit", "1 Gbit/s": "1gbit"}
"""Rates of links, as people and as ``tc`` name them."""


@contextmanager
def machines(number: int) -> Iterator[list[Any]]:
    """Start machines on one switch; they and what they run end with the block."""
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
    """Limit what each machine sends, to one of ``RATES``."""
    for node in nodes:
        shape = ("rate", RATES[rate], "burst", "128kb", "latency", "50ms")
        node.run("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *shape)


def sent_bytes(node: Any) -> int:
    """Return what a machine has sent since its start, headers included."""
    (link,) = json.loads(node.run("ip", "-json", "-statistics", "link", "show", "eth0"))
    return int(link["stats64"]["tx"]["bytes"])


def run_on_all(nodes: list[Any], *words: str) -> list[str]:
    """Run one rank of a Python program on each machine; return what each prints on stdout.

    Raises:
        RuntimeError: A rank fails.
    """
    processes = []
    for rank, node in enumerate(nodes):
        values = rank_environment(rank, len(nodes), address="node0", port=29400)
        variables = [f"{name}={value}" for name, value in values.items()]
        command = node.command("env", *variables, sys.executable, *words)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, **pipes))
    outputs = [process.communicate(timeout=400) for process in processes]
    for rank, process in enumerate(processes):
        if process.returncode:
            output, errors = outputs[rank]
            raise RuntimeError(f"rank {rank} ended with {process.returncode}: {output}{errors}")
    return [output for output, _ in outputs]
