"""Two hosts and the cable between them, as namespaces; they die with the test that made them."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
from launching import MULTINODE, environment
from limits import WAIT_S
from machines import Machine, what_is_missing

NAMES = ("node1", "node2")
PORT = "29400"
TOOLS = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables"}


class Host(Machine):
    """A machine of the network, with an interface ``lost0`` that leads nowhere."""

    def __init__(self, index, folder):
        super().__init__(NAMES[index], folder)
        self.address = f"10.213.77.{index + 1}"
        self.lost_address = f"10.213.{78 + index}.1"
        self.run("ip", "link", "add", "lost0", "type", "veth", "peer", "name", "lost1")
        self.run("ip", "address", "add", f"{self.lost_address}/24", "dev", "lost0")
        for end in ("lost0", "lost1"):
            self.run("ip", "link", "set", end, "up")


class Network:
    """Two hosts and the cable between them.

    Args:
        folder: For the files that the hosts see as theirs.
    """

    def __init__(self, folder):
        names = ["127.0.0.1 localhost\n"]
        names += [f"10.213.77.{index + 1} {name}\n" for index, name in enumerate(NAMES)]
        (folder / "hosts").write_text("".join(names))
        (folder / "nsswitch.conf").write_text("hosts: files\n")
        self.hosts = []
        try:
            for index in range(len(NAMES)):
                self.hosts.append(Host(index, folder))
            ends = [("name", "eth0", "netns", str(host.pid)) for host in self.hosts]
            add = ["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]]
            subprocess.run(add, check=True, timeout=WAIT_S)
            for host in self.hosts:
                host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            self.fix()
        except BaseException:
            self.power_off()
            raise

    def cut(self):
        """Pull the cable out of the second host."""
        self.hosts[1].run("ip", "link", "set", "eth0", "down")

    def fix(self):
        for host in self.hosts:
            host.run("ip", "link", "set", "eth0", "up")

    def lose(self, percent):
        """Drop packets at random, both ways, until the hosts are powered off."""
        for host in self.hosts:
            host.run("nft", "add table inet loss")
            host.run("nft", "add chain inet loss arriving { type filter hook input priority 0; }")
            rule = f"meta iifname eth0 numgen random mod 100 < {percent} counter drop"
            host.run("nft", f"add rule inet loss arriving {rule}")

    def throttle(self, rate):
        for host in self.hosts:
            shape = ("tbf", "rate", rate, "burst", "32kbit", "latency", "50ms")
            host.run("tc", "qdisc", "add", "dev", "eth0", "root", *shape)

    def power_off(self):
        for host in self.hosts:
            host.power_off()


class Run:
    """``launch/multinode.sh`` on one host; ends with the block that began it.

    Args:
        host: Where.
        folder: Working folder; the run folder is ``runs/digits`` below.
        options: Of the script and of the run.
        variables: Environment.
    """

    def __init__(self, host, folder, *options, **variables):
        self.host = host
        self.run_folder = folder / "runs" / "digits"
        folder.mkdir(exist_ok=True)
        self._said = folder / f"said-{host.name}-{time.monotonic_ns()}.txt"
        given = {"MASTER_ADDR": "node1", "MASTER_PORT": PORT, "NNODES": "2", "NPROC": "1"}
        with self._said.open("w") as said:
            self.process = subprocess.Popen(
                host.command("env", f"--chdir={folder}", str(MULTINODE), *options),
                env=environment(PYTHON=sys.executable, **(given | variables)),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    @property
    def said(self):
        return f"--- {self.host.name}\n{self._said.read_text()}"

    @property
    def errors(self):
        lines = self._said.read_text().splitlines()
        return [line for line in lines if "ddp_sgd: error: " in line]

    @property
    def steps(self):
        """Steps that the journal tells of."""
        with suppress(OSError):
            rows = (self.run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            return sum(row.endswith("\n") and '"event": "train"' in row for row in rows)
        return 0

    @property
    def result(self):
        return result_in(self.run_folder)

    def wait_until(self, holds, *, deadline_s=WAIT_S):
        deadline = time.monotonic() + deadline_s
        while not holds():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def end(self, *, deadline_s=WAIT_S):
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.host.name} did not end in {deadline_s} s\n{self.said}")

    def clean_up(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)


def result_in(run_folder):
    return json.loads((run_folder / "result.json").read_text())


@contextmanager
def two_hosts(folder):
    """Yield a network, or skip the test and say why; fail where REQUIRE_CLUSTER_TESTS is set."""
    if lacking := what_is_missing(TOOLS):
        (pytest.fail if os.environ.get("REQUIRE_CLUSTER_TESTS") else pytest.skip)(lacking)
    network = Network(folder)
    try:
        yield network
    finally:
        network.power_off()
