"""The loop of PyTorch's tutorials.

Source:
    https://docs.pytorch.org/tutorials/beginner/ddp_series_fault_tolerance.html, with the running
    loss of https://docs.pytorch.org/tutorials/beginner/introyt/trainingyt.html.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from benchmarks.peers.task import Clock, Task, leave_group, read_task


def main() -> None:
    """Join the other ranks and train."""
    task, clock = read_task(), Clock()
    dist.init_process_group(backend="gloo")
    model = task.build_model()
    train(task, clock, model)
    if dist.get_rank() == 0:
        task.finish(model, clock)
    leave_group()


def train(task: Task, clock: Clock, model: nn.Module) -> None:
    """Take all steps."""
    dataset = task.read_dataset()
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=task.batch_size, shuffle=False, sampler=sampler)
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=task.momentum)
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


if __name__ == "__main__":
    main()
