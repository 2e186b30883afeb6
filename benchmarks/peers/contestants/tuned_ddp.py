"""DistributedDataParallel as well as one can use it by hand.

A batch is one indexing operation, nothing waits for a loss, the optimizer is fused, gradients live
in the buckets, the graph is declared static, and running statistics are not sent in every step. The
batch at the end of an epoch counts by its true number of samples.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.task import Clock, Task, leave_group, read_task


def main() -> None:
    """Join the other ranks and train."""
    task, clock = read_task(), Clock()
    dist.init_process_group("gloo")
    model = task.build_model()
    train(task, clock, model)
    if dist.get_rank() == 0:
        task.finish(model, clock)
    leave_group()


def train(task: Task, clock: Clock, model: nn.Module) -> None:
    """Take all steps."""
    inputs, targets = task.read_tensors()
    replica = DistributedDataParallel(
        model, gradient_as_bucket_view=True, static_graph=True, forward_sync_buffers=False
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=task.momentum, fused=True)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    samples, global_batch = len(targets), task.batch_size * ranks
    one = torch.tensor(1.0)
    for order in task.read_order():
        for start in range(0, samples, global_batch):
            stop = min(start + global_batch, samples)
            rows = order[start + rank : stop : ranks]
            is_whole = stop - start == global_batch
            share = one if is_whole else torch.tensor(len(rows) * ranks / (stop - start))
            optimizer.zero_grad()
            outputs = replica(inputs.index_select(0, rows))
            cross_entropy(outputs, targets.index_select(0, rows)).backward(share)
            optimizer.step()
            clock.tick()


if __name__ == "__main__":
    main()
