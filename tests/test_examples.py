"""The examples: short, and each runs as its docstring says, alone and on two processes."""

import ast
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import python_folder
from limits import WAIT_S

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
COMMANDS = [
    (example, command)
    for example in EXAMPLES
    for block in re.findall(
        r"^```bash\n(.*?)^```$",
        ast.get_docstring(ast.parse(example.read_text())),
        re.MULTILINE | re.DOTALL,
    )
    for command in block.splitlines()
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_is_short_and_says_how_to_run_it(example):
    assert len(example.read_text().splitlines()) <= 60
    assert [command for named, command in COMMANDS if named == example] == [
        f"python examples/{example.name}",
        f"torchrun --nproc_per_node=2 examples/{example.name}",
    ]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each command printed; two run at a time, each in a folder of its own."""
    folders = [tmp_path_factory.mktemp("example") for _ in COMMANDS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        done = pool.map(_run, (command for _, command in COMMANDS), folders)
        return dict(zip(COMMANDS, done, strict=True))


def _run(command, folder):
    (folder / "examples").symlink_to(ROOT / "examples")
    path = f"{python_folder()}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


@pytest.mark.parametrize(
    "command", COMMANDS, ids=[command.replace(" ", "_") for _, command in COMMANDS]
)
def test_an_example_trains(command, outcomes):
    done = outcomes[command]
    assert done.returncode == 0, done.stdout + done.stderr
    line = r"^epoch +(\d+)/(\d+) .* loss ([\d.]+)  lr ([\d.e-]+)"
    rows = re.findall(line, done.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == [str(1 + number) for number in range(int(rows[0][1]))]
    losses = [float(row[2]) for row in rows]
    assert losses[-1] < losses[0] / 4
    assert len({row[3] for row in rows}) > 1, "the rate changes during training"
    accuracy = float(re.search(r"^finished: .* accuracy ([\d.]+) %", done.stdout, re.MULTILINE)[1])
    assert accuracy > 90  # measured: 94.4 and 97.8 %
