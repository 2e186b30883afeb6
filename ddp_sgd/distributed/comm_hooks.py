"""DDP communication hooks: gradient compression by bf16, fp16 or PowerSGD.

A hook takes the place of the all-reduce in DistributedDataParallel, and divides by the number of
ranks, as that does. torch's hooks are imported when a run uses one: the import is slow.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from ddp_sgd.distributed.collectives import from_rank_0
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import ConfigError

Tree = Mapping[str, Any]

_RANK = 4
"""Columns of PowerSGD's factors. With fewer than 3, torch divides by zero where a layer has no
gradient."""

_WHOLE_STEPS = 10
"""Steps that PowerSGD reduces whole: the first gradients differ most from one to the next."""

_SETTLING_PASSES = 2
"""Passes of ``settle_buckets``, which torch's hook counts as steps."""


class CommHook:
    """A hook that has nothing to remember.

    Args:
        reduce: Takes a bucket, and gives the future mean of it over ranks.
    """

    def __init__(self, reduce: Callable[[Any, GradBucket], Future[torch.Tensor]]) -> None:
        self.reduce = reduce

    def state_dict(self) -> Tree:
        """Gather what a resume needs; all ranks call this after the same step.

        Returns:
            Tensors and plain data, on rank 0; empty elsewhere.
        """
        return {}

    def load_state_dict(self, saved: Tree | None) -> None:
        """Put back what ``memory`` gave; all ranks call this before the first step.

        Args:
            saved: Content of the checkpoint, on rank 0, None if it has none; elsewhere it is not
                looked at.
        """


class _BorrowedGroup:
    """The process group, for callbacks that must not keep it.

    torch's hook leaves its group in callbacks, which gloo's threads drop a moment after the result
    is there. If that were the last hold on the group, a thread would have to wait for itself.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(dist.group.WORLD, name)


class PowerSGD(CommHook):
    """Sends two narrow factors of each large matrix, and what that leaves out with the next step.

    torch's hook does the arithmetic, with one of its states for all buckets. Here one bucket waits
    for the one before, since the messages of two would get mixed up on gloo; and a step that is
    skipped, since its gradient is not finite, leaves no trace: it would never go away.

    On a GPU the host waits for the device in every step: torch's hook synchronizes it for each
    bucket that it compresses, after which the look at whether the gradient is finite costs nothing.

    Source:
        Vogels et al. 2019, arXiv:1905.13727.
    """

    def __init__(self, names: Mapping[torch.Tensor, str], runtime: Runtime) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torchs

        super().__init__(self._reduce)
        self._names = names
        self._runtime = runtime
        self._torchs_hook = torchs.powerSGD_hook
        self._state = torchs.PowerSGDState(
            _BorrowedGroup(),
            matrix_approximation_rank=_RANK,
            start_powerSGD_iter=_SETTLING_PASSES + _WHOLE_STEPS,
        )
        self._buckets: dict[int, list[torch.Tensor]] = {}
        self._before: tuple[dict[int, torch.Tensor], ...] = ()
        self._is_finite = True

    def state_dict(self) -> Tree:
        """Gather the errors of all ranks, and the factors, which are equal on all."""
        state = self._state
        errors: dict[str, torch.Tensor] = {}
        for number, own in sorted(state.error_dict.items()):
            rows = None
            if self._runtime.rank == 0:
                rows = [torch.empty_like(own) for _ in range(self._runtime.world_size)]
            dist.gather(own, rows)
            if rows:
                parameters = self._buckets[number]
                sizes = [p.numel() for p in parameters]
                parts = torch.split(torch.stack(rows).cpu(), sizes, dim=1)
                errors |= {self._names[p]: part for p, part in zip(parameters, parts, strict=True)}
        if self._runtime.rank > 0:
            return {}
        factors = {
            self._key(number): {"p": state.p_memory_dict[number], "q": q}
            for number, q in state.q_memory_dict.items()
        }
        return {"passes": state.iter, "errors": errors, "factors": factors}

    def load_state_dict(self, saved: Tree | None) -> None:
        """Put back how far it was, errors and factors.

        Other ranks than before get the mean error each, which adds the same to the mean gradient.
        Factors of other buckets are drawn again, as at the start.
        """
        errors = saved["errors"] if saved else {}
        small = {key: saved[key] for key in ("passes", "factors")} if saved else {}
        small = from_rank_0(small, self._runtime)
        if not small:
            return
        state = self._state
        state.iter = small["passes"]
        for number in sorted(self._buckets) if small["factors"] else ():
            state.error_dict[number] = self._own_error(number, errors)
            if factors := small["factors"].get(self._key(number)):
                state.p_memory_dict[number] = factors["p"].to(self._runtime.device)
                state.q_memory_dict[number] = factors["q"].to(self._runtime.device)

    def _own_error(self, number: int, errors: Tree) -> torch.Tensor:
        """Give each rank its part of a bucket's errors, which rank 0 has."""
        parameters, world_size = self._buckets[number], self._runtime.world_size
        size = sum(p.numel() for p in parameters)
        own = torch.empty(size, dtype=parameters[0].dtype, device=self._runtime.device)
        rows = None
        if self._runtime.rank == 0:
            saved = [errors.get(self._names[p], torch.zeros(1, p.numel())) for p in parameters]
            same = all(len(each) == world_size for each in saved)
            wanted = saved if same else [each.mean(0).expand(world_size, -1) for each in saved]
            rows = list(torch.cat(wanted, dim=1).to(own))
        dist.scatter(own, rows)
        return own

    def _key(self, number: int) -> str:
        return ",".join(self._names[p] for p in self._buckets[number])

    def _reduce(self, _: Any, bucket: GradBucket) -> Future[torch.Tensor]:
        state, number = self._state, bucket.index()
        if number == 0:
            factors = {n: q.clone() for n, q in state.q_memory_dict.items()}
            self._before = (dict(state.error_dict), dict(state.p_memory_dict), factors)
            self._is_finite = True
        self._buckets[number] = bucket.parameters()
        if number not in state.q_memory_dict:
            state.rng.seed(number)  # independent of what this attempt or an earlier one drew
        reduced = self._torchs_hook(state, bucket).wait()
        self._is_finite = self._is_finite and bool(reduced.isfinite().all())  # equal on all ranks
        if bucket.is_last():
            if not self._is_finite:
                state.error_dict, state.p_memory_dict, state.q_memory_dict = self._before
            self._before = ()
        done: Future[torch.Tensor] = Future()
        done.set_result(reduced)
        return done


def build_comm_hook(kind: str, model: nn.Module, runtime: Runtime) -> CommHook | None:
    """Make the hook that compresses gradients.

    Args:
        kind: ``none``; ``bf16`` and ``fp16`` send every number in 16 bits; or ``powersgd``.
        model: Model that is trained.
        runtime: This process.

    Returns:
        The hook; None reduces gradients as they are.

    Raises:
        ConfigError: A parameter is of a type that cannot be compressed.
    """
    if kind == "none":
        return None
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"parallel.compression is {kind}, but the parameter {name} of the model is of "
                f"{str(parameter.dtype).removeprefix('torch.')}; set parallel.compression=none."
            )
    if kind == "powersgd":
        return PowerSGD({p: name for name, p in model.named_parameters()}, runtime)
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    hooks = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
    return CommHook(hooks[kind])
