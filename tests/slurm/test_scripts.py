"""The batch scripts, as SLURM expands them."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import starting_python
from launching import ROOT, environment
from slurm.cluster import SCRIPTS, slurm

BATCH = sorted(SCRIPTS.glob("*.sbatch"))
SHELL = [*BATCH, *SCRIPTS.glob("*.sh")]
GPUS = "--gpus-per-node=2"

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("cluster"), nodes=2) as cluster:
        yield cluster


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_script_is_sound(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    subprocess.run([str(shellcheck), *map(str, SHELL)], check=True)


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_no_directive_comes_after_the_first_command(script):
    """sbatch leaves such lines out, without a word."""
    lines = script.read_text().splitlines()
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives
    assert max(directives) < min(commands)


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_directives_are_those_that_a_requeue_needs(script):
    text = script.read_text()
    for directive in ("--open-mode=append", "--requeue", "--signal=B:USR1@120", "--output=%x-%"):
        assert f"#SBATCH {directive}" in text
    assert not re.search(r"#SBATCH --(nodes|ntasks|gpus|partition|account|time)", text)


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.name)
def test_slurm_would_take_it(script, cluster):
    cluster.run("sbatch", "--test-only", "--nodes=2", "--ntasks-per-node=2", script, "LIST")


def shown_commands():
    """The calls of sbatch in the documents and at the heads of the scripts."""
    found = []
    for path in [ROOT / "docs" / "slurm.md", *BATCH]:
        text = path.read_text().replace("\\\n#", "").replace("\\\n", "")
        found += re.findall(
            r"^[# ]*(?:CONTAINER_ARGS=\S+ )?(sbatch .*\.sbatch .*)$", text, re.MULTILINE
        )
    return sorted(set(found))


@pytest.mark.parametrize("command", shown_commands())
def test_slurm_would_take_what_is_shown(command, cluster):
    words = shlex.split(re.sub(r"   +[^-].*", "", command))
    cluster.run(words[0], "--test-only", f"--chdir={ROOT}", *words[1:])


def test_commands_are_shown():
    assert len(shown_commands()) >= 6


def launch_lines(job, *, begin):
    """The lines that say what is started, with what differs between machines left out."""
    python = re.escape(str(starting_python()))
    lines = [line.rstrip() for line in job.said.splitlines() if line.startswith(begin)]
    lines = [re.sub(python, "python", line) for line in lines]
    place = rf"(digits\.logs/|--rdzv-id=){job.number}\b"
    return sorted(re.sub(place, r"\1JOB", line) for line in lines)


def test_what_one_torchrun_on_each_node_is_told(cluster, tmp_path):
    job = cluster.submit(
        tmp_path, "train.sbatch", "--epochs=1", sbatch=("--nodes=2", "--ntasks-per-node=2"),
    )  # fmt: skip
    assert job.end() == ("COMPLETED", 0), job.said
    port = 10000 + job.number
    assert launch_lines(job, begin="+ python -m") or launch_lines(job, begin="+ ") == [
        *(
            "+ python -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --max-restarts=0 "
            f"--rdzv-backend=c10d --rdzv-endpoint=node1:{port} --rdzv-id=JOB.0 "
            f"--rdzv-conf=is_host={1 - node},join_timeout=300,read_timeout=150 "
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "
            f"--log-dir=runs/digits.logs/JOB.0/node-{node} --tee=3 -m ddp_sgd.train --epochs=1"
            for node in (1, 0)
        ),
        "+ srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 "
        "bash -c ... train --epochs=1",
    ]


def test_what_one_task_for_each_rank_is_told(cluster, tmp_path):
    job = cluster.submit(
        tmp_path, "train_srun.sbatch", "--epochs=1", "--optim.lr=0.1",
        sbatch=("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=3"),
        CONTAINER_ARGS="env INSIDE=1", OMP_NUM_THREADS="",
    )  # fmt: skip
    assert job.end() == ("COMPLETED", 0), job.said
    assert launch_lines(job, begin="+ ") == [
        "+ srun --ntasks=2 --cpus-per-task=3 --kill-on-bad-exit=1 --open-mode=append "
        "--output=runs/digits.logs/JOB.0/rank-%t.log env INSIDE=1 "
        "python -m ddp_sgd.train --epochs=1 --optim.lr=0.1"
    ]


def world_size(job):
    return json.loads((job.run_folder / "result.json").read_text())["world_size"]


@pytest.mark.parametrize(
    ("sbatch", "ranks"),
    [
        (("--nodes=2", GPUS), 4),
        (("--nodes=1", GPUS, "--cpus-per-task=2"), 2),
        (("--nodes=2", "--ntasks=3"), 3),
    ],
    ids=["GPUs of two nodes", "GPUs of one node", "tasks that nodes share unevenly"],
)
def test_ranks_follow_from_what_was_asked_for(sbatch, ranks, cluster, tmp_path):
    job = cluster.submit(tmp_path, "train.sbatch", "--epochs=1", sbatch=sbatch)
    assert job.end() == ("COMPLETED", 0), job.said
    assert world_size(job) == ranks


def test_nothing_of_the_submitter_reaches_the_job_unless_it_is_named(cluster, tmp_path):
    """--export of a few variables would hold for srun, too, and leave the ranks without any."""
    kept = environment(PYTHON=str(starting_python()))
    names = ",".join(f"{name}={kept[name]}" for name in ("PYTHON", "PYTHONPATH", "PATH"))
    sbatch = ("--nodes=2", "--ntasks-per-node=1", f"--export={names}")
    job = cluster.submit(
        tmp_path, "train.sbatch", "--epochs=1", "--wandb.mode=disabled", sbatch=sbatch
    )
    assert job.end() == ("COMPLETED", 0), job.said
    assert world_size(job) == 2


def test_doctor_under_srun(cluster, tmp_path):
    job = cluster.wrap(
        tmp_path, "srun $PYTHON -m ddp_sgd.doctor", sbatch=("--nodes=2", "--ntasks=3")
    )
    assert job.end() == ("COMPLETED", 0), job.said
    assert "all 3 ranks on 2 hosts agree and reach each other" in job.said
    facts = json.loads(job.said.splitlines()[-1])
    assert facts["world_size"] == 3
    assert re.search(r"^0-1 +node1 +cpu +gloo +10.213.91.1 \(eth0\)", job.said, re.MULTILINE)
    assert re.search(r"^2 +node2 +cpu +gloo +10.213.91.2 \(eth0\)", job.said, re.MULTILINE)


def test_array_of_four_runs(cluster, tmp_path):
    """Two on each node at once: no port and no folder twice."""
    (tmp_path / "rates.txt").write_text(
        "# a comment\n--optim.lr=0.01\n\n--optim.lr=0.02 --seed=1\n"
        "--model='{class_path: ddp_sgd.models.MLP, init_args: {inputs: 64, classes: 10}}'\n"
        "--optim.lr=0.04\n"
    )
    sbatch = ("--array=0-3", "--ntasks=2", "--nodes=1", "--cpus-per-task=4", "--output=%A_%a.out")
    job = cluster.submit(
        tmp_path, "sweep.sbatch", "rates.txt", "--epochs=2", "--optim.lr=0.5",
        "--data.batch_size=8", sbatch=sbatch,
    )  # fmt: skip
    facts = []
    for task in range(4):
        said = tmp_path / f"{job.number}_{task}.out"
        assert job.end(task) == ("COMPLETED", 0), said.read_text()
        facts.append(job.facts(task))
    spans = [(fact["StartTime"], fact["EndTime"], fact["NodeList"]) for fact in facts]
    first = [span for span in spans if span[2] == spans[0][2]]
    assert len(first) >= 2
    assert min(end for _, end, _ in first) > max(start for start, _, _ in first), "one by one"
    digests = set()
    for task, rate in enumerate((0.01, 0.02, 0.5, 0.04)):
        run = tmp_path / "runs" / f"rates-{task}"
        result = json.loads((run / "result.json").read_text())
        assert (result["status"], result["world_size"]) == ("finished", 2)
        config = (run / "config.yaml").read_text()
        assert f"lr: {rate}" in config
        assert "group: rates" in config
        digests.add(result["weights_digest"])
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("array", "arguments", "complaint"),
    [
        (
            "0-1",
            ("rates.txt",),
            "task 1 has no line in rates.txt, which has 1; submit with --array",
        ),
        (None, ("rates.txt",), "this is no array job; submit it with --array=0-0."),
        ("0", ("none.txt",), "none.txt is not readable; name a file with the options of one run"),
        ("0", (), "LIST is not given; name a file with the options of one run on each line."),
    ],
)
def test_sweep_that_cannot_be(array, arguments, complaint, cluster, tmp_path):
    (tmp_path / "rates.txt").write_text("--epochs=1 --name=x\n")
    sbatch = (*([f"--array={array}"] if array else []), "--output=%a.out")
    job = cluster.submit(tmp_path, "sweep.sbatch", *arguments, sbatch=sbatch)
    last = int(array.rpartition("-")[2]) if array else None
    assert job.end(last)[0] == "FAILED"
    said = "".join(path.read_text() for path in tmp_path.glob("*.out"))
    assert f"ddp_sgd: error: {complaint}" in said


def test_array_task_goes_back_into_the_queue_alone(cluster, tmp_path):
    """The number of one of the tasks is that of the array: requeued by it, all would be."""
    slow = (
        f"--model={{class_path: user_code.Slow, init_args: {{pause_s: 0.1, until: {tmp_path}/go}}}}"
    )
    (tmp_path / "seeds.txt").write_text("--seed=0\n--seed=1\n")
    sbatch = ("--array=0-1", "--output=%A_%a.out")
    job = cluster.submit(
        tmp_path, "sweep.sbatch", "seeds.txt", slow, "--log.every_steps=1", sbatch=sbatch,
    )  # fmt: skip
    journals = [tmp_path / "runs" / f"seeds-{task}" / "metrics.jsonl" for task in range(2)]
    for journal in journals:
        job.wait_until(
            lambda journal=journal: journal.exists() and '"train"' in journal.read_text()
        )
    same = next(task for task in range(2) if job.facts(task)["JobId"] == str(job.number))
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job.number}_{same}")
    said = tmp_path / f"{job.number}_{same}.out"
    job.wait_until(lambda: "stopped: requeued" in said.read_text())
    (tmp_path / "go").touch()
    assert job.end(same) == ("COMPLETED", 1), said.read_text()
    assert job.end(1 - same) == ("COMPLETED", 0)
