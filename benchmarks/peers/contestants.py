"""The loops of all contestants but ``ddp_sgd``, each as somebody who knows it well would write it.

Usage: ``python -m benchmarks.peers.contestants NAME TASK``. A loop trains, marks the end of every
step, and returns its network. It imports what it needs and nothing else, so that start-up and
memory are its own.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.task import MOMENTUM, Clock, Task

if TYPE_CHECKING:
    import torch
    from torch import nn


def bare(task: Task, clock: Clock) -> "nn.Module":
    """The work of a step and nothing else: forward, backward, fused step, on one batch for ever."""
    import torch
    from torch.nn.functional import cross_entropy

    model = task.build_model()
    inputs, targets = (part[: task.batch_size].clone() for part in task.read_tensors())
    parameters = list(model.parameters())
    weights = [p.detach() for p in parameters]
    momentum_buffers = [torch.zeros_like(p) for p in weights]
    for _ in task.batches(0):
        for p in parameters:
            p.grad = None
        cross_entropy(model(inputs), targets).backward()
        _fused_sgd(task, weights, [p.grad for p in parameters], momentum_buffers)
        clock.tick()
    return model


def flat(task: Task, clock: Clock) -> "nn.Module":
    """The limit: flat buffers, no wrapper, one all-reduce, one fused call; for this work only.

    Weights, gradients and momentum buffers are one tensor each. The batch at the end of an epoch
    counts by its true number of samples.
    """
    import torch
    import torch.distributed as dist
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import parameters_to_vector, vector_to_parameters

    if task.ranks > 1:
        dist.init_process_group("gloo")
    model = task.build_model()
    inputs, targets = task.read_tensors()
    parameters = list(model.parameters())
    weights = parameters_to_vector(parameters).detach()
    gradients, momentum_buffer = torch.zeros_like(weights), torch.zeros_like(weights)
    vector_to_parameters(weights, parameters)  # they are views of it from now on
    for p, part in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    whole_share = torch.tensor(1 / task.ranks)
    for rows, share in task.batches(int(os.environ.get("RANK", "0"))):
        factor = whole_share if share * task.ranks == 1 else torch.tensor(share)
        gradients.zero_()
        outputs = model(inputs.index_select(0, rows))
        cross_entropy(outputs, targets.index_select(0, rows)).backward(factor)
        if task.ranks > 1:
            dist.all_reduce(gradients)
        _fused_sgd(task, [weights], [gradients], [momentum_buffer])
        clock.tick()
    return model


def _fused_sgd(
    task: Task,
    weights: "list[torch.Tensor]",
    gradients: "list[torch.Tensor]",
    momentum_buffers: "list[torch.Tensor]",
) -> None:
    import torch

    numbers = {"weight_decay": 0.0, "momentum": MOMENTUM, "lr": task.lr, "dampening": 0.0}
    flags = {"nesterov": False, "maximize": False, "is_first_step": False}
    torch._fused_sgd_(weights, gradients, momentum_buffers, **numbers, **flags)


def tutorial(task: Task, clock: Clock) -> "nn.Module":
    """The loop of PyTorch's tutorials.

    Source:
        https://docs.pytorch.org/tutorials/beginner/ddp_series_fault_tolerance.html, with the
        running loss of https://docs.pytorch.org/tutorials/beginner/introyt/trainingyt.html.
    """
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler

    dist.init_process_group(backend="gloo")
    model = task.build_model()
    dataset = task.read_dataset()
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=task.batch_size, shuffle=False, sampler=sampler)
    replica = DistributedDataParallel(model)
    optimizer = task.build_optimizer(model)
    loss_fn = nn.CrossEntropyLoss()
    for epoch in range(task.epochs):
        sampler.set_epoch(epoch)
        running_loss = 0.0
        for inputs, targets in loader:
            optimizer.zero_grad()
            outputs = replica(inputs)
            loss = loss_fn(outputs, targets)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            clock.tick()
        if dist.get_rank() == 0:
            print(f"epoch {epoch} loss {running_loss / len(loader):.4f}")
    return model


def _train(task: Task, clock: Clock, library: Any, model: Any, optimizer: Any, loader: Any) -> None:
    """The loop of Accelerate's and Fabric's guides: theirs is the backward pass."""
    from torch import nn

    loss_fn = nn.CrossEntropyLoss()
    model.train()
    for _ in range(task.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            library.backward(loss)
            optimizer.step()
            clock.tick()


def accelerate(task: Task, clock: Clock) -> "nn.Module":
    """Accelerate, as in its quick tour.

    Source:
        https://huggingface.co/docs/accelerate/quicktour
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    network = task.build_model()
    model, optimizer, loader = accelerator.prepare(
        network, task.build_optimizer(network), task.build_loader()
    )
    _train(task, clock, accelerator, model, optimizer, loader)
    network = accelerator.unwrap_model(model)
    accelerator.end_training()
    return network


