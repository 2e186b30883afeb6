import json

import pytest

from ddp_sgd.errors import ExitCode, OutputError
from ddp_sgd.report.run_folder import result_from_rows, write_result

ROWS = [
    {"event": "start", "step": 0, "epoch": 0.0, "samples": 0, "world_size": 4},
    {"event": "resume", "step": 2, "epoch": 0.5, "samples": 64, "world_size": 2},
    {"event": "train", "step": 3, "epoch": 0.75, "samples": 96},
]


@pytest.mark.parametrize(
    ("code", "status"), [(ExitCode.STOPPED, "stopped"), (ExitCode.PEER, "failed")]
)
def test_a_result_stands_at_the_last_row_with_the_ranks_of_the_last_beginning(code, status):
    assert result_from_rows(ROWS, exit_code=code, error="x") == {
        "status": status,
        "exit_code": int(code),
        "step": 3,
        "epoch": 0.75,
        "samples": 96,
        "world_size": 2,
        "error": "x",
    }


def test_a_result_is_written_whole(tmp_path):
    path = tmp_path / "result.json"
    write_result(path, {"step": 3})
    assert json.loads(path.read_text()) == {"step": 3}
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_that_cannot_be_written_is_an_error_of_the_output(tmp_path):
    with pytest.raises(OutputError, match=r"result.json cannot be written: .*; set output_dir"):
        write_result(tmp_path / "none" / "result.json", {})
