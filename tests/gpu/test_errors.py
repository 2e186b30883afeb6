"""What goes wrong on a GPU is reported with its cause and the exit code for it; needs CUDA."""

import re
import subprocess
import sys

import pytest
import torch
from limits import WAIT_S
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd import RunConfig, fit, start_runtime
from ddp_sgd.errors import ConfigError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

BAD_LABEL = """
import sys
import torch
from torch import nn
from torch.utils.data import Dataset
from ddp_sgd import RunConfig, fit, start_runtime
from ddp_sgd.errors import UserError


class Labelled(Dataset):
    def __len__(self):
        return 2000

    def __getitem__(self, index):
        return torch.ones(20), 7 if index == 1500 else index - index // 4 * 4


data = {"workers": int(sys.argv[1])}
config = RunConfig(output_dir=sys.argv[2], epochs=1, data=data, wandb={"mode": "disabled"})
try:
    with start_runtime(device="cuda") as runtime:
        model = nn.Linear(20, 4)
        fit(config, runtime, model=model, train_set=Labelled(), loss=nn.CrossEntropyLoss())
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_that_the_model_has_no_score_for(workers, tmp_path):
    command = [sys.executable, "-c", BAD_LABEL, str(workers), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert ended.returncode == 65, ended.stdout + ended.stderr
    assert "label" in ended.stdout.splitlines()[-1]


def test_a_batch_that_does_not_fit(tmp_path):
    samples, width = 3_000_000, 4096
    wide = [nn.Linear(width, width) for _ in range(4)]
    config = RunConfig(
        output_dir=str(tmp_path),
        epochs=1,
        data={"batch_size": samples},
        wandb={"mode": "disabled"},
    )
    data = TensorDataset(torch.zeros(samples, 20), torch.zeros(samples, dtype=torch.int64))
    model = nn.Sequential(nn.Linear(20, width), *wide, nn.Linear(width, 4))
    fault = re.compile(
        r"data.batch_size is 3000000, a micro-batch that is too large for the memory of the device"
        r".*; set data.batch_size=1500000 data.accumulate=2"
    )
    with start_runtime(device="cuda") as runtime, pytest.raises(ConfigError, match=fault):
        fit(config, runtime, model=model, train_set=data, loss=nn.CrossEntropyLoss())
