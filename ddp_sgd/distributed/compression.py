"""Gradients that are made smaller on their way between ranks, and what has to be remembered of it.

Hooks take the place of the all-reduce in DistributedDataParallel, and divide by the number of
ranks, as that does.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddp_sgd.config.processes import ParallelConfig
from ddp_sgd.distributed.buckets import settle_buckets
from ddp_sgd.distributed.collectives import from_rank_0
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import ConfigError
from ddp_sgd.seeds import seed_for

Tree = Mapping[str, Any]

_WHOLE_STEPS = 10
"""Steps whose gradients PowerSGD leaves whole: it needs 2 at least, and the first ones differ most."""


class Compression:
    """A compression that has nothing to remember, such as none at all."""

    def state(self) -> Tree:
        """Gather what a resume needs; all ranks call this at the same step.

        Returns:
            Tensors in host memory and plain data, on rank 0; empty elsewhere.
        """
        return {}

    def restore(self, saved: Tree) -> None:
        """Put back what ``state`` gave; all ranks call this before the first step.

        Args:
            saved: Content of the checkpoint on rank 0, empty if it has none; elsewhere it is not
                looked at.
        """


class PowerSGD(Compression):
    """Sends two narrow factors instead of each large gradient, and the rest with the next step.

    Torch's hook does the arithmetic. Around it: one bucket after the other, since its messages
    would get mixed up on gloo; random numbers that follow from seed, step and bucket; and a bucket
    with a gradient that is not finite is forgotten, since it would never be finite again.

    Args:
        runtime: This process.
        names: Each parameter's name.
        rank: Columns of a factor, at least 3: for fewer, torch divides by zero where a layer has no
            gradient yet, or gives it none for ever.
        seed: Seed of the run.

    Source:
        Vogels et al. 2019, arXiv:1905.13727.
    """

    def __init__(
        self, runtime: Runtime, names: Mapping[torch.Tensor, str], *, rank: int, seed: int
    ) -> None:
        self._runtime = runtime
        self._names = names
        self._seed = seed
        self._torch = PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=_WHOLE_STEPS
        )
        self._buckets: dict[int, list[tuple[str, torch.Size]]] = {}
        self._is_settled = False

    def install(self, ddp: DistributedDataParallel) -> None:
        """Take the place of the wrapper's all-reduce, and learn its buckets."""

        def hook(_: object, bucket: dist.GradBucket) -> Future[torch.Tensor]:
            return _done(self._reduce(bucket) if self._is_settled else self._learn(bucket))

        ddp.register_comm_hook(None, hook)
        settle_buckets(ddp)
        self._is_settled = True

    def state(self) -> Tree:
        """Gather the error of every rank, and the factors, which are equal on all."""
        now = self._torch
        errors: dict[str, torch.Tensor] = {}
        for number, own in sorted(now.error_dict.items()):
            rows = _gather_rows(own, self._runtime)
            if rows is not None:
                parts = zip(self._buckets[number], self._split(number, rows), strict=True)
                errors |= {name: part for (name, _), part in parts}
        if self._runtime.rank > 0:
            return {}
        factors = [
            {"names": self._names_in(number), "p": now.p_memory_dict[number], "q": q}
            for number, q in sorted(now.q_memory_dict.items())
        ]
        rank = now.matrix_approximation_rank
        return {"step": now.iter, "rank": rank, "errors": errors, "factors": factors}

    def restore(self, saved: Tree) -> None:
        """Put back step, factors and errors.

        Other ranks than before get the mean error each, which has the same effect on the mean
        gradient. Factors of other buckets, or of another rank, are drawn anew.
        """
        plain = {key: saved[key] for key in ("step", "rank", "factors")} if saved else None
        plain = from_rank_0(plain, self._runtime)
        if plain is None:
            return
        now, device = self._torch, self._runtime.device
        now.iter = plain["step"]
        known = {tuple(each["names"]): each for each in plain["factors"]}
        for number in sorted(self._buckets):
            own = torch.zeros(self._numel(number), dtype=self._dtypes[number], device=device)
        ...
