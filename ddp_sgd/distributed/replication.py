"""The choice of the data-parallel wrapper: flat all-reduce, DistributedDataParallel, local SGD."""

from collections.abc import Mapping

import torch
from torch import nn

from ddp_sgd.config.schema import ParallelConfig
from ddp_sgd.distributed.comm_hooks import build_comm_hook
from ddp_sgd.distributed.data_parallel import DataParallelModel, FlatAllReduce, WrappedDDP
from ddp_sgd.distributed.local_sgd import LocalSGD
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.plan import Plan


def wrap_model(
    model: nn.Module,
    runtime: Runtime,
    config: ParallelConfig,
    plan: Plan,
    momentum_buffers: Mapping[nn.Parameter, torch.Tensor],
    *,
    captured: bool = False,
) -> DataParallelModel:
    """Keep a model equal on all ranks, in the way that costs least.

    With ``parallel.replica: auto`` gradients that fit into one bucket are reduced by one call after
    the backward pass. Larger ones, and what only DistributedDataParallel can do, are reduced by
    that, or, on one rank, left as they are. One rank has no other to send compressed gradients to.

    Args:
        model: The model, on the runtime's device; its weights become rank 0's.
        runtime: This process.
        config: Section ``parallel`` of the configuration.
        plan: The run's arithmetic.
        momentum_buffers: Of each parameter; empty without momentum.
        captured: Whether steps are captured, which buckets of several ranks cannot be.

    Raises:
        ConfigError: The model's gradients cannot be compressed.
    """
    if plan.local_start is not None:
        return LocalSGD(model, runtime, plan, momentum_buffers)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    compresses = config.compression != "none" and not runtime.alone
    only_ddp = config.static_graph or config.find_unused_parameters or compresses
    fits = trained <= config.bucket_mb * 2**20 and not only_ddp
    is_flat = config.replica == "flat" or (captured and not runtime.alone)
    if is_flat or (config.replica == "auto" and fits):
        return FlatAllReduce(model, runtime)
    if runtime.alone:
        return DataParallelModel(model, runtime)
    return WrappedDDP(
        model,
        runtime,
        build_comm_hook(config.compression, model, runtime),
        bucket_cap_mb=config.bucket_mb,
        gradient_as_bucket_view=config.gradient_as_bucket_view,
        static_graph=config.static_graph,
        find_unused_parameters=config.find_unused_parameters,
    )
