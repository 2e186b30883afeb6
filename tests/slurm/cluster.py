"""A real SLURM of virtual nodes: munged, slurmctld and a slurmd in every node.

Partitions: ``main``; ``spot``, whose jobs ``high`` preempts: they are asked to stop, and requeued.
"""

import itertools
import os
import re
import subprocess
import time
from contextlib import contextmanager

import pytest
from commands import starting_python
from launching import ROOT, environment
from limits import WAIT_S
from machines import Machine, what_is_missing

TOOLS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "ip": "iproute2"}
SCRIPTS = ROOT / "slurm"
NETWORK = "10.213.91"
CPUS = 64
GPUS = 8
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=head({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# nodes claim what the machine does not have
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait={kill_wait_s}
ReturnToService=1
SlurmdTimeout=10
MessageTimeout=10
MinJobAge=86400
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CommunicationParameters=NoCtldInAddrAny
# the shell of salloc runs on a node, as sites with login nodes have it
LaunchParameters=use_interactive_step
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=high PriorityTier=100 PreemptMode=OFF
PartitionName=spot PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
"""


class Cluster:
    """A controller and its nodes, which are powered off in the end.

    Args:
        folder: For everything that SLURM writes.
        nodes: How many, named ``node1``, ``node2``, ...
        kill_wait_s: Seconds from SIGTERM to SIGKILL.
        grace_s: Seconds that a preempted job has after SIGTERM.
    """

    def __init__(self, folder, *, nodes, kill_wait_s=10, grace_s=20):
        self._folder = folder
        self.configuration = folder / "slurm.conf"
        self._names = [f"node{index + 1}" for index in range(nodes)]
        self._machines = {}
        self._daemons = []
        self._ports = itertools.count(1)
        folder.chmod(0o755)  # munged wants to be reached
        self._configure(kill_wait_s=kill_wait_s, grace_s=grace_s)
        try:
            self._head = Machine("head", folder)
            self._head.run("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
            self._head.run("ip", "address", "add", f"{NETWORK}.254/24", "dev", "br0")
            self._head.run("ip", "link", "set", "br0", "up")
            self._start(self._head, "munged", "--foreground", "--force", *self._munge_options())
            self._until((folder / "munge" / "socket").exists)
            self._start(self._head, "slurmctld", "-D")
            for name in self._names:
                self.power_on(name)
            self._until(lambda: self.idle() == set(self._names))
        except BaseException:
            self.power_off()
            raise

    def power_on(self, name):
        """Start a node, and its slurmd."""
        index = self._names.index(name) + 1
        port = f"port{next(self._ports)}"  # that of a node that lost its power goes a bit later
        node = self._machines[name] = Machine(name, self._folder)
        here = ["name", port, "netns", str(self._head.pid)]
        there = ["name", "eth0", "netns", str(node.pid)]
        cable = ["ip", "link", "add", *here, "type", "veth", "peer", *there]
        subprocess.run(cable, check=True, timeout=WAIT_S)
        self._head.run("ip", "link", "set", port, "master", "br0", "up")
        node.run("ip", "address", "add", f"{NETWORK}.{index}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        self._start(node, "slurmd", "-D", "-N", name)

    def cut_power(self, name):
        """End a node and everything on it, without a word."""
        self._machines.pop(name).power_off()

    def power_off(self):
        for machine in [*self._machines.values(), self._head]:
            machine.power_off()
        for daemon in self._daemons:
            daemon.wait(WAIT_S)

    def run(self, *words, **options):
        """Return what a command prints on the head node."""
        return self._head.run("env", f"SLURM_CONF={self._folder}/slurm.conf", *words, **options)

    def idle(self):
        return set(self.run("sinfo", "--noheader", "--states=idle", "--format=%n").split())

    def submit(self, folder, script, *options, sbatch=(), **variables):
        """Submit a batch script of ours; the run folder is ``runs/digits`` below the folder."""
        return self._submit(folder, (SCRIPTS / script, *options), sbatch, variables)

    def wrap(self, folder, command, *, sbatch=(), **variables):
        """Submit a command line as a job."""
        return self._submit(folder, ("--wrap", command), sbatch, variables)

    def _submit(self, folder, what, sbatch, variables):
        output = () if any(word.startswith("--output") for word in sbatch) else ("--output=%A.out",)
        command = ("sbatch", "--parsable", f"--chdir={folder}", *output, *sbatch)
        ours = environment(
            SLURM_CONF=f"{self._folder}/slurm.conf", PYTHON=str(starting_python()), **variables
        )
        told = self.run(*command, *what, env=ours)
        return Job(self, int(told), folder)

    def _configure(self, *, kill_wait_s, grace_s):
        folder = self._folder
        text = CONFIGURATION.format(
            folder=folder, network=NETWORK, kill_wait_s=kill_wait_s, grace_s=grace_s
        )
        hosts = ["127.0.0.1 localhost", f"{NETWORK}.254 head"]
        for index, name in enumerate(self._names, start=1):
            address = f"{NETWORK}.{index}"
            hosts.append(f"{address} {name}")
            text += f"NodeName={name} NodeAddr={address} CPUs={CPUS} Gres=gpu:{GPUS}\n"
            (folder / f"spool-{name}").mkdir()
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").touch()
        for index in range(GPUS):
            (folder / f"nvidia{index}").symlink_to("/dev/null")  # a GPU must be a device
        devices = f"Name=gpu File={folder}/nvidia[0-{GPUS - 1}]\n"
        (folder / "gres.conf").write_text(f"AutoDetect=off\n{devices}")
        (folder / "hosts").write_text("\n".join([*hosts, ""]))
        (folder / "nsswitch.conf").write_text("hosts: files\n")
        (folder / "state").mkdir(mode=0o700)
        (folder / "munge").mkdir(mode=0o755)
        key = folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))

    def _munge_options(self):
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        files["seed-file"] = "seed"
        return [f"--{name}={self._folder}/munge/{file}" for name, file in files.items()]

    def _start(self, machine, *words):
        with (self._folder / "daemons.out").open("a") as said:
            daemon = subprocess.Popen(
                machine.command("env", f"SLURM_CONF={self._folder}/slurm.conf", *words),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        self._daemons.append(daemon)

    def _until(self, holds, *, deadline_s=WAIT_S):
        deadline = time.monotonic() + deadline_s
        while not holds():
            assert time.monotonic() < deadline, (self._folder / "daemons.out").read_text()
            time.sleep(0.05)


class Job:
    """A job that was submitted.

    Args:
        cluster: Where.
        number: Its number.
        folder: Where it was submitted; the run folder is ``runs/digits`` below.
    """

    def __init__(self, cluster, number, folder):
        self._cluster = cluster
        self.configuration = cluster.configuration
        self.number = number
        self.run_folder = folder / "runs" / "digits"
        self._said = folder / f"{number}.out"

    @property
    def said(self):
        return self._said.read_text() if self._said.exists() else ""

    def facts(self, task=None):
        """What SLURM knows of it, by name."""
        name = self.number if task is None else f"{self.number}_{task}"
        text = self._cluster.run("scontrol", "--oneliner", "show", "job", str(name))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def signal(self, *options):
        self._cluster.run("scancel", *options, str(self.number))

    def wait_until(self, holds, *, deadline_s=WAIT_S):
        deadline = time.monotonic() + deadline_s
        while not (found := holds()):
            assert time.monotonic() < deadline, f"{self.facts()}\n{self.said}"
            time.sleep(0.05)
        return found

    def end(self, task=None, *, deadline_s=WAIT_S):
        """Return the final state, and how often it was requeued."""

        def final():
            facts = self.facts(task)
            return facts if facts["JobState"] in FINAL else None

        facts = self.wait_until(final, deadline_s=deadline_s)
        return facts["JobState"], int(facts["Restarts"])


@contextmanager
def slurm(folder, **options):
    """Yield a cluster, or skip and say why; fail instead where REQUIRE_CLUSTER_TESTS is set."""
    if lacking := what_is_missing(TOOLS):
        (pytest.fail if os.environ.get("REQUIRE_CLUSTER_TESTS") else pytest.skip)(lacking)
    cluster = Cluster(folder, **options)
    try:
        yield cluster
    finally:
        cluster.power_off()
