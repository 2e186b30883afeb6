"""Train on a data set of your own, with an augmentation, alone or on several processes.

```bash
python examples/own_dataset.py
torchrun --nproc_per_node=2 examples/own_dataset.py
```

Any object with a length that gives (input, target) for an index will do. Random numbers that a
sample draws follow from (seed, epoch, index): they do not depend on the number of processes.
"""

import torch
from torch.utils.data import Dataset

from ddp_sgd import RunConfig, fit, start_runtime
from ddp_sgd.data import Digits
from ddp_sgd.models import ConvNet


class ShiftedDigits(Dataset):
    """Real digits of 8 x 8 pixels, each moved by up to one pixel every time it is read."""

    def __init__(self) -> None:
        """Load the images."""
        self.digits = Digits(split="train", shape="image")

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Return an image of shape (1, 8, 8) and its class."""
        image, label = self.digits[index]
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return torch.roll(torch.from_numpy(image), (down, right), dims=(1, 2)), int(label)


def main() -> None:
    """Describe the run, join the other processes if there are any, and train."""
    config = RunConfig(
        name="own_dataset",
        epochs=6,
        data={"batch_size": 16},
        optim={"lr": 0.01, "momentum": 0.9},
        schedule={"name": "cosine"},
        wandb={"mode": "disabled"},
    )
    torch.manual_seed(config.seed)
    model = ConvNet(channels=1, widths=[16, 32], classes=10, batch_norm=True)
    held_out = Digits(split="eval", shape="image")
    with start_runtime() as runtime:
        fit(config, runtime, model=model, train_set=ShiftedDigits(), eval_set=held_out)


if __name__ == "__main__":
    main()
