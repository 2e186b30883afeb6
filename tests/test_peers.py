"""The comparison with other frameworks, in short; ``make bench`` runs the whole one."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers.equivalence import differences
from benchmarks.peers.goals import goals
from benchmarks.peers.lineup import CONTESTANTS
from benchmarks.peers.measuring import Record
from benchmarks.peers.report import report
from benchmarks.peers.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
STEPS = {1: 90, 2: 46}
"""Two epochs of the digits."""


@pytest.mark.timeout(900)
def test_everybody_does_the_same_work(tmp_path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    lines = tmp_path / "records.jsonl"
    command = ["-m", "benchmarks.peers", "--short", f"--records={lines}", f"--write={tmp_path}"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [Record(**json.loads(line)) for line in lines.read_text().splitlines()]
    who = {ranks: [each.contestant for each in records if each.ranks == ranks] for ranks in (1, 2)}
    assert {ranks: sorted(names) for ranks, names in who.items()} == {
        ranks: sorted(names) for ranks, names in peers.SHORT_CONTESTANTS.items()
    }
    assert all(each.steps == STEPS[each.ranks] for each in records)
    assert differences(records) == []
    for each in records:
        for figure in ("steps_per_s", "cpu_us", "first_step_s", "whole_s", "peak_mb", "loss"):
            assert getattr(each, figure) > 0, (figure, each)
        assert each.first_step_s < each.whole_s
    (file,) = tmp_path.glob("peers_*.md")
    assert file.read_text().strip() == done.stdout.strip()
    assert "ended at the loss of `ddp_sgd`" in done.stdout


def made_up(workload="mlp", ranks=1, number=0, contestant="ddp_sgd", **figures):
    record = Record(
        workload=workload,
        ranks=ranks,
        round=number,
        contestant=contestant,
        **{field.name: 1 for field in fields(Record)[4:]},
    )
    return replace(record, **figures)


def everybody(**ours):
    """Three rounds in which all are alike, but for ours."""
    return [
        made_up(workload, ranks, number, name, **(ours if name == "ddp_sgd" else {}))
        for workload in WORKLOADS
        for ranks in (1, 2)
        for number in range(3)
        for name in CONTESTANTS
        if CONTESTANTS[name].takes_part(workload, ranks)
    ]


def test_goals_are_judged_by_the_median():
    slow = everybody(steps_per_s=0.5, cpu_us=82, first_step_s=2.0, peak_mb=2)
    assert [goal for goal in goals(slow) if goal.is_reached] == []
    quick = everybody(steps_per_s=4.0, cpu_us=80, first_step_s=0.8, peak_mb=0.9)
    found = goals(quick)
    assert all(goal.is_reached for goal in found)
    assert len(found) == 8 + 1 + 4 + 6  # speed, CPU time, the first step, memory
    quick[0] = replace(quick[0], steps_per_s=0.1)  # one round of three
    assert all(goal.is_reached for goal in goals(quick))


def test_ratios_are_taken_within_a_round():
    records = [
        made_up(number=number, contestant=name, steps_per_s=speed * (1 + number))
        for number in range(3)
        for name, speed in (("ddp_sgd", 8.0), ("fabric", 2.0), ("ignite", 1.0))
    ]
    (goal,) = [goal for goal in goals(records) if "framework (fabric)" in goal.text][:1]
    assert goal.values == [4.0, 4.0, 4.0]


def test_the_tables_name_all_and_what_was_measured():
    text = report(everybody(), (0.0, 0.0))
    for contestant in CONTESTANTS.values():
        assert f"| {contestant.title} |" in text
    assert "**not reached**" in text
    assert "Every contestant took the same number of steps" in text


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"contestant": "flat", "loss": 1.005}, ""),
        ({"contestant": "flat", "loss": 1.02}, "loss 1.02000, not 1.00000 +- 0.01"),
        ({"contestant": "fabric", "loss": 1.02}, ""),
        ({"contestant": "fabric", "loss": 1.1}, "loss 1.10000, not 1.00000 +- 0.08"),
        ({"contestant": "fabric", "steps": 2}, "2 steps, not 1"),
        ({"contestant": "bare", "loss": 9.0}, ""),
    ],
)
def test_other_work_is_told(other, found):
    lines = differences([made_up(), made_up(**other)])
    assert len(lines) == bool(found)
    assert found in "".join(lines)


def test_each_goes_first_in_turn(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peers", "--workloads", "convnet", "--rounds=9"])
    runs = peers.schedule(peers.read_options())
    firsts = [
        next(name for _, r, n, name in runs if (r, n) == (ranks, number))
        for ranks in (1, 2)
        for number in range(9)
    ]
    assert sorted(firsts[:9]) == sorted(firsts[9:]) == sorted(set(CONTESTANTS) - {"bare", "rarely"})


def test_a_program_that_fails_is_told(tmp_path):
    from benchmarks.peers.watching import Watch

    command = [sys.executable, "-c", "raise SystemExit('no luck')"]
    with pytest.raises(RuntimeError, match="(?s)ended with 1:.*no luck"):
        Watch(command, dict(os.environ), tmp_path / "log", ranks=1)


def test_cpu_time_of_ranks_and_of_what_they_start_is_told_apart(tmp_path):
    from benchmarks.peers.watching import Watch

    burn = "import time\nwhile time.process_time() < 0.5: pass"
    program = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])"
    watch = Watch([sys.executable, "-c", program], dict(os.environ), tmp_path / "log", ranks=1)
    assert watch.other_cpu_s(watch.start, watch.end) == pytest.approx(0.5, abs=0.2)
    assert watch.rank_cpu_s(watch.start, watch.end) < 0.3
    assert watch.peak_mb() > 1