def fabric(task: Task, clock: Clock) -> "nn.Module":
    """Lightning Fabric, as in its guide for converting PyTorch code.

    Source:
        https://lightning.ai/docs/fabric/stable/fundamentals/convert.html
    """
    from lightning.fabric import Fabric

    strategy = "ddp" if task.ranks > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=task.ranks, strategy=strategy)
    fabric.launch()
    network = task.build_model()
    model, optimizer = fabric.setup(network, task.build_optimizer(network))
    loader = fabric.setup_dataloaders(task.build_loader())
    _train(task, clock, fabric, model, optimizer, loader)
    return network


def trainer(task: Task, clock: Clock) -> "nn.Module":
    """Lightning's Trainer with its defaults: logger, checkpoints, progress bar, model summary.

    With ``--barebones`` in its mode to measure what the Trainer costs: without all these.

    Source:
        https://lightning.ai/docs/pytorch/stable/starter/introduction.html and
        https://lightning.ai/docs/pytorch/stable/common/trainer.html#barebones
    """
    import lightning
    import torch
    from torch import nn

    barebones = "--barebones" in sys.argv

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = task.build_model()
            self.loss_fn = nn.CrossEntropyLoss()

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            inputs, targets = batch
            loss = self.loss_fn(self.network(inputs), targets)
            if not barebones:
                self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return task.build_optimizer(self)

        def on_train_batch_end(self, *_: object) -> None:
            clock.tick()  # the Trainer calls this whether it is there or not

    module = Classifier()
    lightning.Trainer(
        accelerator="cpu",
        devices=task.ranks,
        strategy="ddp" if task.ranks > 1 else "auto",
        max_epochs=task.epochs,
        default_root_dir=task.output,
        barebones=barebones,
    ).fit(module, task.build_loader())
    return module.network


def ignite(task: Task, clock: Clock) -> "nn.Module":
    """PyTorch-Ignite with its helpers for distributed training.

    Source:
        https://docs.pytorch.org/ignite/distributed.html
    """
    import ignite.distributed as idist
    from ignite.engine import Engine, Events, create_supervised_trainer
    from torch import nn

    network = task.build_model()

    def train(_: int) -> None:
        batch_size = task.batch_size * idist.get_world_size()
        loader = idist.auto_dataloader(task.read_dataset(), batch_size=batch_size, shuffle=True)
        model = idist.auto_model(network)
        optimizer = idist.auto_optim(task.build_optimizer(model))
        trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
        trainer.add_event_handler(Events.ITERATION_COMPLETED, clock.tick)

        @trainer.on(Events.EPOCH_STARTED)
        def shuffle(engine: Engine) -> None:
            if idist.get_world_size() > 1:
                loader.sampler.set_epoch(engine.state.epoch - 1)

        trainer.run(loader, max_epochs=task.epochs)

    with idist.Parallel(backend="gloo" if task.ranks > 1 else None) as parallel:
        parallel.run(train)
    return network


def main() -> None:
    """Run the loop that the command line names, and leave its weights and times behind."""
    name, path = sys.argv[1:3]
    task, clock = Task(**json.loads(Path(path).read_text())), Clock()
    if task.ranks > 1:
        # Its functions keep the group that they find as a default argument, and DDP imports it
        # late: the group's threads then live on after it was destroyed, and a rank may abort at
        # its exit. This takes 10 ms, of all alike.
        import torch.distributed.nn  # noqa: F401
    network = globals()[name](task, clock)
    import torch.distributed as dist

    if os.environ.get("RANK", "0") == "0":
        task.finish(network, clock)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
