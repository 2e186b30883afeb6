import pytest

from ddp_sgd.doctor.facts import leave_token, sees_token


def test_a_token_is_there_for_a_while_and_leaves_no_trace(tmp_path):
    folder = tmp_path / "a" / "b"
    with leave_token(folder) as (token, why):
        assert (folder / token).read_text().startswith("python -m ddp_sgd.doctor")
        assert why == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "kept").write_text("x")
    with leave_token(tmp_path) as (token, _):
        assert {path.name for path in tmp_path.iterdir()} == {"kept", token}
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_token_goes_whatever_happens(tmp_path):
    with pytest.raises(ValueError, match="x"), leave_token(tmp_path / "a"):
        raise ValueError("x")
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_else_writes_meanwhile_stays(tmp_path):
    with leave_token(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "run").mkdir()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run"]


def test_a_folder_that_cannot_be_written_is_told_of(tmp_path):
    (tmp_path / "file").write_text("x")
    with leave_token(tmp_path / "file" / "runs") as (token, why):
        assert token is None
        assert why == "Not a directory"
    with leave_token(tmp_path / ("x" * 300)) as (token, why):
        assert (token, why) == (None, "File name too long")


def test_who_sees_the_token(tmp_path):
    with leave_token(tmp_path) as (token, _):
        assert sees_token(tmp_path, token)
        assert not sees_token(tmp_path / "other", token)
        assert not sees_token(tmp_path / ("x" * 300), token)
    assert not sees_token(tmp_path, token)
    assert not sees_token(tmp_path, None)
