"""Protocol of the doctor: rank 0 coordinates, every other rank is a worker.

Exchange of facts over the ranks' store: the coordinator requests, workers reply, with timeouts.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import Store

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.environment import Ranks
from ddp_sgd.distributed.rendezvous import StoreKey, is_there, needs_store, reach_store, read_key
from ddp_sgd.distributed.runtime import start_runtime
from ddp_sgd.doctor.facts import Answers, Clock, Facts, leave_token, sees_token
from ddp_sgd.doctor.findings import (
    Finding,
    exit_code,
    judge_facts,
    judge_links,
    judge_surroundings,
    known_hosts,
    summarize,
)
from ddp_sgd.doctor.links import (
    Link,
    Timing,
    facts_table,
    link_table,
    time_all_ranks,
    time_pairs,
    timing_table,
)
from ddp_sgd.errors import ConfigError, ExitCode, PeerError, UserError
from ddp_sgd.host import scaled

_ROUNDS = 5
"""Round trips of which the shortest measures a clock."""
_ANSWER_S = scaled(5.0)
"""Longest wait for the reply of a rank that is there."""
_GRACE_S = scaled(60.0)
"""What rank 0 may take beyond the timeout for requests and reports."""


class Coordinator:
    """Rank 0's side: it collects facts, sends the decision, and reads reports."""

    def __init__(self, store: Store, world_size: int) -> None:
        self._store = store
        self._world = range(world_size)
        self._present: list[int] = []

    def ask(self, mine: Facts, token: str | None, timeout_s: float) -> Answers:
        """Collect the facts of those that come in time, then request clock and folder of each.

        Args:
            mine: Facts of rank 0.
            token: File in rank 0's output folder that the others look for; None: there is none.
            timeout_s: Longest wait for the facts, in seconds.
        """
        facts = {mine.rank: mine}
        deadline = time.monotonic() + timeout_s
        while True:
            for rank in self._world:
                if rank not in facts and is_there(self._store, StoreKey.FACTS.of(rank)):
                    facts[rank] = Facts.from_text(self._store.get(StoreKey.FACTS.of(rank)))
            if len(facts) == len(self._world) or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        self._present = sorted(rank for rank in facts if rank)
        request = json.dumps([len(self._world), self._present, token])
        self._store.set(StoreKey.REQUEST.of(), request)
        clocks, shares = {}, {}
        for rank in self._present:
            clock = self._measure_clock(rank)
            if clock:
                clocks[rank] = clock
            sees = StoreKey.SEES.of(rank)
            if clock and (seen := read_key(self._store, sees, _ANSWER_S)) is not None:
                shares[rank] = seen == b"true"
        self._present = sorted(shares)  # a rank that stopped replying is not waited for
        return Answers(facts, clocks, shares)

    def give_word(self, hosts: Sequence[str] | None) -> None:
        """Have the others join the group, given the host of each rank; None: they do not."""
        self._store.set(StoreKey.WORD.of(), json.dumps(hosts))

    def hear(self, patience_s: float) -> dict[int, str]:
        """Return what those ranks report that could not join or lost the others, by rank.

        Args:
            patience_s: Longest wait for all reports, in seconds.
        """
        deadline = time.monotonic() + patience_s
        reports = {}
        for rank in self._present:
            left_s = max(deadline - time.monotonic(), 0.01)
            text = read_key(self._store, StoreKey.REPORT.of(rank), left_s)
            if text:
                reports[rank] = text.decode()
        return reports

    def dismiss(self, code: int) -> None:
        """Send the others the exit code, and wait a moment until they have read it."""
        self._store.set(StoreKey.CODE.of(), str(int(code)))
        for rank in self._present:
            if read_key(self._store, StoreKey.LEFT.of(rank), _ANSWER_S) is None:
                return

    def _measure_clock(self, rank: int) -> Clock | None:
        best: Clock | None = None
        for number in range(_ROUNDS):
            asked = time.time()
            self._store.set(StoreKey.CLOCK.of(rank, number), "null")
            answer = read_key(self._store, StoreKey.CLOCK.of(rank, number, "is"), _ANSWER_S)
            if answer is None:
                return None
            answered = time.time()
            clock = Clock(float(answer) - (asked + answered) / 2, abs(answered - asked) / 2)
            if best is None or clock.within_s < best.within_s:
                best = clock
        return best


