import errno
import os

import pytest

from ddp_sgd import files
from ddp_sgd.files import PAUSES_S, is_missing, is_taken, retry, unreadable


@pytest.fixture
def pauses(monkeypatch):
    taken = []
    monkeypatch.setattr(files, "sleep", taken.append)
    return taken


class Failing:
    """Fails with these numbers, one a call, then gives the number of the call."""

    def __init__(self, *numbers):
        self.numbers = numbers
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls <= len(self.numbers):
            raise OSError(self.numbers[self.calls - 1], "told by the test")
        return self.calls


PASSING = ("ESTALE", "EIO", "ETIMEDOUT", "EINTR", "EAGAIN", "EREMOTEIO", "EHOSTDOWN", "ENOMEM")
FINAL = ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "EACCES", "EPERM")


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("failures", range(4))
def test_what_may_pass_is_tried_again_after_growing_pauses(name, failures, pauses):
    assert retry(Failing(*[getattr(errno, name)] * failures)) == failures + 1
    assert pauses == list(PAUSES_S[:failures])
    assert list(PAUSES_S) == sorted(PAUSES_S)


@pytest.mark.parametrize("name", PASSING)
def test_the_number_of_attempts_is_bounded(name, pauses):
    read = Failing(*[getattr(errno, name)] * 9)
    with pytest.raises(OSError, match="told by the test"):
        retry(read)
    assert read.calls == 4
    assert sum(pauses) < 2.0


@pytest.mark.parametrize("name", FINAL)
def test_what_would_be_answered_alike_is_not_asked_again(name, pauses):
    read = Failing(getattr(errno, name))
    with pytest.raises(OSError, match="told by the test"):
        retry(read)
    assert (read.calls, pauses) == (1, [])


def test_an_error_without_a_number_is_none_of_the_disk(pauses):
    with pytest.raises(OSError, match="told by the test"):
        retry(Failing(None))
    assert pauses == []


def test_only_what_is_not_there_is_missing():
    names = [name for name in (*PASSING, *FINAL) if is_missing(OSError(getattr(errno, name), ""))]
    assert names == ["ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG"]


def test_whether_a_name_is_taken(tmp_path, monkeypatch, pauses):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert is_taken(tmp_path / "file")
    assert is_taken(tmp_path / "link")
    assert not is_taken(tmp_path / "none")
    assert not is_taken(tmp_path / "file" / "none")

    def fail(path, **options):
        raise OSError(errno.ESTALE, "told by the test")

    monkeypatch.setattr(os, "lstat", fail)
    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(OSError, match="told by the test"):
        is_taken(tmp_path / "none")
    assert len(pauses) == 3


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EACCES, "give this user the right to"), (errno.EIO, "try again when its disk answers")],
)
def test_what_cannot_be_read_is_said_with_what_helps(number, remedy, tmp_path):
    path = tmp_path / "x.pt"
    said = str(unreadable(path, OSError(number, os.strerror(number)), "name another"))
    assert said == f"{path} cannot be read: {os.strerror(number)}; {remedy}, or name another."
