"""Which W&B run a run of ours is, and what W&B shows about it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ddp_sgd.config.sections import WandbConfig
from ddp_sgd.report.sink import RunRecord

if TYPE_CHECKING:
    import wandb


def init_arguments(
    config: WandbConfig, settings: "wandb.Settings", record: RunRecord
) -> dict[str, Any]:
    """Give the arguments of ``wandb.init`` that depend on the run.

    Args:
        config: Section ``wandb`` of the configuration.
        settings: The user's settings, from wandb's files and variables.
        record: What is known about the run.

    Returns:
        Arguments by name; None leaves a value to the user's own settings.
    """
    return {
        "dir": str(record.folder),
        "id": _kept_id(record) or (None if settings.run_id else record.run_id),
        # Also offline: `wandb sync` follows it, and appends the rows instead of starting anew.
        "resume": "allow" if record.resumed else None,
        "allow_val_change": True,
        "project": config.project or (None if settings.project else "ddp_sgd"),
        "name": config.name or (None if settings.run_name else record.name),
        "entity": config.entity,
        "group": config.group,
        "tags": config.tags or None,
        "config": {
            **record.config,
            "plan": asdict(record.plan),
            "world_size": record.world_size,
            "git_commit": record.git_commit,
        },
    }


def _kept_id(record: RunRecord) -> str | None:
    """Give the id that earlier lives used, so that they all belong together."""
    if not record.resumed:
        return None
    try:
        return (record.folder / "wandb" / "run_id").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