class Worker:
    """The side of every other rank: it sends its facts, replies, and joins the group if requested.

    Args:
        store: From ``reach_store``.
        facts: Of this rank.
        timeout_s: Longest wait for rank 0 and for those whom it waits for, in seconds.

    Raises:
        PeerError: Another process has this rank already.
    """

    def __init__(self, store: Store, facts: Facts, timeout_s: float) -> None:
        self._store = store
        self._rank, self._world_size = facts.rank, facts.world_size
        self._patience_s = timeout_s + _GRACE_S
        text = facts.to_text()
        with needs_store():
            taken = Facts.from_text(store.compare_set(StoreKey.FACTS.of(facts.rank), "", text))
        if (taken.host, taken.pid) != (facts.host, facts.pid):
            raise PeerError(
                f"rank {facts.rank} is here already, as process {taken.pid} on {taken.host}; start "
                "every rank once, and set another MASTER_PORT for every run."
            )

    def answer(self, folder: Path) -> list[str] | None:
        """Reply to rank 0's requests, and read whether to join the group.

        Returns:
            Name of the host of each rank; None: the group is not joined.

        Raises:
            ConfigError: Rank 0 has another number of ranks.
            PeerError: Rank 0 is gone.
        """
        world_size, present, token = self._hear(StoreKey.REQUEST)
        if self._rank >= world_size:  # rank 0 does not even look for it
            raise ConfigError(
                f"WORLD_SIZE is {world_size} on rank 0, and {self._world_size} on rank "
                f"{self._rank}; start all ranks with the same number of them."
            )
        if self._rank in present:
            for number in range(_ROUNDS):
                self._hear(StoreKey.CLOCK, self._rank, number)
                self._write(StoreKey.CLOCK.of(self._rank, number, "is"), repr(time.time()))
            self._write(StoreKey.SEES.of(self._rank), json.dumps(sees_token(folder, token)))
        hosts: list[str] | None = self._hear(StoreKey.WORD)
        return hosts

    def report(self, fault: str) -> int:
        """Send rank 0 the result, and return the exit code that it gives.

        Args:
            fault: What this rank ran into; empty if nothing.

        Raises:
            PeerError: Rank 0 is gone.
        """
        self._write(StoreKey.REPORT.of(self._rank), fault)
        code = int(self._hear(StoreKey.CODE))
        with suppress(PeerError):
            self._write(StoreKey.LEFT.of(self._rank), "")
        return code

    def _write(self, key: str, text: str) -> None:
        with needs_store():
            self._store.set(key, text)

    def _hear(self, key: StoreKey, *below: int) -> Any:
        text = read_key(self._store, key.of(*below), self._patience_s)
        if text is None:
            raise PeerError(f"rank 0 said nothing for {self._patience_s:g} s; look at its log.")
        return json.loads(text)


_REPORTS_S = scaled(5.0)
"""Longest wait for the others' reports once rank 0 has its own."""
_SHOWN_REPORTS = 3


@dataclass(slots=True)
class Measured:
    """What came of joining the group.

    Args:
        timings: All-reduces of all ranks.
        links: All-reduces of pairs of hosts.
        num_left_out: Pairs for which there was no time.
        fault: What went wrong; empty if nothing.
    """

    timings: list[Timing] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    num_left_out: int = 0
    fault: str = ""


