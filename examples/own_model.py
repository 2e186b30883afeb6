"""Train a network of your own on the embedded digits, alone or on several processes.

```bash
python examples/own_model.py
torchrun --nproc_per_node=2 examples/own_model.py
```

The learning rate is 0.01 for 16 samples, and a tenth of it after six epochs. The loss is printed
once per epoch.
"""

import torch
from torch import nn

from ddp_sgd import RunConfig, fit, start_runtime
from ddp_sgd.data import Digits


class TwoLayers(nn.Module):
    """A network as the tutorials write it."""

    def __init__(self, hidden: int) -> None:
        """Make the layers."""
        super().__init__()
        self.hidden = nn.Linear(64, hidden)
        self.scores = nn.Linear(hidden, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Turn (m, 64) pixels into (m, 10) scores."""
        return self.scores(torch.relu(self.hidden(images)))


def main() -> None:
    """Describe the run, join the other processes if there are any, and train."""
    config = RunConfig(
        name="own_model",
        epochs=8,
        data={"batch_size": 16},
        optim={"lr": 0.01, "momentum": 0.9},
        schedule={"name": "step", "milestones": [6], "gamma": 0.1},
        wandb={"mode": "disabled"},
    )
    torch.manual_seed(config.seed)
    model = TwoLayers(hidden=100)
    with start_runtime() as runtime:
        result = fit(config, runtime, model=model, loss=nn.CrossEntropyLoss())
        if runtime.rank == 0:  # all processes hold the same weights; let one of them look
            images, labels = Digits(split="eval")[:5]
            seen = model(torch.from_numpy(images).to(runtime.device)).argmax(dim=1)
            print(f"after {result.step} steps {labels.tolist()} look like {seen.tolist()}")


if __name__ == "__main__":
    main()
