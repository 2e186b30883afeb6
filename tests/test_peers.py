"""The comparison with other frameworks, in short; ``make bench`` runs the whole one."""

import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import commands
import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers.lineup import CONTESTANTS
from benchmarks.peers.measuring import Record
from benchmarks.peers.report import differences, report
from benchmarks.peers.task import WORKLOADS

ROOT = Path(__file__).resolve().parents[1]
STEPS = {1: 90, 2: 46}
"""Two epochs of the digits."""


@pytest.mark.timeout(900)
def test_everybody_does_the_same_work(tmp_path):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    lines = tmp_path / "records.jsonl"
    command = ["-m", "benchmarks.peers", "--short", f"--records={lines}", f"--write={tmp_path}"]
    done = commands.run(
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
        for figure in ("steps_per_s", "first_step_s", "whole_s", "peak_mb", "loss"):
            assert getattr(each, figure) > 0, (figure, each)
        assert each.cpu_us + each.other_cpu_us > 0, each  # the clock of a short run may not move
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


def test_ratios_are_taken_within_a_round():
    records = [
        made_up(number=number, contestant=name, steps_per_s=speed * (1 + number))
        for number in range(3)
        for name, speed in (("ddp_sgd", 8.0), ("fabric", 2.0), ("ignite", 1.0))
    ]
    headline = next(report(records))
    assert "| speed / Lightning Fabric | 4.00 (4.00 to 4.00) |" in headline
    assert "| speed / the fastest framework | 4.00 (4.00 to 4.00) |" in headline
    assert "| **ddp_sgd**, steps / s | 16.0 (8.00 to 24.0) |" in headline


def test_the_tables_name_all_and_what_was_measured():
    headline, *others = report(everybody())
    assert headline.startswith(
        "|  | MLP, 1 rank | MLP, 2 ranks | ConvNet, 1 rank | ConvNet, 2 ranks | ResNet-18, 1 rank |"
    )
    text = "\n".join(others)
    for contestant in CONTESTANTS.values():
        assert f"| {contestant.title} |" in text
        assert contestant.is_ours or f"speed / {contestant.title} |" in headline
    assert "Every contestant took the same number of steps" in text


def test_the_headline_has_the_best_framework_of_each_case():
    figures = {"first_step_s": 0.5, "peak_mb": 0.25}
    names = {"ddp_sgd": {}, "fabric": figures, "trainer": {"steps_per_s": 4.0}}
    records = [made_up(contestant=name, **changes) for name, changes in names.items()]
    headline = next(report(records))
    assert "| speed / the fastest framework | 0.250 |" in headline
    assert "| first step, s: the best framework | 0.500 |" in headline
    assert "| MB per rank: the best framework | 0.250 |" in headline
    assert "| speed / accelerate |  |" in headline


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


def test_each_goes_first_in_turn():
    options = peers.option_parser().parse_args([])
    firsts = [peers.order(options, "convnet", 2, number)[0] for number in range(8)]
    assert sorted(firsts) == sorted(set(CONTESTANTS) - {"bare", "rarely"})


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
