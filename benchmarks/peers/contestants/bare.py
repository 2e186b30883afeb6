"""The work of a step and nothing else: forward, backward, fused step, on one batch for ever."""

import torch
from torch.nn.functional import cross_entropy

from benchmarks.peers.task import Clock, read_task


def main() -> None:
    """Take as many steps as the others."""
    task, clock = read_task(), Clock()
    model = task.build_model()
    inputs, targets = task.read_tensors()
    steps = task.epochs * -(-len(targets) // task.batch_size)
    inputs, targets = inputs[: task.batch_size].clone(), targets[: task.batch_size].clone()
    parameters = list(model.parameters())
    weights = [p.detach() for p in parameters]
    momentum_buffers = [torch.zeros_like(p) for p in weights]
    for _ in range(steps):
        for p in parameters:
            p.grad = None
        cross_entropy(model(inputs), targets).backward()
        torch._fused_sgd_(
            weights,
            [p.grad for p in parameters],
            momentum_buffers,
            weight_decay=0.0,
            momentum=task.momentum,
            lr=task.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        clock.tick()
    task.finish(model, clock)


if __name__ == "__main__":
    main()
