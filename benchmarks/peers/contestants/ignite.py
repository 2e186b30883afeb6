"""PyTorch-Ignite with its helpers for distributed training.

Source:
    https://docs.pytorch.org/ignite/distributed.html
"""

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from torch import nn

from benchmarks.peers.task import Clock, Task, read_task


def train(_: int, task: Task) -> None:
    """Train; every rank calls this."""
    clock = Clock()
    network = task.build_model()
    loader = idist.auto_dataloader(
        task.read_dataset(), batch_size=task.batch_size * idist.get_world_size(), shuffle=True
    )
    model = idist.auto_model(network)
    optimizer = idist.auto_optim(
        torch.optim.SGD(model.parameters(), lr=task.lr, momentum=task.momentum)
    )
    trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, clock.tick)

    @trainer.on(Events.EPOCH_STARTED)
    def shuffle(engine: Engine) -> None:
        if idist.get_world_size() > 1:
            loader.sampler.set_epoch(engine.state.epoch - 1)

    trainer.run(loader, max_epochs=task.epochs)
    if idist.get_rank() == 0:
        task.finish(network, clock)


def main() -> None:
    """Join the other ranks and train."""
    task = read_task()
    with idist.Parallel(backend="gloo" if task.ranks > 1 else None) as parallel:
        parallel.run(train, task)


if __name__ == "__main__":
    main()
