"""The final loss: of the weights that each contestant left behind, measured for all alike."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.peers.task import Task
from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors

_BATCH = 128


def final_loss(task: Task, samples: int, *, is_ours: bool) -> float:
    """Return the mean loss over the first samples of the training data.

    Batch normalization takes the statistics of the batch, since only the weights are compared.

    Args:
        task: The work; its output holds the weights.
        samples: How many.
        is_ours: Whether the weights are in a checkpoint of ``ddp_sgd``.
    """
    torch.set_num_threads(1)
    model = task.build_model()
    model.load_state_dict(_read_weights(Path(task.output), is_ours=is_ours))
    inputs, targets = (part[:samples] for part in task.read_tensors())
    batches = zip(inputs.split(_BATCH), targets.split(_BATCH), strict=True)
    with torch.no_grad():
        total = sum(float(cross_entropy(model(x), y, reduction="sum")) for x, y in batches)
    return total / len(targets)


def _read_weights(output: Path, *, is_ours: bool) -> dict[str, Any]:
    if not is_ours:
        return torch.load(output / "weights.pt", weights_only=True)
    file, _ = find_checkpoint(output / "run")
    return read_tensors(file)["model"]
