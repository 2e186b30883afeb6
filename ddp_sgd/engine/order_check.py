"""Order of samples before a run: equal on all ranks, and on a resume the one of the checkpoint."""

import socket
from collections.abc import Callable

from ddp_sgd.checkpointing.store import Header
from ddp_sgd.data.order import Order
from ddp_sgd.distributed.collectives import gather_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import ConfigError, RefusedError
from ddp_sgd.plan import Plan
from ddp_sgd.rank_differences import name_values


def require_equal_orders(order: Order, runtime: Runtime) -> None:
    """Refuse to start if ranks have different orders; all ranks call this.

    Args:
        order: That of this rank; only what functions of the user's give is compared.
        runtime: This process.

    Raises:
        ConfigError: They differ; equal on all ranks.
    """
    facts = order.facts
    if runtime.alone or not facts.digest:
        return
    text = f"{facts.length:,} indices with the digest {facts.digest}"
    texts, hosts = zip(*gather_over_ranks((text, socket.gethostname()), runtime), strict=True)
    if len(set(texts)) > 1:
        raise ConfigError(
            f"data.order gives {name_values(dict(enumerate(texts)), hosts)}; let the indices "
            "follow from the arguments (n, seed, epoch, global_batch), and from files that are "
            "equal on every host."
        )


def refuse_other_order(
    header: Header | None, plan: Plan, order_for: Callable[[int], Order]
) -> None:
    """Refuse to go on in the middle of an epoch with an order that is another one by now.

    Some samples of the epoch would count twice. A function of the user's may give one for another
    global batch, as after ``on_resize=rescale``, or by an edit.

    Args:
        header: Where the run stood; None begins at step 0.
        plan: The arithmetic of today.
        order_for: The order for a global batch, in the epoch of the header.

    Raises:
        RefusedError: It is another one.
    """
    if header is None or not header.position or header.plan["samples"] != plan.samples:
        return  # other data are refused when the checkpoint is read
    batch = header.plan["global_batch"]
    earlier, today = order_for(batch).facts, order_for(plan.global_batch).facts
    if not today.digest:  # an order of this package depends on nothing else
        return
    before = header.plan.get("order_length", plan.samples)
    if earlier.length != before:
        raise RefusedError(
            f"data.order gives {earlier.length:,} indices while the checkpoint of step "
            f"{header.step} is in the middle of an epoch of {before:,}; restore it, or set "
            "resume=never to begin again."
        )
    if earlier != today:
        raise RefusedError(
            f"data.order gives another order for a global batch of {plan.global_batch:,} than for "
            f"{batch:,}, with which the run stopped in the middle of an epoch; set "
            "on_resize=keep_global_batch, and data.batch_size and data.accumulate as they were."
        )
