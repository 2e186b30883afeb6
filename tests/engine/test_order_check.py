"""Orders that ranks do not agree on, or that a resume would mix, are refused."""

import pytest
from orders import by_batch, by_rank, named, shorter_later, train, with_repeats
from ranks import run_ranks

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import ConfigError, RefusedError


def test_ranks_with_different_orders_do_not_start(tmp_path):
    ends = run_ranks(2, train, str(tmp_path), named(by_rank), raises=True)
    assert {end.error for end in ends} <= {"ConfigError", "RemoteError"}
    (text, *_) = [end.text for end in ends if end.error == "ConfigError"]
    assert "ConfigError: data.order gives 30 indices with the digest " in text
    assert " on rank 0 " in text
    assert "; let the indices follow from the arguments (n, seed, epoch, glo" in text


def test_one_rank_has_nobody_to_differ_from(tmp_path):
    result, _ = train(Runtime(), tmp_path, named(by_rank))
    assert (result.status, result.samples) == ("finished", 90)


def test_a_resume_with_another_order_is_refused(tmp_path):
    train(Runtime(), tmp_path, named(with_repeats), looks=2)
    for order in ("shuffled", "sequential", named(by_batch)):
        with pytest.raises(RefusedError, match=r"of another configuration: .*data\.order.* was "):
            train(Runtime(), tmp_path, order)


@pytest.mark.parametrize("before", ["shuffled", "sequential"])
def test_an_epoch_does_not_go_on_in_another_order_from_a_checkpoint_elsewhere(before, tmp_path):
    train(Runtime(), tmp_path, before, looks=2)
    after = {"shuffled": "sequential", "sequential": "shuffled"}[before]
    with pytest.raises(RefusedError, match=r"the order of samples was \S+, is \S+;"):
        train(Runtime(), tmp_path, after, name="y", resume=str(tmp_path / "digits"))


def test_an_epoch_does_not_go_on_with_a_batch_that_the_order_depends_on(tmp_path):
    train(Runtime(), tmp_path, named(by_batch), looks=2)
    halves = {"batch_size": 4}
    words = "gives another order for a global batch of 4 than for 8, .*; set on_resize=keep"
    with pytest.raises(RefusedError, match=words):
        train(
            Runtime(),
            tmp_path,
            named(by_batch),
            name="y",
            resume=str(tmp_path / "digits"),
            data=halves,
        )


def test_an_epoch_goes_on_with_another_batch_where_the_order_stays(tmp_path):
    train(Runtime(), tmp_path, named(with_repeats), looks=2)
    halves = {"batch_size": 4}
    result, _ = train(
        Runtime(),
        tmp_path,
        named(with_repeats),
        name="y",
        resume=str(tmp_path / "digits"),
        data=halves,
    )
    assert (result.status, result.samples) == ("finished", 3 * 37)


def test_an_order_that_was_edited_does_not_end_an_epoch(tmp_path, monkeypatch):
    train(Runtime(), tmp_path, named(with_repeats), looks=2)
    monkeypatch.setattr("orders.with_repeats", lambda *_: range(30))
    with pytest.raises(RefusedError, match="gives 30 indices while .* of step 3 is in the middle"):
        train(Runtime(), tmp_path, named(with_repeats))


def test_what_changes_in_a_later_epoch_ends_the_run_there(tmp_path):
    with pytest.raises(ConfigError, match="shorter_later, which in epoch 1 gives 29 indices, and"):
        train(Runtime(), tmp_path, named(shorter_later))
