import errno
import os
import resource

import pytest

from ddp_sgd.files import make_folder, replace_file, sync_folder


@pytest.fixture
def synced(monkeypatch):
    """What was synced, in order: the real call is made, and noted by inode."""
    inodes, sync = [], os.fsync

    def note(descriptor):
        inodes.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return inodes


def test_a_file_is_replaced_whole_and_synced(tmp_path, synced):
    path = tmp_path / "a.json"
    path.write_text("old")
    before = path.stat().st_ino
    replace_file(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_ino != before
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]  # content first, then its name
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_without_room_the_old_file_stays_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            replace_file(path, "new" * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_made_once_and_its_name_synced(tmp_path, synced):
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "a")
    assert (tmp_path / "a").is_dir()
    assert synced == [tmp_path.stat().st_ino]
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


@pytest.mark.parametrize(("number", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_may_be_unable_to_sync_folders(number, raises, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if raises:
        with pytest.raises(OSError, match="error"):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)
