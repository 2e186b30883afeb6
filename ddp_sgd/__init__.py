"""Data-parallel SGD done right.

The public names are loaded when they are first used, so that a wrong option is reported before
torch is imported, and ``python -m ddp_sgd.train`` imports nothing twice.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp_sgd.config import RunConfig
    from ddp_sgd.distributed.runtime import Runtime, start_runtime
    from ddp_sgd.engine.fit import fit
    from ddp_sgd.engine.result import RunResult
    from ddp_sgd.errors import UserError
    from ddp_sgd.plan import Plan, make_plan

__version__ = "0.1.0"

_HOMES = {
    "Plan": "ddp_sgd.plan",
    "RunConfig": "ddp_sgd.config",
    "RunResult": "ddp_sgd.engine.result",
    "Runtime": "ddp_sgd.distributed.runtime",
    "UserError": "ddp_sgd.errors",
    "fit": "ddp_sgd.engine.fit",
    "make_plan": "ddp_sgd.plan",
    "start_runtime": "ddp_sgd.distributed.runtime",
}

__all__ = [
    "Plan",
    "RunConfig",
    "RunResult",
    "Runtime",
    "UserError",
    "fit",
    "make_plan",
    "start_runtime",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
