"""The campaign of faults, in short; ``make soak`` runs the long one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak import __main__ as soak
from benchmarks.soak.faults import FAULTS
from benchmarks.soak.job import SpoiltDigits

ROOT = Path(__file__).resolve().parents[1]
SEED = 46
"""Draws five kinds of faults, among them a freeze and a damaged file."""


@pytest.mark.timeout(600)
def test_a_run_ends_as_if_nothing_had_happened():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak", "--faults=5", f"--seed={SEED}"],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Kept: the weights equal those of the undisturbed run bit by bit" in done.stdout
    assert "| all | 5 |" in done.stdout


class Ended:
    """A run that has ended, as the judge looks at it."""

    def __init__(self, digest="a", samples=(64, 128), skipped=0, lr=0.1):
        self._digest, self._samples, self._skipped, self._lr = digest, samples, skipped, lr

    def result(self):
        return {"weights_digest": self._digest, "samples": 128}

    def rows(self):
        return [
            {
                "event": "train",
                "step": 100 * number,
                "samples": samples,
                "train/lr": self._lr,
                "train/skipped_steps": self._skipped,
            }
            for number, samples in enumerate(self._samples, start=1)
        ]


@pytest.mark.parametrize(
    ("job", "broken"),
    [
        (Ended(), []),
        (Ended(digest="b"), ["the weights are not those"]),
        (Ended(lr=0.2), ["the journal is not that"]),
        (Ended(skipped=1), ["the journal is not that"]),
        (Ended(samples=(64,)), ["the journal is not that", "samples twice, or not at all"]),
        (Ended(samples=(64, 64, 128)), ["the journal is not that", "samples twice"]),
    ],
)
def test_the_judge_finds_what_is_broken(job, broken, tmp_path):
    found = soak.judge(job, Ended(), [], bomb=tmp_path / "bomb")
    assert len(found) == len(broken)
    for text, line in zip(broken, found, strict=True):
        assert text in line


def test_the_judge_finds_a_bomb_and_a_checkpoint_that_was_passed_over(tmp_path):
    (tmp_path / "bomb").touch()
    passed = soak.Met("kill", step=250, back_at=100, whole_at=200, recovery_s=1.0)
    fine = soak.Met("kill", step=250, back_at=200, whole_at=200, recovery_s=1.0)
    found = soak.judge(Ended(), Ended(), [fine, passed], bomb=tmp_path / "bomb")
    assert found == ["a whole checkpoint was passed over", "the bomb was run"]


def test_every_fault_says_what_it_does():
    assert all(fault.__doc__ and weight > 0 for fault, weight in FAULTS.values())


def test_what_is_spoilt_is_spoilt_for_good():
    assert SpoiltDigits(1.0)[3][0].isnan().all()
    assert not SpoiltDigits(0.0)[3][0].isnan().any()
