"""Options of the launcher, from its command line and its environment. No torch.

The number of GPUs that this process may use, found without importing torch where possible.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ddp_sgd.distributed.environment import whereabouts
from ddp_sgd.errors import ConfigError
from ddp_sgd.host import scaled, usable_cpus

_NARROWED_BY = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)
_OTHER_TOOLS = ("rocm-smi", "amd-smi", "rocminfo", "xpu-smi", "sycl-ls")
"""Tools of ROCm and XPU, whose output differs by release; that they are there is enough."""
_COUNT = "import torch; print(torch.accelerator.device_count())"


def count_gpus(environ: Mapping[str, str]) -> int:
    """Count the GPUs of NVIDIA (CUDA), AMD (ROCm) or Intel (XPU) that this process may use.

    Args:
        environ: The environment, such as ``os.environ``.
    """
    # SLURM sets all of these, whatever the GPUs are, and a user narrows one: the least counts.
    named = [_count_names(environ[name]) for name in _NARROWED_BY if name in environ]
    if named:
        return min(named)
    return _count_by_tool(environ) or _count_by_torch(environ)


def _count_names(text: str) -> int:
    """Count the entries of a list such as ``0,GPU-1b``; ``-1`` and an empty list hide all."""
    return sum(bool(re.match("[0-9GM]", entry)) for entry in text.split(","))


def _count_by_tool(environ: Mapping[str, str]) -> int:
    """Ask nvidia-smi; 0 where it, its driver or its GPUs are missing: they may be of others."""
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    lines = _lines_of([tool, "-L"], environ) if tool else []
    return sum(line.startswith("GPU") for line in lines)


def _count_by_torch(environ: Mapping[str, str]) -> int:
    """Ask torch, which takes seconds to import, where there is a driver or a tool of others."""
    path = environ.get("PATH")
    has_driver = Path("/dev/kfd").exists() or any(Path("/dev/dri").glob("render*"))
    if not has_driver and not any(shutil.which(tool, path=path) for tool in _OTHER_TOOLS):
        return 0
    last = next(reversed(_lines_of([sys.executable, "-c", _COUNT], environ)), "")
    return int(last) if last.isdigit() else 0


def _lines_of(command: list[str], environ: Mapping[str, str]) -> list[str]:
    """Return what a command prints on stdout; nothing where it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=scaled(120.0),
            check=False,
        )
        return done.stdout.splitlines()
    return []


_WITH_VALUE = ("--nnodes", "--nproc", "--max-restarts")
_PORT = "29400"
_ELASTIC_RESTARTS = "10"
"""Where machines come and go, each that leaves ends the processes of the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The machines of a run, and where they meet.

    Args:
        count: Number of machines, or ``MIN:MAX``.
        address: Name of the machine that hosts the rendezvous.
        port: Port on it.
        run_id: Tells the run from others at the same port; empty for its name.
        is_host: Whether this machine hosts the rendezvous; None leaves it to torchrun.
        remedy: What to do where the machines do not find each other.
    """

    count: str
    address: str
    port: str
    run_id: str
    is_host: bool | None
    remedy: str

    @property
    def is_elastic(self) -> bool:
        """Whether machines may leave and join."""
        return ":" in self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """What the user asked the launcher for.

    Args:
        nproc: Processes on this machine.
        max_restarts: Times that all processes are started again after a failure.
        nodes: The machines; None if this one trains alone.
        train: Options of ``ddp_sgd.train``.
    """

    nproc: int
    max_restarts: int
    nodes: Nodes | None
    train: tuple[str, ...]


