"""Facts about a rank and its host: versions, devices, CPUs, addresses, free space.

Routes: what host names resolve to, and by which interface others are reached. No torch.

Shared folder check: rank 0 leaves a file in the output folder, the others look for it.
"""

import fcntl
import ipaddress
import json
import os
import shutil
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

import torch

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.environment import Ranks
from ddp_sgd.host import usable_cpus
from ddp_sgd.rank_differences import read_versions, settings_that_agree


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One rank, as plain data that travels as JSON.

    Everything but the rank has a default, so that facts from another version can be read.

    Args:
        rank: Number of the process.
        world_size: Number of processes.
        local_rank: Its number on its host.
        local_world_size: Processes on its host, as the launcher sets it.
        launcher: ``torchrun``, ``srun`` or ``none``.
        host: Name of the host.
        pid: Process id.
        device: Kind of device that the run requests, such as ``cpu``.
        available: Kind of device that is there.
        num_devices: Accelerators that the process sees.
        backend: Library that carries tensors.
        address: Address by which the host reaches rank 0's; None: there is no way.
        interface: Interface of that address, or the one that the user chose; None: not known.
        is_chosen: Whether the user chose the interface, with ``GLOO_SOCKET_IFNAME`` or
            ``NCCL_SOCKET_IFNAME``.
        own_addresses: What the host's own name resolves to there.
        master: ``MASTER_ADDR``.
        master_addresses: What that resolves to there.
        versions: Of Python, torch and others.
        cpus: CPUs that the process may use.
        threads: Threads that torch will compute with.
        folder: The output folder.
        free_bytes: Room on its disk; None: not known.
        settings: Keys of the configuration that have to agree, with their values.
    """

    rank: int
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"
    host: str = ""
    pid: int = 0
    device: str = "cpu"
    available: str = "cpu"
    num_devices: int = 0
    backend: str = "gloo"
    address: str | None = None
    interface: str | None = None
    is_chosen: bool = False
    own_addresses: list[str] = field(default_factory=list)
    master: str = "localhost"
    master_addresses: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    cpus: int = 1
    threads: int = 1
    folder: str = ""
    free_bytes: int | None = None
    settings: dict[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        """Write JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> "Facts":
        """Read JSON; what this version does not know is left out."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in known})

    def as_row(self) -> dict[str, Any]:
        """Give everything but the configuration, for a report."""
        return {name: value for name, value in asdict(self).items() if name != "settings"}


class Clock(NamedTuple):
    """How far the clock of a host is ahead of rank 0's.

    Args:
        ahead_s: The difference, in seconds.
        within_s: Largest error of it: half of the round trip, in seconds.
    """

    ahead_s: float
    within_s: float


class Answers(NamedTuple):
    """Replies of the ranks that came.

    Args:
        facts: By rank.
        clocks: By rank; without those that stopped replying.
        shares: Whether a rank sees rank 0's output folder, by rank.
    """

    facts: dict[int, Facts]
    clocks: dict[int, Clock]
    shares: dict[int, bool]


def gather_facts(config: RunConfig, ranks: Ranks, environ: Mapping[str, str]) -> Facts:
    """Look at this process and its host; nothing is sent, and nothing is written."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    available = accelerator.type if accelerator else "cpu"
    device = available if config.runtime.device == "auto" else config.runtime.device
    backend: str = config.runtime.backend
    if backend == "auto":
        backend = torch.distributed.get_default_backend_for_device(device)
    address = address_toward(ranks.address)
    chosen = environ.get(f"{backend.upper()}_SOCKET_IFNAME")
    folder = Path(config.output_dir).absolute()
    cpus = usable_cpus()
    return Facts(
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_rank=ranks.local_rank,
        local_world_size=ranks.local_world_size,
        launcher=ranks.launcher,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=device,
        available=available,
        num_devices=torch.accelerator.device_count() if accelerator else 0,
        backend=backend,
        address=address,
        interface=chosen or interface_of(address),
        is_chosen=bool(chosen),
        own_addresses=resolve(socket.gethostname()),
        master=ranks.address,
        master_addresses=resolve(ranks.address),
        versions=read_versions(),
        cpus=cpus,
        threads=_threads(cpus, ranks, environ),
        folder=str(folder),
        free_bytes=_free_bytes(folder),
        settings=settings_that_agree(config.model_dump(mode="json")),
    )


def _threads(cpus: int, ranks: Ranks, environ: Mapping[str, str]) -> int:
    chosen = environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if chosen.isdigit():
        return int(chosen)
    is_shared = cpus == os.cpu_count()  # as the runtime divides them
    return max(1, cpus // ranks.local_world_size) if is_shared else cpus


def _free_bytes(folder: Path) -> int | None:
    """Look at the disk of a folder that need not exist yet."""
    for place in (folder, *folder.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None


_ELSEWHERE = "192.0.2.1"
"""An address that no host has (RFC 5737): the way to it is the way out of this host."""
_SIOCGIFADDR = 0x8915


def resolve(name: str) -> list[str]:
    """Return the addresses of a name on this host, in the order of preference; empty if none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_loopback(address: str) -> bool:
    """Whether an address leads back to the host that uses it: 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def address_toward(name: str) -> str | None:
    """Find the address from which this host reaches a name; where that is itself, the way out.

    Nothing is sent.

    Args:
        name: Host name or address of the rendezvous endpoint.

    Returns:
        An address of this host; None if there is no way.
    """
    toward = _source_of(name)
    if toward is None or is_loopback(toward):
        return _source_of(_ELSEWHERE) or toward
    return toward


def interface_of(address: str | None) -> str | None:
    """Name the interface that has an IPv4 address, such as ``eth0``; None if it is not known."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(query.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _source_of(name: str) -> str | None:
    with suppress(OSError, UnicodeError):
        for family, kind, _, _, target in socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
    return None


@contextmanager
def leave_token(folder: Path) -> Iterator[tuple[str | None, str]]:
    """Put a file into a folder for a while, by which other hosts know it again.

    Yields:
        Name of the file, or None with the reason why nothing can be written there.
    """
    # os.path finds no fault with a name that is too long: it is not there.
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]  # noqa: PTH110
    token = folder / f".doctor-{token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token.write_text("python -m ddp_sgd.doctor looks whether hosts share this folder.\n")
    except OSError as error:
        _clean_up(None, made)
        yield None, error.strerror or str(error)
        return
    try:
        yield token.name, ""
    finally:
        _clean_up(token, made)


def sees_token(folder: Path, token: str | None) -> bool:
    """Whether rank 0's file is in the folder that this host knows by the same name.

    Args:
        folder: The output folder of this rank.
        token: Name of the file; None: rank 0 could not write one.
    """
    return token is not None and os.path.exists(folder / token)  # noqa: PTH110


def _clean_up(token: Path | None, made: Sequence[Path]) -> None:
    with suppress(OSError):
        if token:
            token.unlink(missing_ok=True)
        for place in made:
            place.rmdir()
