"""Lightning Fabric, as in its guide for converting PyTorch code.

Source:
    https://lightning.ai/docs/fabric/stable/fundamentals/convert.html
"""

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.peers.task import Clock, leave_group, read_task


def main() -> None:
    """Train."""
    task, clock = read_task(), Clock()
    strategy = "ddp" if task.ranks > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=task.ranks, strategy=strategy)
    fabric.launch()
    network = task.build_model()
    optimizer = torch.optim.SGD(network.parameters(), lr=task.lr, momentum=task.momentum)
    model, optimizer = fabric.setup(network, optimizer)
    loader = fabric.setup_dataloaders(
        DataLoader(task.read_dataset(), batch_size=task.batch_size, shuffle=True)
    )
    loss_fn = nn.CrossEntropyLoss()
    model.train()
    for _ in range(task.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            fabric.backward(loss)
            optimizer.step()
            clock.tick()
    if fabric.is_global_zero:
        task.finish(network, clock)
    leave_group()


if __name__ == "__main__":
    main()
