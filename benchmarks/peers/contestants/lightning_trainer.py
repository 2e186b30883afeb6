"""Lightning's Trainer with its defaults: logger, checkpoints, progress bar, summary of the model.

Source:
    https://lightning.ai/docs/pytorch/stable/starter/introduction.html
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.peers.task import Clock, Task, leave_group, read_task


class Classifier(lightning.LightningModule):
    """The network, its loss and its optimizer.

    Args:
        task: The work.
        clock: Is told of every step.
        is_logging: Whether the loss is logged.
    """

    def __init__(self, task: Task, clock: Clock, *, is_logging: bool) -> None:
        super().__init__()
        self.network = task.build_model()
        self.loss_fn = nn.CrossEntropyLoss()
        self._task, self._clock, self._is_logging = task, clock, is_logging

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        loss = self.loss_fn(self.network(inputs), targets)
        if self._is_logging:
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        task = self._task
        return torch.optim.SGD(self.parameters(), lr=task.lr, momentum=task.momentum)

    def on_train_batch_end(self, *_: object) -> None:
        """Mark the end of a step; the Trainer calls this whether it is there or not."""
        self._clock.tick()


def run(*, barebones: bool) -> None:
    """Train.

    Args:
        barebones: Turn off all that costs speed; the Trainer has a switch of that name.
    """
    task, clock = read_task(), Clock()
    module = Classifier(task, clock, is_logging=not barebones)
    loader = DataLoader(task.read_dataset(), batch_size=task.batch_size, shuffle=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=task.ranks,
        strategy="ddp" if task.ranks > 1 else "auto",
        max_epochs=task.epochs,
        default_root_dir=task.output,
        barebones=barebones,
    )
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        task.finish(module.network, clock)
    leave_group()


if __name__ == "__main__":
    run(barebones=False)
