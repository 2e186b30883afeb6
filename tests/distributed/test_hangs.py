"""A run that hangs ends by itself, says who hangs where, and goes on when it is started again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import commands
import numpy as np
from limits import WAIT_S

from ddp_sgd.host import free_port

HERE = Path(__file__).parent


class StuckOnce:
    """Digits that one rank cannot get hold of for ever, the first time that it asks."""

    def __init__(self, mark: str = "", rank: str = "1", at: int = 400):
        from ddp_sgd.data import Digits

        self._digits, self._mark, self._rank, self._at = Digits(), mark, rank, at
        self._reads = 0

    def __len__(self):
        return 640

    def __getitem__(self, index):
        self._reads += 1
        if os.environ["RANK"] == self._rank and self._reads == self._at:
            self._wait_for_the_disk()
        pixels, digit = self._digits[index]
        return np.asarray(pixels), digit

    def _wait_for_the_disk(self):
        try:
            os.close(os.open(self._mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        time.sleep(600)


def start(folder, rank):
    port = free_port()
    options = [
        "--name=x", f"--output_dir={folder}", "--epochs=4", "--data.eval=null",
        "--wandb.mode=disabled", "--runtime.hang_s=3", "--log.every_steps=1",
        "--data.train.class_path=test_hangs.StuckOnce",
        f"--data.train.init_args={{mark: {folder}/mark, rank: '{rank}'}}",
    ]  # fmt: skip
    ranks = []
    for number in range(2):
        environ = os.environ | {
            "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}",
            "LAUNCH_EXIT_CODE_FILE": str(folder / "code"),
            "TORCHELASTIC_ERROR_FILE": str(folder / f"error-{number}.json"),
        }  # fmt: skip
        ranks.append(
            commands.Popen(
                [sys.executable, "-m", "ddp_sgd.train", *options],
                env=environ,
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = [rank.communicate(timeout=WAIT_S) for rank in ranks]
    return [rank.returncode for rank in ranks], "".join(errors for _, errors in said)


def test_a_rank_that_waits_for_its_data_for_ever(tmp_path):
    codes, errors = start(tmp_path, rank=1)
    assert codes == [69, 69]
    (line,) = [line for line in errors.splitlines() if line.startswith("ddp_sgd: error:")]
    assert "rank 1 of 2 on host" in line
    assert 'in phase "reading data" of step' in line
    assert (tmp_path / "code").read_text() == "69\n"
    reports = [json.loads((tmp_path / f"error-{n}.json").read_text())["message"] for n in (0, 1)]
    assert [f"ddp_sgd: error: {report['message']}" for report in reports] == [line, line]
    stacks = {n: (tmp_path / "x" / "logs" / f"stack-rank-{n}.txt").read_text() for n in (0, 1)}
    assert "_wait_for_the_disk" in stacks[1]
    assert "engine/fit.py" in stacks[0]  # in a step, or on its way out since the other has left
    result = json.loads((tmp_path / "x" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 69)
    assert "reading data" in result["error"]
    assert start(tmp_path, rank=1)[0] == [0, 0]
    result = json.loads((tmp_path / "x" / "result.json").read_text())
    assert (result["status"], result["samples"]) == ("finished", 4 * 640)
