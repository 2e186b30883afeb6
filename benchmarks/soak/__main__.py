"""A hundred faults in one run of 2 ranks, which must end as if nothing had happened.

Usage: ``python -m benchmarks.soak [--faults 100] [--seed 0] [--write benchmarks/results]``. The
exit code is 1 if a promise was broken.

A rank that is killed loses at most the steps since the newest checkpoint, an interval, and those
that were trained while that was being written. Where the fault destroyed the newest checkpoint as
well, or kept it from being written, that interval comes on top.
"""

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.soak.faults import FAULTS
from benchmarks.soak.job import INTERVAL, ROWS, Job
from ddp_sgd.checkpointing.store import CheckpointFolder

STEPS_PER_FAULT = 184
"""Eight epochs of 23 steps."""
DISK_BYTES = 64 << 20
BROKEN = "Broken"
"""Marks a promise that was broken."""


class Met(NamedTuple):
    """A fault that was met."""

    name: str
    step: int  # last step in the journal before
    back_at: int | None  # step from which the run went on; None if it was not started again
    whole_at: int  # step of the newest whole checkpoint that the fault left
    recovery_s: float  # time until the next row of training


def measure(options: Namespace) -> Iterator[str]:
    """Run the campaign beside an undisturbed run of as many steps."""
    steps = options.faults * STEPS_PER_FAULT
    spoilt = 0.1 * options.faults / (steps * 64)  # as many NaN batches as a tenth of the faults
    with small_disk() as (disk, is_small):
        names = [name for name in FAULTS if is_small or name != "disk full"]
        whole = Job(disk / "whole", steps, spoilt)
        whole.start()
        whole.wait_for_progress(0.0)
        whole.wait_for("the undisturbed run ends", whole.is_finished)
        job = Job(disk / "disturbed", steps, spoilt)
        met = campaign(job, options.faults, random.Random(options.seed), names)
        broken = judge(job, whole, met, bomb=job.bomb)
        yield from report(met, job, broken)
    if not is_small:
        yield "Left out: the full disk, since this user may not mount one."


@contextlib.contextmanager
def small_disk() -> Iterator[tuple[Path, bool]]:
    """Give a folder on a disk of its own that can be filled, where this user may mount one."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "soak", folder]
        is_small = os.geteuid() == 0 and subprocess.run(mount, check=False).returncode == 0
        try:
            yield Path(folder), is_small
        finally:
            if is_small:
                subprocess.run(["umount", "-l", folder], check=True)


def campaign(job: Job, faults: int, chance: random.Random, names: list[str]) -> list[Met]:
    """Do one thing after the other to a run, each when it has come to a random step.

    Args:
        job: The run; it is started here.
        faults: How many.
        chance: Where the draws come from.
        names: Faults that can be done here.
    """
    total = faults * STEPS_PER_FAULT
    at = sorted(chance.randrange(INTERVAL // 2, total - INTERVAL) for _ in range(faults))
    drawn = chance.choices(names, [FAULTS[name][1] for name in names], k=faults)
    job.start()
    job.wait_for_progress(0.0)
    met = []
    for number, (step, name) in enumerate(zip(at, drawn, strict=True), start=1):
        job.wait_for(f"step {step}", lambda step=step: job.last_row()["step"] >= step)
        time.sleep(chance.uniform(0.0, 0.05))  # somewhere in a step, not right after a row
        before, start = job.last_row(), time.time()
        FAULTS[name][0](job, chance)
        hit, left = time.time(), CheckpointFolder(job.folder / "checkpoints").choose().manifest
        survives = name == "disk full"  # the only one that a run may live through
        row = job.wait_for_progress(hit, resumed=not survives)
        later = _resumed(job.rows())
        back_at = later[-1]["step"] if later and later[-1]["time"] > start else None
        whole_at = left.header.step if left else 0
        met.append(Met(name, before["step"], back_at, whole_at, row["time"] - hit))
        harness.print_progress(f"{number}/{faults} {met[-1]}")
    job.wait_for("the run ends", lambda: job.is_finished() or job.wait_for_progress(0.0) is None)
    return met


def judge(job: Job, whole: Job, met: list[Met], bomb: Path) -> list[str]:
    """List the promises that were broken."""
    broken = []
    if job.result()["weights_digest"] != whole.result()["weights_digest"]:
        broken.append("the weights are not those of the undisturbed run")
    if measurements(job.rows()) != measurements(whole.rows()):
        broken.append("the journal is not that of the undisturbed run")
    samples = [row["samples"] for row in job.rows() if row["event"] == "train"]
    if samples != sorted(set(samples)) or samples[-1] != whole.result()["samples"]:
        broken.append("the journal has samples twice, or not at all")
    if any(each.back_at is not None and each.back_at < each.whole_at for each in met):
        broken.append("a whole checkpoint was passed over")
    if bomb.exists():
        broken.append("the bomb was run")
    return broken


def measurements(rows: list[dict[str, Any]]) -> dict[int, tuple[float, ...]]:
    """Take what must not depend on faults: rate and losses, at the rows that every run has."""
    return {
        row["step"]: (row["samples"], row["train/lr"], row["train/skipped_steps"])
        for row in rows
        if row["event"] == "train" and row["step"] % INTERVAL == 0
    }


def report(met: list[Met], job: Job, broken: list[str]) -> Iterator[str]:
    """Write the result."""
    yield (
        f"{job.result()['step']:,} steps, gloo, a checkpoint every {INTERVAL} steps, a row every "
        f"{ROWS}, `runtime.hang_s=5`."
    )
    rows = []
    for name in [*FAULTS, "all"]:
        some = [each for each in met if name in (each.name, "all")]
        times = sorted(each.recovery_s for each in some)
        backs = [(each.step, each.back_at) for each in some if each.back_at is not None]
        lost = [max(0, step - back_at) for step, back_at in backs] or [0]
        if some:
            p95 = times[max(0, round(0.95 * len(times)) - 1)]
            rows.append((name, len(some), median(times), p95, f"{median(lost):g}", max(lost)))
    headings = "fault | times | back after, s: median | p95 | steps lost: median | most"
    yield harness.markdown_table(headings, rows)
    skipped = int([r for r in job.rows() if r["event"] == "train"][-1]["train/skipped_steps"])
    yield f"Batches with NaN, in both runs alike: {skipped}."
    yield from (f"**{BROKEN}: {promise}.**" for promise in broken)
    if not broken:
        yield (
            "Kept: the weights equal those of the undisturbed run bit by bit, so does the journal "
            "at every checkpoint; every sample was trained once per epoch; no damaged file was "
            "loaded, no bomb was run."
        )


def _resumed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["event"] == "resume"]


if __name__ == "__main__":
    parser = harness.option_parser(__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(f"**{BROKEN}" in harness.run_benchmark("soak", parser, measure))
