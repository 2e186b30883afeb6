import subprocess
import threading

from ddp_sgd.report.git_commit import GitCommit, git_commit


def test_git_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run(["git", "add", "f"], check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "x"], check=True)
    clean = git_commit()
    assert len(clean) == 40
    (tmp_path / "f").write_text("2")
    assert git_commit() == clean + "+changes"
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_the_commit_is_looked_up_beside_the_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert GitCommit().wait() is None
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run(["git", "add", "f"], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "commit", "-qm", "x"], check=True)
    assert GitCommit().wait() == git_commit() is not None


def test_a_system_without_a_free_thread_has_no_commit(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert GitCommit().wait() is None
