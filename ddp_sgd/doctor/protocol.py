"""Protocol of the doctor: rank 0 coordinates, every other rank is a worker."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.environment import Ranks
from ddp_sgd.distributed.runtime import start_runtime
from ddp_sgd.doctor.exchange import Coordinator, Worker
from ddp_sgd.doctor.facts import Answers, Facts
from ddp_sgd.doctor.findings import (
    Finding,
    exit_code,
    judge_facts,
    judge_links,
    judge_surroundings,
    known_hosts,
    summarize,
)
from ddp_sgd.doctor.links import Link, Timing, time_all_ranks, time_pairs
from ddp_sgd.doctor.shared_folder import leave_token
from ddp_sgd.doctor.store import reach_store
from ddp_sgd.doctor.tables import facts_table, link_table, timing_table
from ddp_sgd.errors import ExitCode, UserError
from ddp_sgd.time_limits import scaled

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
        measured: How fast they talk.
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
    config: RunConfig, ranks: Ranks, mine: Facts, tell: Callable[[Diagnosis], None]
) -> int:
    """Examine all ranks, from rank 0, and return the exit code.

    Args:
        config: Description of the run.
        ranks: This process.
        mine: Facts of this rank.
        tell: Is called once, before any other rank leaves: launchers end all with the first.

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
        tell(diagnosis)
    finally:  # the others must not wait, whatever became of the output
        if coordinator:
            coordinator.dismiss(diagnosis.exit_code)
    return diagnosis.exit_code


def visit(config: RunConfig, ranks: Ranks, mine: Facts) -> int:
    """Take part in the checks, on any rank but 0, and return the exit code.

    Args:
        config: Description of the run.
        ranks: This process.
        mine: Facts of this rank.

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
    told = list(dict.fromkeys(text for text in texts.values() if text))
    diagnosis.findings += [Finding(ExitCode.PEER, text) for text in told[:_SHOWN_REPORTS]]
    diagnosis.findings += judge_links(measured.links)


def _measure(config: RunConfig, hosts: Sequence[str]) -> Measured:
    """Join the group and time it; every rank calls this. A fault is told, not raised."""
    measured, place = Measured(), config.runtime
    try:
        with start_runtime(
            backend=place.backend, device=place.device, timeout_s=place.timeout_s
        ) as runtime:
            measured.timings = time_all_ranks(runtime)
            measured.links, measured.num_left_out = time_pairs(runtime, hosts)
    except UserError as error:
        measured.fault = str(error)
    except Exception as error:  # whatever a backend raises
        measured.fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return measured