def read_options(argv: Sequence[str], environ: Mapping[str, str]) -> LaunchOptions | None:
    """Read the options of the launcher, which come before those of ``ddp_sgd.train``.

    Args:
        argv: Arguments without the name of the program.
        environ: Environment variables.

    Returns:
        The options; None if the user asked for help.

    Raises:
        ConfigError: An option or a variable is at fault, or one is missing.
    """
    given, train = _split(argv)
    if "--help" in given:
        return None
    count = None if "--standalone" in given else given.get("--nnodes", environ.get("NNODES"))
    nodes = None if count is None else read_nodes(count, environ)
    nproc = given.get("--nproc", environ.get("NPROC", ""))
    restarts = given.get("--max-restarts", environ.get("MAX_RESTARTS", ""))
    nproc = nproc or str(count_processes(environ, usable_cpus()))
    restarts = restarts or (_ELASTIC_RESTARTS if nodes and nodes.is_elastic else "0")
    if not re.fullmatch("[1-9][0-9]*", nproc):
        raise ConfigError(f"the number of processes is {nproc!r}; set NPROC=2, for example.")
    if not re.fullmatch("[0-9]+", restarts):
        raise ConfigError(
            f"--max-restarts is {restarts!r}; give a number, such as --max-restarts=3."
        )
    return LaunchOptions(
        nproc=int(nproc), max_restarts=int(restarts), nodes=nodes, train=tuple(train)
    )


def read_nodes(count: str, environ: Mapping[str, str]) -> Nodes:
    """Read where the machines of a run meet.

    Args:
        count: Number of machines, or ``MIN:MAX``.
        environ: Environment variables.

    Raises:
        ConfigError: A variable is at fault or missing.
    """
    if not count:
        raise ConfigError("NNODES is not set; set it to the number of machines, such as NNODES=2.")
    if not re.fullmatch("[1-9][0-9]*(:[1-9][0-9]*)?", count):
        raise ConfigError(
            f"NNODES is {count!r}; set a number of machines, such as NNODES=2, or MIN:MAX, such as "
            "NNODES=2:4."
        )
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT") or _PORT
    if not address:
        raise ConfigError(
            "MASTER_ADDR is not set; set it, on every machine, to the name of the one where all "
            "meet, such as node1."
        )
    if not re.fullmatch("[1-9][0-9]*", port):
        raise ConfigError(
            f"MASTER_PORT is {port!r}; set a port that is free on {address}, such as "
            f"MASTER_PORT={_PORT}."
        )
    is_host, remedy = _locate(address)
    node_rank = environ.get("NODE_RANK", "")
    if not re.fullmatch("[0-9]*", node_rank):
        raise ConfigError(
            f"NODE_RANK is {node_rank!r}; set 0 on {address} and 1, 2, ... elsewhere, or unset it."
        )
    return Nodes(
        count=count,
        address=address,
        port=port,
        run_id=environ.get("RUN_ID", ""),
        is_host=int(node_rank) == 0 if node_rank else is_host,
        remedy=remedy,
    )


def count_processes(environ: Mapping[str, str], cpus: int) -> int:
    """Choose the number of processes: one for each GPU; without any, two, but one on one CPU.

    Args:
        environ: Environment variables.
        cpus: CPUs that this process may use.
    """
    return count_gpus(environ) or min(2, cpus)


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the arguments into options of the launcher, by name, and those of the run."""
    given: dict[str, str] = {}
    rest = list(argv)
    while rest:
        name, equals, value = rest[0].partition("=")
        if rest[0] == "--":
            return given, rest[1:]
        if rest[0] in ("-h", "--help"):
            return {"--help": ""}, []
        if rest[0] == "--standalone":
            given[rest.pop(0)] = ""
        elif name in _WITH_VALUE:
            del rest[0]
            given[name] = value if equals else rest.pop(0) if rest else "none"
        else:
            break
    return given, rest


def _locate(address: str) -> tuple[bool | None, str]:
    """Find out whether this machine hosts the rendezvous, and what to do if nobody is there.

    torchrun would host it where it takes the address for its own, and else, or if the port is
    taken, join whatever meets there: so it is told which.
    """
    place = whereabouts(address)
    remedies = {
        "loopback": f"{address} is another machine on every host; set MASTER_ADDR to the name of "
        "one, as the others see it.",
        "unknown": f"this host does not know {address}; set MASTER_ADDR to a name that every host "
        "knows, or add it to /etc/hosts.",
    }
    remedy = remedies.get(
        place,
        "start this on every machine, with the same MASTER_ADDR, MASTER_PORT and RUN_ID, which no "
        "other run has, and see that the port is open.",
    )
    return {"here": True, "elsewhere": False}.get(place), remedy
