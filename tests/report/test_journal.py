import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ddp_sgd.errors import DataError, ExitCode, OutputError
from ddp_sgd.files import replace_file
from ddp_sgd.report.journal import FILE_NAME, Journal, JournalTail, Origin, read_journal

NEW = Origin(run_id="0a1b2c3d")
ROW = {"time": 1.7e9, "step": 10, "epoch": 0.5, "samples": 320, "train/loss": 2.25}


def _written(folder, *rows):
    journal = Journal()
    journal.start(SimpleNamespace(folder=folder, origin=NEW))
    journal.write(rows)
    journal.finish({})
    return folder / FILE_NAME


def test_a_line_is_the_event_and_the_row_as_it_is(tmp_path):
    path = _written(tmp_path, ("train", ROW))
    assert path.read_text() == (
        '{"event": "train", "time": 1700000000.0, "step": 10, "epoch": 0.5, "samples": 320, '
        '"train/loss": 2.25}\n'
    )


def test_what_was_written_is_read_back(tmp_path):
    path = _written(tmp_path, ("start", {"note": "Größe"}), ("train", ROW), ("end", {"step": 20}))
    assert read_journal(path) == [
        {"event": "start", "note": "Größe"},
        {"event": "train", **ROW},
        {"event": "end", "step": 20},
    ]


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    journal = Journal()
    journal.start(SimpleNamespace(folder=tmp_path, origin=NEW))
    journal.write([("train", ROW), ("eval", ROW)])
    assert len(read_journal(tmp_path / FILE_NAME)) == 2
    journal.finish({})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_json_has_no_word_for_is_a_mistake_of_ours(tmp_path, value):
    journal = Journal()
    journal.start(SimpleNamespace(folder=tmp_path, origin=NEW))
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.write([("train", {"train/loss": value})])
    journal.finish({})


def test_a_journal_goes_on_where_it_ended(tmp_path):
    _written(tmp_path, ("train", ROW))
    path = _written(tmp_path, ("end", ROW))
    assert [row["event"] for row in read_journal(path)] == ["train", "end"]


@pytest.mark.parametrize("torn", [b'{"event": "tr', b'{"event": "Gr\xc3', b'{"step": 1', b"{"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    path = _written(tmp_path, ("train", ROW))
    with path.open("ab") as file:
        file.write(torn)
    assert [row["event"] for row in read_journal(path)] == ["train"]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = _written(tmp_path, ("train", ROW))
    with path.open("ab") as file:
        file.write(b'{"event": "end"}')
    assert [row["event"] for row in read_journal(path)] == ["train", "end"]


@pytest.mark.parametrize("broken", [b"{\n", b"\n", b"17\n", b"\xff\n"])
def test_a_broken_line_is_named(tmp_path, broken):
    path = _written(tmp_path, ("train", ROW))
    with path.open("ab") as file:
        file.write(broken)
    with pytest.raises(DataError, match=rf"{FILE_NAME}:2 is not a JSON object; "):
        read_journal(path)


def test_a_missing_journal_is_named(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl is not readable \(No such file"):
        read_journal(tmp_path / FILE_NAME)


def test_an_empty_journal_has_no_rows(tmp_path):
    assert read_journal(_written(tmp_path)) == []


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match=r"metrics\.jsonl cannot be written: .*; set output_dir"):
        Journal().start(SimpleNamespace(folder=tmp_path / "missing", origin=NEW))


def test_a_line_that_did_not_fit_leaves_nothing_of_itself(tmp_path):
    """Else a later line that fits would follow half of it, and the journal could not be read."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from types import SimpleNamespace;"
        "from ddp_sgd.errors import OutputError;"
        "from ddp_sgd.report.journal import Journal, Origin;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); journal = Journal();"
        "journal.start(SimpleNamespace(folder=Path(sys.argv[1]), origin=Origin(run_id='')));"
        "journal.write([('train', {'step': 1})]);"
        "limit = (Path(sys.argv[1]) / 'metrics.jsonl').stat().st_size + 50;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "rows = [('train', {'step': 2}), ('train', {'step': 3, 'text': 'x' * 200})]\n"
        "try: journal.write(rows)\n"
        "except OutputError: journal.write([('end', {})])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    rows = read_journal(tmp_path / FILE_NAME)
    assert [(row["event"], row.get("step")) for row in rows] == [
        ("train", 1),
        ("train", 2),
        ("end", None),
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_output_error_and_closing_is_quiet(tmp_path):
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    journal = Journal()
    journal.start(SimpleNamespace(folder=tmp_path, origin=NEW))
    with pytest.raises(OutputError, match="No space left on device; set output_dir") as caught:
        journal.write([("train", ROW)])
    assert caught.value.exit_code == ExitCode.OUTPUT
    journal.finish({})


def test_a_failure_that_shows_on_closing_is_an_output_error(tmp_path, monkeypatch):
    class Failing:
        def close(self):
            raise OSError(5, "Input/output error")

    journal = Journal()
    monkeypatch.setattr(journal, "_file", Failing())
    with pytest.raises(OutputError, match="Input/output error"):
        journal.finish({})


def test_a_row_before_the_start_is_a_mistake_of_ours_and_an_end_is_not():
    journal = Journal()
    with pytest.raises(RuntimeError, match="came before the journal was started"):
        journal.write([("train", ROW)])
    journal.finish({})


def tail_of(folder, *lines):
    path = folder / FILE_NAME
    path.write_text("".join(lines))
    return path, JournalTail(path)


def steps(tail, *, is_over=False):
    return [row["step"] for row in tail.read(is_over=is_over)]


def test_a_tail_gives_every_row_once_as_it_comes(tmp_path):
    path, tail = tail_of(tmp_path, '{"step": 1}\n{"step": 2}\n{"st')
    assert steps(tail) == [1, 2]
    assert steps(tail) == []
    with path.open("a") as stream:
        stream.write('ep": 3}\n{"step": 4}')
    assert steps(tail) == [3]
    assert steps(tail, is_over=True) == [4], "the newline was lost in a crash"
    tail.close()


def test_a_tail_leaves_a_torn_line_out(tmp_path):
    _, tail = tail_of(tmp_path, '{"step": 1}\n{"st')
    assert steps(tail, is_over=True) == [1]
    tail.close()


def test_a_tail_begins_again_where_the_journal_was_replaced(tmp_path):
    path, tail = tail_of(tmp_path, '{"step": 1}\n{"step": 2}\n')
    assert steps(tail) == [1, 2]
    replace_file(path, '{"step": 1}\n{"step": 7}\n')
    assert steps(tail) == [1, 7]
    path.write_text('{"step": 1}\n')  # in place
    assert steps(tail) == [1]
    tail.close()


def test_a_tail_waits_for_a_journal_and_names_damage(tmp_path):
    tail = JournalTail(tmp_path / FILE_NAME)
    assert steps(tail) == []
    tail.close()
    _, tail = tail_of(tmp_path, '{"step": 1}\nzero\n')
    with pytest.raises(DataError, match=rf"{FILE_NAME}:2 is not a JSON object; "):
        steps(tail)
    tail.close()
    with pytest.raises(DataError, match="is not readable"):
        steps(JournalTail(tmp_path))
