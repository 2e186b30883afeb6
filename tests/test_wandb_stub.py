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
