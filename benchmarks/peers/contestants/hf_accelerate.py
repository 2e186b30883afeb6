"""Accelerate, as in its quick tour.

Source:
    https://huggingface.co/docs/accelerate/quicktour
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.peers.task import Clock, read_task


def main() -> None:
    """Train."""
    task, clock = read_task(), Clock()
    accelerator = Accelerator(cpu=True)
    model = task.build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=task.momentum)
    loader = DataLoader(task.read_dataset(), batch_size=task.batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss_fn = nn.CrossEntropyLoss()
    for _ in range(task.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            accelerator.backward(loss)
            optimizer.step()
            clock.tick()
    if accelerator.is_main_process:
        task.finish(accelerator.unwrap_model(model), clock)
    accelerator.end_training()


if __name__ == "__main__":
    main()
