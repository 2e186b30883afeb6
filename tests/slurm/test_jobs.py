"""Jobs of a real SLURM end as if nothing had happened, whatever stops them."""

import json
import os
import signal
from pathlib import Path

import pytest
from launching import LOCAL, Launch
from slurm.cluster import slurm
from wandb_reader import offline_records

from ddp_sgd.errors import ExitCode
from ddp_sgd.report.journal import read_journal

TWO_NODES = ("--nodelist=node1,node2", "--nodes=2", "--ntasks-per-node=1")
ONE_NODE = ("--nodelist=node1", "--nodes=1", "--ntasks-per-node=2")
"""Where the number of nodes does not matter: torch is imported once less in each attempt."""
OFTEN = ("--epochs=4", "--log.every_steps=2", "--checkpoint.every_steps=4")
SCRIPTS = ("train.sbatch", "train_srun.sbatch")

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("cluster"), nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Give the digest of a run on one host, with some number of ranks."""
    digests = {}

    def digest(ranks):
        if ranks not in digests:
            folder = tmp_path_factory.mktemp("undisturbed")
            run = Launch(folder, LOCAL, f"--nproc={ranks}", *OFTEN, *model(folder, pause_s=0))
            assert run.end() == ExitCode.DONE, run.said
            digests[ranks] = run.result()["weights_digest"]
        return digests[ranks]

    return digest


@pytest.fixture(scope="module", autouse=True)
def limited(cluster, tmp_path_factory):
    """A job of two minutes, on a node of its own, under way while the other tests run."""
    sbatch = ("--nodelist=node3", "--nodes=1", "--ntasks-per-node=2", "--time=2")
    sbatch += ("--signal=B:USR1@5",)  # the 120 s of the script are more than there are
    folder = tmp_path_factory.mktemp("limited")
    first_life_is_over = folder / "runs" / "digits" / "logs"
    slow = model(first_life_is_over, pause_s=1.0)
    return Story(cluster, folder, "train.sbatch", *slow, sbatch=sbatch)


def model(hurry, *, pause_s=0.1):
    """Train slowly until a file is there, so that something can happen."""
    patience = f"{{pause_s: {pause_s}, until: {hurry}}}"
    return (f"--model={{class_path: user_code.Slow, init_args: {patience}}}",)


class Story:
    """A job that was submitted to be disturbed."""

    def __init__(
        self, cluster, folder, script, *options, sbatch=TWO_NODES, pause_s=0.1, **variables
    ):
        self._hurry = folder / "hurry"
        slow = model(self._hurry, pause_s=pause_s)
        self.job = cluster.submit(
            folder, script, *OFTEN, *slow, *options, sbatch=sbatch, **variables
        )

    def rows(self, event="train"):
        path = self.job.run_folder / "metrics.jsonl"
        rows = read_journal(path) if path.exists() else []
        return [row for row in rows if row["event"] == event]

    def result(self):
        return json.loads((self.job.run_folder / "result.json").read_text())

    def wait_for_progress(self):
        self.job.wait_until(lambda: len(self.rows()) >= 3)

    def hurry(self):
        self._hurry.touch()

    def end_as_if_undisturbed(self, digest, *, lives=2):
        """The job is completed, and went back into the queue once for every life but the first."""
        self.hurry()
        assert self.job.end() == ("COMPLETED", lives - 1), self.job.said
        result = self.result()
        assert result["status"] == "finished"
        assert result["weights_digest"] == digest
        assert result["job"] == f"{self.job.number}.{lives - 1}"
        assert len(self.rows("resume")) == lives - 1
        steps = [row["step"] for row in self.rows()]
        assert steps == sorted(set(steps)), "a row came twice"
        logs = {path.name for path in (self.job.run_folder / "logs").glob("job-*")}
        assert f"job-{self.job.number}.{lives - 1}" in logs


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_nodes_train_as_one_does(script, cluster, undisturbed, tmp_path):
    four = ("--nodes=2", "--ntasks-per-node=2")
    story = Story(cluster, tmp_path, script, sbatch=four, pause_s=0, DDP_SGD_WANDB__MODE="offline")
    story.end_as_if_undisturbed(undisturbed(4), lives=1)
    assert story.result()["world_size"] == 4
    assert len(offline_records(story.job.run_folder, "run")) == 1
    assert len(offline_records(story.job.run_folder, "exit")) == 1
    assert len(story.rows("start")) == len(story.rows("end")) == 1
    kept = list((story.job.run_folder / "logs").rglob("*.log"))
    assert len({path for path in kept if path.name != "torchrun.log"}) >= 4, "a log for each rank"


@pytest.mark.parametrize("script", SCRIPTS)
def test_usr1_to_the_batch_shell(script, cluster, undisturbed, tmp_path):
    story = Story(cluster, tmp_path, script)
    story.wait_for_progress()
    story.job.signal("--batch", "--signal=USR1")
    story.job.wait_until(lambda: "stopped: requeued" in story.job.said)
    stopped_at = story.result()["step"]
    assert story.result()["requeued"]
    story.end_as_if_undisturbed(undisturbed(2))
    assert [row["step"] for row in story.rows("resume")] == [stopped_at], "no step is done twice"


def test_sigterm_to_the_ranks_alone(cluster, undisturbed, tmp_path):
    story = Story(cluster, tmp_path, "train_srun.sbatch")
    story.wait_for_progress()
    story.job.signal("--signal=TERM")
    story.job.wait_until(lambda: "stopped: requeued" in story.job.said)
    story.end_as_if_undisturbed(undisturbed(2))


def test_preemption_by_a_higher_partition(cluster, undisturbed, tmp_path):
    story = Story(cluster, tmp_path, "train.sbatch", sbatch=("--partition=spot", *ONE_NODE))
    story.wait_for_progress()
    urgent = ("--partition=high", *ONE_NODE, "--exclusive", "--output=/dev/null")
    cluster.run("sbatch", *urgent, "--wrap=true")
    story.job.wait_until(lambda: "stopped: requeued" in story.job.said)
    story.end_as_if_undisturbed(undisturbed(2))


def test_scontrol_requeue(cluster, undisturbed, tmp_path):
    story = Story(cluster, tmp_path, "train.sbatch", sbatch=ONE_NODE)
    story.wait_for_progress()
    cluster.run("scontrol", "requeue", str(story.job.number))
    story.job.wait_until(lambda: story.job.facts()["Restarts"] == "1")
    story.end_as_if_undisturbed(undisturbed(2))


@pytest.mark.parametrize(("script", "which"), [("train.sbatch", 1), ("train_srun.sbatch", 0)])
def test_power_cut(script, which, cluster, undisturbed, tmp_path):
    story = Story(cluster, tmp_path, script, "--runtime.timeout_s=20")
    story.wait_for_progress()
    victim = cluster.run("scontrol", "show", "hostnames", story.job.facts()["NodeList"]).split()
    cluster.cut_power(victim[which])
    story.job.wait_until(lambda: story.job.facts()["Restarts"] == "1")
    cluster.power_on(victim[which])
    story.end_as_if_undisturbed(undisturbed(2))


def test_killed_rank_is_a_lost_machine_until_slurm_knows_better(cluster, undisturbed, tmp_path):
    story = Story(cluster, tmp_path, "train_srun.sbatch")
    story.wait_for_progress()
    kill_rank(story.job, 1)
    story.job.wait_until(lambda: "a node may be dead; the job goes back" in story.job.said)
    assert "ddp_sgd: exit code 69: requeued" in story.job.said
    story.end_as_if_undisturbed(undisturbed(2))


def kill_rank(job, rank):
    """Kill a rank of a job, wherever it is; other clusters have jobs of the same number."""
    wanted = {f"SLURM_JOB_ID={job.number}", f"SLURM_PROCID={rank}"}
    wanted.add(f"SLURM_CONF={job.configuration}")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = set((process / "environ").read_text().split("\0"))
            command = (process / "cmdline").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if wanted <= words and "SLURM_STEP_ID=0" in words and "ddp_sgd.train" in command:
            os.kill(int(process.name), signal.SIGKILL)
            return
    pytest.fail(f"rank {rank} is not there")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scancel_saves_and_is_the_end(script, cluster, tmp_path):
    story = Story(cluster, tmp_path, script, sbatch=ONE_NODE)
    story.wait_for_progress()
    story.job.signal()
    assert story.job.end() == ("CANCELLED", 0), story.job.said
    story.job.wait_until(lambda: "requeued" in story.result())
    result = story.result()
    assert (result["status"], result["exit_code"]) == ("stopped", 75)
    assert not result["requeued"]
    newest = max(path.name for path in (story.job.run_folder / "checkpoints").glob("*.pt"))
    assert newest == f"step-{result['step']:08d}.pt"


def test_job_that_fails_is_not_requeued(cluster, tmp_path):
    story = Story(cluster, tmp_path, "train.sbatch", "--model={class_path: user_code.FailsLater}")
    assert story.job.end() == ("FAILED", 0), story.job.said
    result = story.result()
    assert (result["status"], result["exit_code"]) == ("failed", 70)
    assert not result["requeued"]
    assert "what failed would fail again" in result["requeue_reason"]
    assert story.job.facts()["ExitCode"] == "70:0"


def test_job_that_dies_without_a_word_is_not_requeued_for_ever(cluster, tmp_path):
    deadly = "--data.train={class_path: user_code.DiesAt, init_args: {at: 600}}"
    linear = "--model={class_path: torch.nn.Linear, init_args: {in_features: 4, out_features: 2}}"
    story = Story(
        cluster, tmp_path, "train_srun.sbatch", deadly, linear, "--data.eval=null",
        "--checkpoint.every_steps=1000", sbatch=("--ntasks=1",),
    )  # fmt: skip
    assert story.job.end() == ("FAILED", 0), story.job.said
    result = story.result()
    assert (result["status"], result["exit_code"], result["requeued"]) == ("failed", 69, False)
    assert "rank 0 ended without a result" in result["error"]
    assert "no step was saved since it began" in result["requeue_reason"]


def test_requeues_are_counted(cluster, tmp_path):
    story = Story(cluster, tmp_path, "train_srun.sbatch", sbatch=("--ntasks=1",), MAX_REQUEUES="1")
    for life in (1, 2):
        story.job.wait_until(lambda life=life: len(story.rows("resume")) == life - 1)
        done = len(story.rows())
        story.job.wait_until(lambda done=done: len(story.rows()) >= done + 3)
        story.job.signal("--batch", "--signal=USR1")
        story.job.wait_until(lambda life=life: story.job.said.count("ddp_sgd: stopped") == life)
    assert story.job.end() == ("FAILED", 1), story.job.said
    assert "it was requeued 1 times and MAX_REQUEUES is 1" in story.result()["requeue_reason"]


def test_wrong_option_ends_the_job_before_any_rank_starts(cluster, tmp_path):
    story = Story(cluster, tmp_path, "train.sbatch", "--optim.lr=-1")
    assert story.job.end() == ("FAILED", 0)
    assert story.job.facts()["ExitCode"] == "64:0"
    assert "ddp_sgd: error: optim.lr is -1" in story.job.said
    assert "srun" not in story.job.said


def test_time_limit(limited, undisturbed):
    """The run is asked to stop before the limit, or sees it coming."""
    limited.job.wait_until(lambda: "stopped: requeued" in limited.job.said)
    assert "TIME LIMIT" not in limited.job.said
    limited.end_as_if_undisturbed(undisturbed(2))
