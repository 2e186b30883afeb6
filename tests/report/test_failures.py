import json

import pytest

from ddp_sgd.errors import RepeatedFailureError
from ddp_sgd.report.run_folder import FILE_NAME, note_failure, refuse_endless_failure

RESTART = {"TORCHELASTIC_RESTART_COUNT": "2"}


def fail(folder, *steps, code=65):
    for step in steps:
        note_failure(folder, step, code, f"the sample at step {step} is bad.")


@pytest.mark.parametrize("restart", [RESTART, {"SLURM_RESTART_COUNT": "1"}])
def test_three_failures_at_one_step_are_enough(restart, tmp_path):
    fail(tmp_path, 40, 57, 57, 57)
    with pytest.raises(RepeatedFailureError, match="failed 3 times in a row at step 57") as caught:
        refuse_endless_failure(tmp_path, restart)
    assert caught.value.exit_code == 65
    assert str(caught.value).endswith("fix what ended it: the sample at step 57 is bad.")


@pytest.mark.parametrize("steps", [(), (57, 57), (57, 40, 57), (57, 57, 40), (57, 57, 57, 58)])
def test_failures_here_and_there_are_survived(steps, tmp_path):
    fail(tmp_path, *steps)
    refuse_endless_failure(tmp_path, RESTART)


def test_a_person_gets_all_chances_anew(tmp_path):
    fail(tmp_path, 57, 57, 57)
    refuse_endless_failure(tmp_path, {"TORCHELASTIC_RESTART_COUNT": "0"})
    refuse_endless_failure(tmp_path, RESTART)  # what was before the start does not count any more


def test_a_lost_peer_says_nothing_about_the_run(tmp_path):
    fail(tmp_path, 57, 57, 57, code=69)
    refuse_endless_failure(tmp_path, RESTART)
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("text", ["", "{", '{"step": 57}\nnonsense\n'])
def test_a_torn_ledger_stops_nobody(text, tmp_path):
    (tmp_path / FILE_NAME).write_text(text)
    refuse_endless_failure(tmp_path, RESTART)


def test_a_failure_is_one_line_with_its_step_code_and_reason(tmp_path):
    fail(tmp_path, 3)
    row = json.loads((tmp_path / FILE_NAME).read_text())
    assert row.pop("time") > 1e9
    assert row == {"step": 3, "exit_code": 65, "error": "the sample at step 3 is bad."}


def test_the_last_failure_that_is_allowed_says_so(tmp_path):
    fail(tmp_path, 3, 57, 57, 57)
    rows = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert [row.get("gives_up") for row in rows] == [None, None, None, True]