@dataclass(slots=True, kw_only=True)
class Diagnosis:
    """Everything that rank 0 learned.

    Args:
        world_size: Number of ranks that there should be.
        answers: Of those that came.
        measured: How fast they communicate.
        findings: What is not as it should be.
    """

    world_size: int
    answers: Answers
    measured: Measured = field(default_factory=Measured)
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> ExitCode:
        """What every rank returns."""
        return exit_code(self.findings)

    def lines(self) -> list[str]:
        """Write the tables and the summary, for people."""
        num_hosts = len({facts.host for facts in self.answers.facts.values()})
        return [
            *facts_table(self.answers),
            *timing_table(self.measured.timings, self.world_size),
            *link_table(self.measured.links, self.measured.num_left_out),
            "",
            *summarize(self.findings, self.world_size, num_hosts),
        ]

    def as_row(self) -> dict[str, Any]:
        """Give the same as plain data."""
        facts, clocks, shares = self.answers
        return {
            "exit_code": int(self.exit_code),
            "world_size": self.world_size,
            "findings": [{"code": int(code), "text": text} for code, text in self.findings],
            "ranks": [
                {
                    **each.as_row(),
                    "clock": clocks[rank]._asdict() if rank in clocks else None,
                    "shares_folder": shares.get(rank),
                }
                for rank, each in sorted(facts.items())
            ],
            "all_reduce": [
                {**each._asdict(), "bus_bandwidth": each.bus_bandwidth(self.world_size)}
                for each in self.measured.timings
            ],
            "links": [link._asdict() for link in self.measured.links],
        }


def coordinate(
    config: RunConfig, ranks: Ranks, mine: Facts, report: Callable[[Diagnosis], None]
) -> int:
    """Examine all ranks, from rank 0, and return the exit code.

    Args:
        config: Description of the run.
        ranks: This process.
        mine: Facts of this rank.
        report: Is called once, before any other rank leaves: launchers end all with the first.

    Raises:
        PeerError: The rendezvous endpoint cannot be opened.
    """
    timeout_s = config.runtime.timeout_s
    coordinator = (
        None
        if ranks.alone
        else Coordinator(reach_store(ranks, timeout_s, os.environ), ranks.world_size)
    )
    with leave_token(Path(config.output_dir)) as (token, cause):
        answers = (
            coordinator.ask(mine, token, timeout_s) if coordinator else Answers({0: mine}, {}, {})
        )
    diagnosis = Diagnosis(world_size=ranks.world_size, answers=answers)
    diagnosis.findings += judge_facts(answers.facts, ranks.world_size)
    diagnosis.findings += judge_surroundings(answers, None if token else cause)
    if coordinator:
        _try_links(config, diagnosis, coordinator)
    try:
        report(diagnosis)
    finally:  # the others must not wait if the output failed
        if coordinator:
            coordinator.dismiss(diagnosis.exit_code)
    return diagnosis.exit_code


def visit(config: RunConfig, ranks: Ranks, mine: Facts) -> int:
    """Take part in the checks, on any rank but 0, and return the exit code.

    Raises:
        PeerError: Rank 0 cannot be reached.
    """
    timeout_s = config.runtime.timeout_s
    worker = Worker(reach_store(ranks, timeout_s, os.environ), mine, timeout_s)
    hosts = worker.answer(Path(config.output_dir))
    return worker.report(_measure(config, hosts).fault if hosts else "")


def _try_links(config: RunConfig, diagnosis: Diagnosis, coordinator: Coordinator) -> None:
    """Join the group, unless it is known to fail, and put down what comes of it."""
    if any(code in (ExitCode.CONFIG, ExitCode.PEER) for code, _ in diagnosis.findings):
        coordinator.give_word(None)
        return
    hosts = known_hosts(diagnosis.answers.facts, diagnosis.world_size)
    coordinator.give_word(hosts)
    measured = _measure(config, hosts)
    diagnosis.measured = measured
    texts = {0: measured.fault, **coordinator.hear(_REPORTS_S)}
    reports = list(dict.fromkeys(text for text in texts.values() if text))
    diagnosis.findings += [Finding(ExitCode.PEER, text) for text in reports[:_SHOWN_REPORTS]]
    diagnosis.findings += judge_links(measured.links)


def _measure(config: RunConfig, hosts: Sequence[str]) -> Measured:
    """Join the group and time it; every rank calls this. A fault is returned, not raised."""
    measured, place = Measured(), config.runtime
    try:
        with start_runtime(
            backend=place.backend, device=place.device, timeout_s=place.timeout_s
        ) as runtime:
            measured.timings = time_all_ranks(runtime)
            measured.links, measured.num_left_out = time_pairs(runtime, hosts)
    except UserError as error:
        measured.fault = str(error)
    except Exception as error:  # any error of a backend
        measured.fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return measured
