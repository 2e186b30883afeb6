"""The W&B server of the tests must not lose what it was sent."""

from wandb_stub import WandbStub


def _piece(offset, *steps):
    rows = [f'{{"step": {step}}}' for step in steps]
    return {"files": {"wandb-history.jsonl": {"offset": offset, "content": rows}}}


def test_rows_come_together_whatever_pieces_they_are_sent_in():
    with WandbStub() as stub:
        for piece in (
            _piece(0, 10),
            _piece(1, 20, 30),
            _piece(1, 20, 30),
            {"complete": True, "exitcode": 0},
        ):
            stub.stream("trial", piece)
    assert [row["step"] for row in stub.rows["trial"]] == [10, 20, 30]


def _bucket(stub, name):
    variables = {"project": "p", "entity": None, "name": name}
    return stub.answer("RunResumeStatus", variables)["model"]["bucket"]


def test_a_run_that_is_known_can_be_resumed_where_it_ended():
    with WandbStub() as stub:
        assert _bucket(stub, "trial") is None
        stub.answer("UpsertBucket", {"name": "trial", "config": '{"epochs": {"value": 2}}'})
        stub.stream("trial", _piece(0, 10, 20))
        stub.stream("trial", {"files": {"wandb-events.jsonl": {"offset": 1, "content": ["{}"]}}})
        stub.stream("trial", {"files": {"wandb-summary.json": {"content": ['{"step": 20}']}}})
        bucket = _bucket(stub, "trial")
    assert (bucket["historyLineCount"], bucket["eventsLineCount"]) == (2, 2)
    assert bucket["historyTail"] == '["{\\"step\\": 20}"]'
    assert bucket["summaryMetrics"] == '{"step": 20}'
    assert bucket["config"] == '{"epochs": {"value": 2}}'
    assert "t" in bucket["wandbConfig"]


def test_a_summary_replaces_the_one_before():
    with WandbStub() as stub:
        for summary in ('{"step": 20, "best": 1}', '{"step": 30}'):
            stub.stream("trial", {"files": {"wandb-summary.json": {"content": [summary]}}})
    assert stub.summaries["trial"] == {"step": 30}
