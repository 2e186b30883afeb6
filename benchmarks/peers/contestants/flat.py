"""The limit: flat buffers, no wrapper, one all-reduce, one fused call; written for this work only.

Weights, gradients and momentum buffers are one tensor each. The batch at the end of an epoch counts
by its true number of samples.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.peers.task import Clock, Task, leave_group, read_task


def main() -> None:
    """Join the other rank, if there is one, and train."""
    task, clock = read_task(), Clock()
    rank = int(os.environ.get("RANK", "0"))
    if task.ranks > 1:
        dist.init_process_group("gloo")
    model = task.build_model()
    train(task, clock, model, rank)
    if rank == 0:
        task.finish(model, clock)
    leave_group()


def train(task: Task, clock: Clock, model: nn.Module, rank: int) -> None:
    """Take all steps."""
    inputs, targets = task.read_tensors()
    weights, gradients = flatten(model)
    momentum_buffer = torch.zeros_like(weights)
    samples, global_batch = len(targets), task.batch_size * task.ranks
    whole_share = torch.tensor(1 / task.ranks)
    for order in task.read_order():
        for start in range(0, samples, global_batch):
            stop = min(start + global_batch, samples)
            rows = order[start + rank : stop : task.ranks]
            is_whole = stop - start == global_batch
            share = whole_share if is_whole else torch.tensor(len(rows) / (stop - start))
            gradients.zero_()
            outputs = model(inputs.index_select(0, rows))
            cross_entropy(outputs, targets.index_select(0, rows)).backward(share)
            if task.ranks > 1:
                dist.all_reduce(gradients)
            torch._fused_sgd_(
                [weights],
                [gradients],
                [momentum_buffer],
                weight_decay=0.0,
                momentum=task.momentum,
                lr=task.lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )
            clock.tick()


def flatten(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Put all weights into one tensor and all gradients into another; both are returned."""
    parameters = list(model.parameters())
    weights = torch.cat([p.detach().flatten() for p in parameters])
    gradients = torch.zeros_like(weights)
    start = 0
    for p in parameters:
        part = slice(start, start + p.numel())
        p.data, p.grad = weights[part].view_as(p), gradients[part].view_as(p)
        start += p.numel()
    return weights, gradients


if __name__ == "__main__":
    main()
