"""Findings: what is wrong with facts and timings, one sentence each, with a remedy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from ddp_sgd.doctor.facts import Answers, Facts, is_loopback
from ddp_sgd.doctor.links import PAIR_BYTES, Link
from ddp_sgd.errors import ExitCode
from ddp_sgd.rank_differences import name_ranks, name_values, vital_versions

_SLOW_FACTOR = 3.0
"""How much longer than the others' a host's best link takes when the host counts as slow."""
_LOW_BYTES = 2 * 10**9
"""Room on a disk below which there is a remark."""
_CLOCK_S = 1.0
"""Difference of clocks above which there is a remark, in seconds."""
_SHOWN_SETTINGS = 5


class Finding(NamedTuple):
    """One thing that is not as it should be.

    Args:
        code: What the command returns for it; ``DONE`` is a remark, which stops no run.
        text: The sentence.
    """

    code: ExitCode
    text: str


def judge_facts(facts: Mapping[int, Facts], world_size: int) -> list[Finding]:
    """Find what would keep the ranks from joining, or from being one run.

    Args:
        facts: Of the ranks that came; rank 0 is among them.
        world_size: Number of ranks that there should be.
    """
    hosts = known_hosts(facts, world_size)
    return [
        *_missing(facts, hosts),
        *_devices(facts, hosts),
        *_differences(facts, hosts),
        *_addresses(facts),
    ]


def judge_surroundings(answers: Answers, unwritable: str | None = None) -> list[Finding]:
    """Find what is wrong or remarkable about disks and clocks, and ranks that stopped replying.

    Args:
        answers: Of the ranks that came.
        unwritable: Why rank 0 cannot write into its output folder; None: it can.
    """
    facts = answers.facts
    hosts = known_hosts(facts, max(facts) + 1)
    found = []
    if silent := [rank for rank in sorted(facts) if rank and rank not in answers.shares]:
        text = f"{name_ranks(silent, hosts)} came and then fell silent; look at the log there."
        found.append(Finding(ExitCode.PEER, text))
    where = f"output_dir is {facts[0].folder}"
    free = facts[0].free_bytes
    if unwritable:
        text = f"{where}, which {facts[0].host} cannot write: {unwritable}; set it to another one."
        found.append(Finding(ExitCode.OUTPUT, text))
    elif free is not None and free < _LOW_BYTES:
        text = (
            f"{where}, whose disk has {free / 1e9:.2f} GB left on {facts[0].host}; make room, or "
            "set it to another disk."
        )
        found.append(Finding(ExitCode.DONE, text))
    return [*found, *_clocks(answers)]


def judge_links(links: Sequence[Link]) -> list[Finding]:
    """Name the hosts that are much slower than the others, by their best link.

    The best link of a host that is well leads to another such host, so a slow one does not affect
    its partners. Of two hosts with one link, the slow one cannot be found.
    """
    best: dict[str, float] = {}
    for link in links:
        for host in link.hosts:
            best[host] = min(best.get(host, link.seconds), link.seconds)
    found = []
    for host, seconds in best.items():
        usual = median([best[other] for other in best if other != host])
        if len(best) > 2 and seconds >= _SLOW_FACTOR * usual:
            found.append(
                Finding(
                    ExitCode.DONE,
                    f"{host} is {seconds / usual:.0f}x slower than the others: its fastest link "
                    f"takes {seconds * 1e3:.3g} ms for {PAIR_BYTES // 2**20} MiB, theirs "
                    f"{usual * 1e3:.3g} ms; look at its cable, its switch and what else runs "
                    "there, or leave it out.",
                )
            )
    return found


def judge_endpoint(facts: Facts) -> Finding | None:
    """Find out whether a rank, by what it knows alone, would look for rank 0 in a wrong place.

    A host that finds its own name at 127.0.1.1, as Debian has it, is right to do so.
    """
    if facts.local_world_size == facts.world_size or _is_own_name(facts):
        return None
    where = f"MASTER_ADDR is {facts.master}"
    remedy = "set MASTER_ADDR to a name or address of rank 0's host that every host reaches"
    if not facts.master_addresses:
        text = f"{where}, which {facts.host} cannot resolve; {remedy}."
        return Finding(ExitCode.CONFIG, text)
    first = facts.master_addresses[0]
    if not is_loopback(first):
        return None
    meaning = "" if first == facts.master else f", which resolves to {first} on {facts.host}"
    return Finding(
        ExitCode.CONFIG,
        f"{where}{meaning}: every host would look for rank 0 on itself; {remedy}.",
    )


def known_hosts(facts: Mapping[int, Facts], world_size: int) -> list[str]:
    """Give the host of each rank, as far as it is known; else an empty text.

    A rank that did not come is on the host of its neighbours, where the launcher numbers the ranks
    of a host in a row: torchrun does, and ranks that follow each other there show it.
    """
    hosts = [facts[rank].host if rank in facts else "" for rank in range(world_size)]
    for rank, known in facts.items():
        first = rank - known.local_rank
        block = range(first, first + known.local_world_size)
        if known.launcher == "torchrun" and first >= 0 and block.stop <= world_size:
            for other in block:
                hosts[other] = hosts[other] or known.host
    return hosts


def summarize(findings: Sequence[Finding], world_size: int, num_hosts: int) -> list[str]:
    """Write one line a finding, and whether all is well."""
    lines = [
        f"{'note' if finding.code == ExitCode.DONE else 'fault'}: {finding.text}"
        for finding in findings
    ]
    if exit_code(findings) != ExitCode.DONE:
        return lines
    if world_size == 1:
        return [*lines, "the only rank is ready"]
    several = f"on {num_hosts} hosts" if num_hosts > 1 else "on 1 host"
    return [*lines, f"all {world_size} ranks {several} agree and reach each other"]


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """Return the code of the first finding that is no remark."""
    return next((each.code for each in findings if each.code != ExitCode.DONE), ExitCode.DONE)


def _clocks(answers: Answers) -> Iterator[Finding]:
    reported = set()
    for rank, clock in answers.clocks.items():
        host = answers.facts[rank].host
        if abs(clock.ahead_s) - clock.within_s > _CLOCK_S and host not in reported:
            reported.add(host)
            way = "ahead of" if clock.ahead_s > 0 else "behind"
            yield Finding(
                ExitCode.DONE,
                f"the clock of {host} is {abs(clock.ahead_s):.1f} s {way} that of "
                f"{answers.facts[0].host}; start a time service there, such as chrony.",
            )


def _is_own_name(facts: Facts) -> bool:
    return facts.master.partition(".")[0] == facts.host.partition(".")[0]


def _missing(facts: Mapping[int, Facts], hosts: Sequence[str]) -> Iterator[Finding]:
    missing = [rank for rank in range(len(hosts)) if rank not in facts]
    if missing:
        yield Finding(
            ExitCode.PEER,
            f"{name_ranks(missing, hosts)} of {len(hosts)} did not come; look whether every rank "
            f"was started, and reaches {facts[0].master} from its host.",
        )


def _devices(facts: Mapping[int, Facts], hosts: Sequence[str]) -> Iterator[Finding]:
    for each in facts.values():
        if each.device not in ("cpu", each.available):
            yield Finding(
                ExitCode.CONFIG,
                f"runtime.device is {each.device} on {name_ranks([each.rank], hosts)}, which has "
                f"{each.available} only; set runtime.device=auto.",
            )
            return
        is_bound = each.num_devices == 1 and each.launcher == "srun"
        may_share = is_bound or each.backend == "gloo"
        if each.device != "cpu" and not may_share and each.local_rank >= each.num_devices:
            yield Finding(
                ExitCode.CONFIG,
                f"LOCAL_RANK is {each.local_rank} on {name_ranks([each.rank], hosts)}, which has "
                f"{each.num_devices} {each.device} devices; start at most {each.num_devices} ranks "
                "a host, set runtime.device=cpu, or let ranks share devices with "
                "runtime.backend=gloo.",
            )
            return


def _differences(facts: Mapping[int, Facts], hosts: Sequence[str]) -> Iterator[Finding]:
    sizes = {rank: str(each.world_size) for rank, each in facts.items()}
    if words := name_values(sizes, hosts):
        text = f"WORLD_SIZE is {words}; start all ranks with the same number of them."
        yield Finding(ExitCode.CONFIG, text)
    for name in ("python", "torch", "ddp_sgd"):
        if words := _apart(facts, hosts, lambda each: vital_versions(each.versions), name):
            yield Finding(
                ExitCode.CONFIG,
                f"the version of {name} is {words}; install the same packages on every host.",
            )
    for name in ("numpy", "cuda", "nccl"):
        if words := _apart(facts, hosts, lambda each: each.versions, name):
            yield Finding(ExitCode.DONE, f"the version of {name} is {words}.")
    for name in ("device", "backend"):
        if words := _apart(
            facts, hosts, lambda each: {"device": each.device, "backend": each.backend}, name
        ):
            yield Finding(
                ExitCode.CONFIG,
                f"the {name} is {words}; set runtime.{name} to what every host has.",
            )
    yield from _settings(facts, hosts)


def _settings(facts: Mapping[int, Facts], hosts: Sequence[str]) -> Iterator[Finding]:
    names = dict.fromkeys(name for each in facts.values() for name in each.settings)
    found = {
        name: words
        for name in names
        if (words := _apart(facts, hosts, lambda each: each.settings, name))
    }
    for name, words in list(found.items())[:_SHOWN_SETTINGS]:
        yield Finding(
            ExitCode.CONFIG,
            f"{name} is {words}; start every rank with the same files, variables and options.",
        )
    if (more := len(found) - _SHOWN_SETTINGS) > 0:
        yield Finding(ExitCode.CONFIG, f"{more} more keys of the configuration differ.")


def _apart(
    facts: Mapping[int, Facts],
    hosts: Sequence[str],
    values: Callable[[Facts], Mapping[str, str]],
    name: str,
) -> str | None:
    return name_values(
        {rank: values(each).get(name, "missing") for rank, each in facts.items()}, hosts
    )


def _addresses(facts: Mapping[int, Facts]) -> Iterator[Finding]:
    """Gloo gives the others the address that its host's own name resolves to."""
    if len({each.host for each in facts.values()}) < 2:
        return
    caught = {
        each.host: each
        for each in facts.values()
        if each.backend == "gloo" and not each.is_chosen and _leads_to_itself(each.own_addresses)
    }
    for host, each in caught.items():
        meaning = f"resolves to {each.own_addresses[0]}" if each.own_addresses else "is unknown"
        choice = f"GLOO_SOCKET_IFNAME={each.interface}" if each.interface else "GLOO_SOCKET_IFNAME"
        yield Finding(
            ExitCode.CONFIG,
            f"{host}'s own name {meaning} on {host}, and gloo would tell the others to reach it "
            f"there; set {choice} on {host}, or fix its /etc/hosts.",
        )


def _leads_to_itself(addresses: Sequence[str]) -> bool:
    return not addresses or is_loopback(addresses[0])
