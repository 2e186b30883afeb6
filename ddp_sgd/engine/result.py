"""Run result: status, scores, weights digest, as ``result.json`` holds them.

Digest of a model's weights.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddp_sgd.distributed.collectives import gather_over_ranks
from ddp_sgd.distributed.data_parallel import DataParallelModel
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.evaluation import Metrics
from ddp_sgd.engine.sync import TimeShares, is_share, peak_bytes
from ddp_sgd.engine.train_state import State
from ddp_sgd.errors import ExitCode
from ddp_sgd.plan import Plan
from ddp_sgd.tree import bytes_of

_PLAIN = ("status", "exit_code", "step", "epoch", "samples", "world_size")
"""Fields of a result that ``result.json`` begins with."""

_PEAK = "memory/peak_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How a run ended; equal on all ranks.

    Args:
        status: ``finished`` or ``stopped``; a run that fails raises.
        exit_code: What the command returns.
        step: Optimizer steps taken.
        epoch: Passes over the data, a real number.
        samples: Samples trained.
        world_size: Ranks.
        scores: The last evaluation, and that of the test set, by name.
        shares: Where the time of this attempt went, from ``TimeShares.summary``.
        weights_digest: SHA-256 of all parameters and buffers.
        peak_bytes: Most memory of a device that any rank had in use; None if not CUDA.
    """

    status: str
    exit_code: ExitCode
    step: int
    epoch: float
    samples: int
    world_size: int
    scores: Metrics
    shares: Metrics
    weights_digest: str
    peak_bytes: int | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the result as plain data, as ``result.json`` holds it."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        digest = {"weights_digest": self.weights_digest}
        memory = {} if self.peak_bytes is None else {_PEAK: self.peak_bytes}
        measured = self.scores | self.shares | memory
        return plain | {"exit_code": int(self.exit_code)} | measured | digest


def read_result(folder: Path) -> RunResult | None:
    """Read how an earlier attempt of a run ended; None if it failed, or left no result."""
    try:
        row = json.loads((folder / "result.json").read_bytes())
        plain = {name: row[name] for name in (*_PLAIN, "weights_digest")}
        return RunResult(
            **plain | {"exit_code": ExitCode(row["exit_code"])},
            scores={key: value for key, value in row.items() if key.startswith(("eval/", "test/"))},
            shares={key: value for key, value in row.items() if is_share(key)},
            peak_bytes=row.get(_PEAK),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def build_result(
    state: State,
    plan: Plan,
    wrapper: DataParallelModel,
    shares: TimeShares,
    runtime: Runtime,
    *,
    tested: Metrics | None = None,
) -> RunResult:
    """Compare the weights of all ranks and build the result.

    Args:
        state: Where the run stands.
        plan: The run's arithmetic.
        wrapper: The model.
        shares: Where the time went.
        runtime: This process.
        tested: Scores of the test set; None: there are none.

    Raises:
        RuntimeError: The weights differ between ranks.
    """
    wrapper.sync_buffers()
    mine = weights_digest(wrapper.inner), peak_bytes(runtime.device)
    digests, peaks = zip(*gather_over_ranks(mine, runtime), strict=True)
    if len(set(digests)) > 1:
        raise RuntimeError(f"the weights differ between ranks: {list(digests)}")
    finished = state.step == plan.total_steps
    return RunResult(
        status="finished" if finished else "stopped",
        exit_code=ExitCode.DONE if finished else ExitCode.STOPPED,
        step=state.step,
        epoch=plan.epoch_at(state.step),
        samples=plan.samples_at(state.step),
        world_size=runtime.world_size,
        scores=state.scores | (tested or {}),
        shares=shares.summary(),
        weights_digest=digests[0],
        peak_bytes=max((peak for peak in peaks if peak is not None), default=None),
    )


def weights_digest(model: nn.Module) -> str:
    """Hash all parameters and buffers.

    Args:
        model: Module on any device; with equal names, types, shapes and bytes the digest is equal.

    Returns:
        SHA-256 over the name, dtype, shape and bytes of each tensor, in state-dict order, in
        hexadecimal.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        shape = "x".join(map(str, value.shape))
        digest.update(f"{name}:{value.dtype}:{shape}:".encode())
        digest.update(bytes_of(value.cpu()).numpy().data)
    return digest.hexdigest()
