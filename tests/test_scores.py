import math

import pytest

from ddp_sgd.scores import choosing_score, goodness, prefix_of, scored_sets


@pytest.mark.parametrize(
    ("key", "prefix"),
    [("data.eval", "eval"), ("data.eval.a-B_1", "eval/a-B_1"), ("data.test", "test")],
)
def test_the_names_of_scores_follow_from_the_key_of_the_data(key, prefix):
    assert prefix_of(key) == prefix


def test_the_sets_of_a_row_come_in_its_order():
    row = {"step": 3, "eval/b/loss": 1.0, "eval/b/count": 2, "eval/a/loss": 0.0, "eval/a/count": 2}
    assert scored_sets(row) == ["eval/b", "eval/a"]
    assert scored_sets({"test/step": 3, "test/loss": 1.0, "test/count": 2}) == ["test"]
    assert scored_sets({"train/loss": 1.0, "train/count": 3}) == []


def test_the_first_set_chooses_by_accuracy_or_else_by_loss():
    second = {"eval/a/loss": 0.1, "eval/a/accuracy": 1.0}
    assert choosing_score({"eval/b/loss": 9.0, "eval/b/accuracy": 0.5, **second}) == (
        "eval/b/accuracy"
    )
    assert choosing_score({"eval/b/loss": 9.0, **second}) == "eval/b/loss"
    assert choosing_score({"test/step": 3, "eval/loss": 9.0}) == "eval/loss"
    assert choosing_score({}) == "eval/loss"


def test_an_evaluation_without_a_number_is_the_worst():
    assert goodness({"eval/b/loss": 9.0}) == -9.0
    assert goodness({"eval/b/loss": 9.0, "eval/b/accuracy": 0.5}) == 0.5
    assert goodness({"eval/loss": math.nan}) == goodness({}) == -math.inf
