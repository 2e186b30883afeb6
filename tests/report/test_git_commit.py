import subprocess
import threading

from ddp_sgd.report.reporter import GitCommit


def test_git_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert GitCommit().wait() is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run(["git", "add", "f"], check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "x"], check=True)
    clean = GitCommit().wait()
    assert len(clean) == 40
    (tmp_path / "f").write_text("2")
    assert GitCommit().wait() == clean + "+changes"
    monkeypatch.setenv("PATH", "")
    assert GitCommit().wait() is None


def test_a_system_without_a_free_thread_has_no_commit(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert GitCommit().wait() is None
