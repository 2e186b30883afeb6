import errno
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from saving import flip, header, names, scored, tensors, write

from ddp_sgd import files
from ddp_sgd.checkpointing.serialization import find_checkpoint, write_checkpoint
from ddp_sgd.checkpointing.store import CheckpointFolder, goodness
from ddp_sgd.errors import DataError, ExitCode

NOBODY = 65534


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of the steps 10 and 20."""
    for step in (10, 20):
        write(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def chosen(folder):
    """Step of the checkpoint that a resume would take, and what it says of newer ones."""
    choice = CheckpointFolder(folder).choose()
    return choice.manifest and choice.manifest.header.step, choice.passed_over


def refused(path):
    with pytest.raises(DataError) as caught:
        find_checkpoint(path)
    assert caught.value.exit_code == ExitCode.DATA == 65
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_scored(folder, *marks, keep=2):
    for step, accuracy in marks:
        write_checkpoint(CheckpointFolder(folder), scored(step, accuracy), tensors(step), keep=keep)


def steps(folder):
    return [entry.header.step for entry in CheckpointFolder(folder).manifests()]


def flips(file, manifest, count):
    """Bits all over a checkpoint, in proportion to the length of its two files, and chosen ones."""
    content, text = file.read_bytes(), manifest.read_bytes()
    directory, digit = content.rindex(b"PK\1\2"), text.index(b'"step": 20') + 8
    special = [
        *((file, 8 * at) for at in (0, 1, len(content) - 1, directory, directory + 16)),
        *((file, 8 * at + 7) for at in (0, len(content) - 1, content.rindex(b"PK\5\6"))),
        *((manifest, bit) for bit in (0, 8 * len(text) - 1, 8 * digit, 8 * digit + 1)),
    ]
    place, total = random.Random(0), 8 * (len(content) + len(text))
    for path, bit in special:
        yield path, bit
    for bit in place.sample(range(total), count - len(special)):
        in_file = bit < 8 * len(content)
        yield (file, bit) if in_file else (manifest, bit - 8 * len(content))


def test_of_200_flipped_bits_200_are_found(folder):
    file, manifest = folder / "step-00000020.pt", folder / "step-00000020.json"
    good = {path: path.read_bytes() for path in (file, manifest)}
    found = {file: 0, manifest: 0}
    for path, bit in flips(file, manifest, 200):
        flip(path, bit)
        step, passed_over = chosen(folder)
        assert step == 10
        assert len(passed_over) == 1
        assert refused(file)
        path.write_bytes(good[path])
        found[path] += 1
    assert sum(found.values()) == 200
    assert min(found.values()) > 10
    assert chosen(folder) == (20, ())


def empty(file):
    file.write_bytes(b"")


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def lengthen(file):
    file.write_bytes(file.read_bytes() + b"\0")


def become_a_folder(file):
    file.unlink()
    file.mkdir()


def link_in_a_circle(file):
    file.unlink()
    file.symlink_to(file.name)


def swap_file(file):
    shutil.copyfile(file.with_name("step-00000010.pt"), file)


def swap_manifest(file):
    shutil.copyfile(file.with_name("step-00000010.json"), file.with_suffix(".json"))


def lose_manifest(file):
    file.with_suffix(".json").unlink()


def tear_manifest(file):
    truncate(file.with_suffix(".json"))


def empty_manifest(file):
    empty(file.with_suffix(".json"))


def another_format(file):
    manifest = file.with_suffix(".json")
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))


NO_MANIFEST = "step-00000020.pt has no valid manifest"


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (empty, "has 0 bytes instead of"),
        (truncate, "bytes instead of"),
        (lengthen, "bytes instead of"),
        (swap_file, "is damaged: its SHA-256 is not that of the manifest"),
        (become_a_folder, NO_MANIFEST),
        (link_in_a_circle, NO_MANIFEST),
        (swap_manifest, NO_MANIFEST),
        (lose_manifest, NO_MANIFEST),
        (tear_manifest, NO_MANIFEST),
        (empty_manifest, NO_MANIFEST),
        (another_format, NO_MANIFEST),
    ],
)
def test_what_was_harmed_is_refused_and_the_one_before_is_chosen(harm, told, folder):
    harm(folder / "step-00000020.pt")
    step, (line,) = chosen(folder)
    assert step == 10
    assert line.startswith("step-00000020.pt ")
    assert told in line
    refused(folder / "step-00000020.pt")
    saved = CheckpointFolder(folder)
    saved.set_aside(after_samples=100)
    assert chosen(folder) == (10, ())
    write(folder, 20)
    assert chosen(folder) == (20, ())


def test_a_missing_file_leaves_the_one_before(folder):
    (folder / "step-00000020.pt").unlink()
    assert chosen(folder) == (10, ())
    refused(folder / "step-00000020.pt")
    CheckpointFolder(folder).clean_up()
    assert not (folder / "step-00000020.json").exists()


@contextmanager
def forbidden(path):
    """Take the right to read away, and with it the power of root that needs none."""
    user = os.geteuid()
    modes = {place: place.stat().st_mode for place in (path, *path.parents)}
    if user == 0:  # pytest keeps its folders to itself
        for place in path.parents:
            if modes[place] & 0o055 != 0o055:
                place.chmod(modes[place] | 0o055)
    path.chmod(0)
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        for place, mode in modes.items():
            if place.stat().st_mode != mode:
                place.chmod(mode)


OTHER = {"step-00000020.pt": "step-00000020.json", "step-00000020.json": "step-00000020.pt"}


@pytest.mark.parametrize("name", OTHER)
def test_what_may_not_be_read_is_not_taken_for_damaged(name, folder, monkeypatch):
    """It may be whole: an older one would train its steps a second time."""
    monkeypatch.setattr(files, "sleep", None)  # the same answer would come again
    with forbidden(folder / name):
        with pytest.raises(DataError) as caught:
            chosen(folder)
        assert str(caught.value) == (
            f"{folder / name} cannot be read: Permission denied; give this user the right to, or "
            f"move it and {OTHER[name]} out of the folder to go on from an older checkpoint."
        )
        assert "Permission denied" in refused(folder / "step-00000020.pt")


def test_what_may_not_be_read_can_be_moved_away(folder, tmp_path):
    for name in OTHER:
        (folder / name).rename(tmp_path / name)
    assert chosen(folder) == (10, ())


@pytest.fixture
def pauses(monkeypatch):
    """Pauses between attempts, which a test notes instead of waiting."""
    taken = []
    monkeypatch.setattr(files, "sleep", taken.append)
    return taken


@pytest.fixture
def failing(monkeypatch, pauses):
    """Let the first attempts to open, or to look at, files of a name fail."""
    real = {"open": Path.open, "stat": Path.stat, "lstat": Path.lstat}
    left = {}

    def install(name, number=errno.ESTALE, times=1, call="open"):
        left[name] = times

        def call_or_fail(path, *args, **kwargs):
            if path.name == name and left[name] > 0:
                left[name] -= 1
                raise OSError(number, os.strerror(number), str(path))
            return real[call](path, *args, **kwargs)

        monkeypatch.setattr(Path, call, call_or_fail)

    return install


ENDLESS = 10**9
PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN, errno.EREMOTEIO)


@pytest.mark.parametrize("number", PASSING)
@pytest.mark.parametrize("name", OTHER)
def test_a_read_that_fails_for_a_moment_is_repeated(name, number, folder, failing, pauses):
    failing(name, number, times=3)
    assert chosen(folder) == (20, ())
    assert pauses == [0.1, 0.3, 1.0]


def test_a_look_that_fails_for_a_moment_is_repeated(folder, failing, pauses):
    failing("step-00000020.pt", call="stat")
    assert chosen(folder) == (20, ())
    assert pauses == [0.1]


@pytest.mark.parametrize("number", PASSING)
@pytest.mark.parametrize("name", OTHER)
def test_a_read_that_fails_for_good_ends_the_start(name, number, folder, failing, pauses):
    failing(name, number, times=ENDLESS)
    with pytest.raises(DataError) as caught:
        chosen(folder)
    assert caught.value.exit_code == ExitCode.DATA == 65
    assert str(caught.value) == (
        f"{folder / name} cannot be read: {os.strerror(number)}; try again when its disk answers, "
        f"or move it and {OTHER[name]} out of the folder to go on from an older checkpoint."
    )
    assert pauses == [0.1, 0.3, 1.0]


@pytest.mark.parametrize("name", ["step-00000010.pt", "step-00000010.json"])
def test_an_older_one_that_cannot_be_read_is_not_asked_for(name, folder, failing):
    failing(name, times=ENDLESS)
    assert chosen(folder) == (20, ())
    if name.endswith(".json"):  # somebody who asks for all of them is told
        with pytest.raises(DataError, match="step-00000010.json cannot be read: Stale file handle"):
            CheckpointFolder(folder).manifests()


def test_one_that_cannot_be_read_counts_behind_one_that_is_damaged(folder, failing):
    write(folder, 30)
    truncate(folder / "step-00000030.pt")
    failing("step-00000020.pt", times=ENDLESS)
    with pytest.raises(DataError, match="step-00000020.pt cannot be read"):
        chosen(folder)


def test_a_good_checkpoint_is_not_set_aside_for_a_manifest_that_cannot_be_read(folder, failing):
    failing("step-00000010.json", times=ENDLESS)
    before = names(folder)
    CheckpointFolder(folder).set_aside(after_samples=200)
    assert names(folder) == before


def test_a_manifest_is_not_removed_for_a_file_that_cannot_be_looked_at(folder, failing):
    for call in ("stat", "lstat"):
        failing("step-00000020.pt", times=ENDLESS, call=call)
    before = names(folder)
    CheckpointFolder(folder).clean_up()
    assert names(folder) == before


def test_a_name_that_cannot_be_looked_at_is_not_a_free_one(folder, failing):
    failing("step-00000020.pt", times=ENDLESS, call="lstat")
    with pytest.raises(OSError, match="Stale file handle"):
        CheckpointFolder(folder).name_for(header(20))
    assert CheckpointFolder(folder).name_for(header(30)) == "step-00000030.pt"


def test_what_cannot_be_read_is_neither_pruned_nor_in_the_way_of_a_save(folder, failing):
    failing("step-00000010.json", times=ENDLESS)
    write(folder, 30, keep=1)
    assert names(folder) == {
        *("step-00000010.pt", "step-00000010.json", "step-00000030.pt", "step-00000030.json"),
        "last",
    }


def test_a_folder_that_cannot_be_listed_for_a_moment_is_listed_again(folder, monkeypatch, pauses):
    iterdir, failures = Path.iterdir, [OSError(errno.EIO, "Input/output error")] * 2

    def list_or_fail(path):
        if failures:
            raise failures.pop()
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", list_or_fail)
    assert chosen(folder) == (20, ())
    assert pauses == [0.1, 0.3]


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(folder):
    with forbidden(folder):
        with pytest.raises(DataError, match="cannot be read: Permission denied; "):
            CheckpointFolder(folder).choose()
        assert "Permission denied" in refused(folder)
        assert "Permission denied" in refused(folder / "last")


def test_a_folder_that_is_not_there_holds_nothing(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        assert chosen(path) == (None, ())


def test_all_that_is_wrong_with_newer_ones_is_told(folder):
    write(folder, 30, keep=9)
    write(folder, 40, keep=9)
    lose_manifest(folder / "step-00000010.pt")
    lose_manifest(folder / "step-00000030.pt")
    truncate(folder / "step-00000040.pt")
    assert chosen(folder)[0] == 20
    told = {line.split()[0] for line in chosen(folder)[1]}
    assert told == {"step-00000030.pt", "step-00000040.pt"}  # and nothing of step 10: it is older
    truncate(folder / "step-00000020.pt")
    assert chosen(folder)[0] is None
    assert len(chosen(folder)[1]) == 4


def test_one_that_lost_its_manifest_is_told_of_by_number_not_by_letters(tmp_path):
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step)
    lose_manifest(tmp_path / "step-100000000.pt")
    assert chosen(tmp_path) == (99_999_999, ("step-100000000.pt has no valid manifest",))


def test_the_order_is_that_of_samples(tmp_path):
    """A resume with a larger global batch counts the same samples in fewer steps."""
    write(tmp_path, 40, samples=400)
    write(tmp_path, 21, samples=420)
    assert steps(tmp_path) == [40, 21]
    assert chosen(tmp_path) == (21, ())
    truncate(tmp_path / "step-00000021.pt")
    step, (line,) = chosen(tmp_path)
    assert (step, line.split()[0]) == (40, "step-00000021.pt")
    CheckpointFolder(tmp_path).set_aside(after_samples=400)
    assert names(tmp_path) >= {"step-00000040.pt", "step-00000021.pt.damaged"}
    assert chosen(tmp_path) == (40, ())


def test_a_name_is_never_given_twice(tmp_path):
    files = [write(tmp_path, 7, samples=samples).file for samples in (70, 80, 90, 90)]
    assert files == [f"step-00000007{ending}.pt" for ending in ("", ".2", ".3", ".4")]
    assert CheckpointFolder(tmp_path).choose().manifest.file == files[-1]  # of equals, the later
    truncate(tmp_path / files[-1])
    choice = CheckpointFolder(tmp_path).choose()
    assert choice.manifest.file == files[-2]
    assert [line.split()[0] for line in choice.passed_over] == [files[-1]]
    (tmp_path / "step-00000008.pt").mkdir()
    assert CheckpointFolder(tmp_path).name_for(header(8)) == "step-00000008.2.pt"


def test_a_manifest_under_another_name_does_not_remove_what_it_speaks_of(folder):
    shutil.copyfile(folder / "step-00000020.json", folder / "step-00000010.json")
    CheckpointFolder(folder).settle(keep=1)
    assert steps(folder) == [20]
    assert chosen(folder) == (20, ())


def test_the_newest_and_the_best_are_kept(tmp_path):
    save_scored(tmp_path, (1, 0.5), (2, 0.9), (3, 0.7), (4, 0.9), (5, 0.8))
    assert steps(tmp_path) == [2, 4, 5]  # of equals the first
    assert names(tmp_path) == {
        "last",
        "best",
        *(f"step-0000000{step}.{ending}" for step in (2, 4, 5) for ending in ("pt", "json")),
    }
    assert (tmp_path / "last").readlink() == Path("step-00000005.pt")
    assert (tmp_path / "best").readlink() == Path("step-00000002.pt")
    for link, step in (("last", 5), ("best", 2)):
        assert find_checkpoint(tmp_path / link)[1].header.step == step


def test_the_best_survives_many_saves_and_a_new_life(tmp_path):
    save_scored(tmp_path, (1, 0.9))
    for step in range(2, 20):
        write(tmp_path, step, keep=1)  # each by a folder that is opened again
        assert steps(tmp_path) == [1, step]
    save_scored(tmp_path, (20, 0.95), keep=1)
    assert steps(tmp_path) == [20]
    assert (tmp_path / "best").readlink() == (tmp_path / "last").readlink()


def test_a_kill_in_the_midst_of_pruning_leaves_nothing_that_stays(folder, monkeypatch):
    write(folder, 30)
    unlink = Path.unlink

    def die_after(path, missing_ok=False):
        unlink(path, missing_ok)
        if path.name.startswith("step-"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die_after)
        with pytest.raises(KeyboardInterrupt):
            CheckpointFolder(folder).settle(keep=2)
    assert len(names(folder)) == 6  # one of seven went
    CheckpointFolder(folder).clean_up()
    assert {name for name in names(folder) if "10" in name} == set()
    assert chosen(folder) == (30, ())


def test_scores_of_earlier_weights_make_no_best(tmp_path):
    write(tmp_path, 1, scored_at=0, scores={"eval/accuracy": 1.0})
    assert names(tmp_path) == {"step-00000001.pt", "step-00000001.json", "last"}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"eval/accuracy": 0.6, "eval/loss": 9.0}, {"eval/accuracy": 0.5, "eval/loss": 1.0}),
        ({"eval/loss": 1.0}, {"eval/loss": 2.0}),
        ({"eval/loss": 1e30}, {"eval/loss": float("nan")}),
        ({"eval/loss": 1e30}, {}),
    ],
)
def test_better_is_more_accurate_or_else_of_less_loss(better, worse):
    assert goodness(better) > goodness(worse)


def test_without_links_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    save_scored(tmp_path, (1, 0.9), (2, 0.1), (3, 0.1), keep=1)
    assert steps(tmp_path) == [1, 3]
    assert names(tmp_path) == {
        f"step-0000000{step}.{ending}" for step in (1, 3) for ending in ("pt", "json")
    }


def test_what_is_set_aside_is_kept_but_no_checkpoint_any_more(folder):
    CheckpointFolder(folder).set_aside(after_samples=100)
    assert names(folder) == {
        "step-00000010.pt",
        "step-00000010.json",
        "step-00000020.pt.damaged",
        "step-00000020.json.damaged",
        "last",
    }
    CheckpointFolder(folder).set_aside(after_samples=-1)
    assert chosen(folder) == (None, ())


def test_what_was_set_aside_earlier_is_never_overwritten(folder):
    contents = []
    for number in range(3):
        (folder / "step-00000020.pt").write_text(f"damage {number}")
        (folder / "step-00000020.json").write_text(f"manifest {number}")
        contents += [f"damage {number}", f"manifest {number}"]
        CheckpointFolder(folder).set_aside(after_samples=100)
    aside = [
        (folder / f"step-00000020.{kind}.damaged{ending}").read_text()
        for ending in ("", ".2", ".3")
        for kind in ("pt", "json")
    ]
    assert aside == contents


@pytest.mark.parametrize("kind", ["pt", "json"])
def test_a_file_and_its_manifest_are_set_aside_under_one_number(kind, folder):
    """Also where only one of the two is in the way, be it a link that leads nowhere."""
    (folder / f"step-00000020.{kind}.damaged").symlink_to("nowhere")
    CheckpointFolder(folder).set_aside(after_samples=100)
    assert (folder / f"step-00000020.{kind}.damaged").is_symlink()
    assert names(folder) >= {"step-00000020.pt.damaged.2", "step-00000020.json.damaged.2"}
    assert chosen(folder) == (10, ())


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_file_of_the_user_s_under_the_name_of_a_link_stays(name, tmp_path):
    (tmp_path / name).write_text("mine")
    save_scored(tmp_path, (1, 0.5), (2, 0.9))
    assert (tmp_path / name).read_text() == "mine"
    other = {"last": "best", "best": "last"}[name]
    assert (tmp_path / other).readlink() == Path("step-00000002.pt")


def test_leftovers_go_and_nothing_else(folder):
    before = names(folder)
    for name in (".step-00000030.pt.new", ".step-00000030.json.new", "step-00000030.json"):
        (folder / name).write_text("half")
    (folder / ".last.new").symlink_to("step-00000030.pt")
    (folder / "notes.txt").touch()
    CheckpointFolder(folder).clean_up()
    assert names(folder) == before | {"notes.txt"}
