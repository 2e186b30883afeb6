"""Well-known training scripts, ported: each takes the steps of its plain torch loop, on any split,
stopped or not, with and without loader processes.
"""

import ast
from functools import cache
from pathlib import Path

import pytest
from ports.harness import (
    NAMES,
    build_model,
    distance,
    double_precision,
    port_of,
    take_by_hand,
    train,
    train_in_two_attempts,
    unpacked,
    weights_of,
)
from ranks import run_ranks

from ddp_sgd.distributed.runtime import Runtime

# A float64 sum of k terms in another order differs by about sqrt(k) units of 1.1e-16; here k is
# below 1e4, and some ten steps through a momentum of 0.9 multiply that by less than 100.
TOLERANCE = 1e-12
WHOLE_BATCH = {name for name in NAMES if getattr(port_of(name), "NEEDS_THE_WHOLE_BATCH", False)}
"""Ports whose loss compares the samples of a batch: they train on one rank without accumulation."""
SPLIT = [name for name in NAMES if name not in WHOLE_BATCH]


def train_them(runtime, folder):
    """Train all ports that can be split, on this rank of several, in two micro-batches each."""
    return {
        name: [
            way(port_of(name), runtime, folder / name / number, accumulate=2)
            for number, way in {"whole": train, "stopped": train_in_two_attempts}.items()
        ]
        for name in SPLIT
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(2, train_them, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    @cache
    def trained(name):
        return unpacked(train(port_of(name), Runtime(), tmp_path_factory.mktemp(name)))

    return trained


@pytest.mark.parametrize("name", NAMES)
def test_a_port_is_short(name):
    text = Path(port_of(name).__file__).read_text()
    by_hand = next(each for each in ast.parse(text).body if getattr(each, "name", "") == "by_hand")
    assert len(text.splitlines()) - (by_hand.end_lineno - by_hand.lineno) <= 80


def test_the_documents_name_all_ports():
    page = (Path(__file__).resolve().parents[2] / "docs/models.md").read_text()
    assert [name for name in NAMES if f"| `{name}.py` |" not in page] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_port_takes_the_steps_of_its_plain_loop(name, one_rank):
    weights, scores = take_by_hand(port_of(name))
    outcome = one_rank(name)
    assert outcome["step"] >= 3
    assert distance(outcome["weights"], weights) <= TOLERANCE
    with double_precision():
        start = weights_of(build_model(port_of(name)))
    assert distance(outcome["weights"], start) > 1e-3
    for key, value in scores.items():
        assert outcome["scores"][key] == pytest.approx(float(value), rel=1e-12), key


@pytest.mark.parametrize("name", SPLIT)
def test_two_ranks_of_two_micro_batches_take_the_same_steps(name, one_rank, two_ranks):
    expected = one_rank(name)
    first, second = (unpacked(rank[name][0]) for rank in two_ranks)
    assert distance(first["weights"], expected["weights"]) <= TOLERANCE
    assert first["digest"] == second["digest"]
    assert first["scores"] == second["scores"]
    assert first["scores"] == pytest.approx(expected["scores"], rel=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_stopped_gives_the_same_bits(name, one_rank, tmp_path):
    resumed = unpacked(train_in_two_attempts(port_of(name), Runtime(), tmp_path))
    assert resumed["digest"] == one_rank(name)["digest"]
    assert resumed["scores"] == one_rank(name)["scores"]


@pytest.mark.parametrize("name", SPLIT)
def test_two_ranks_that_were_stopped_give_the_same_bits(name, two_ranks):
    whole, stopped = map(unpacked, two_ranks[0][name])
    assert stopped["digest"] == whole["digest"]
    assert stopped["scores"] == whole["scores"]


@pytest.mark.parametrize("name", NAMES)
def test_loader_processes_give_the_same_bits(name, one_rank, tmp_path):
    data = {"workers": 2}
    outcome = unpacked(train(port_of(name), Runtime(), tmp_path, data=data))
    assert outcome["digest"] == one_rank(name)["digest"]
    assert outcome["scores"] == one_rank(name)["scores"]


@pytest.mark.parametrize("name", WHOLE_BATCH)
def test_a_loss_that_compares_samples_is_named_before_the_run(name, tmp_path, capsys):
    train(port_of(name), Runtime(), tmp_path)
    assert "trained as a mean" in capsys.readouterr().out
