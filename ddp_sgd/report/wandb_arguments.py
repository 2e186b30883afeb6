"""Which W&B run a run of ours is, and what W&B shows about it."""

import subprocess
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ddp_sgd.config.sections import WandbConfig
from ddp_sgd.report.logger import RunRecord
from ddp_sgd.time_limits import scaled

if TYPE_CHECKING:
    import wandb

FLUSH_INTERVAL_S = 0.2
"""How often wandb writes rows to its file; its own 15 s are what a killed run would lose."""


def set_up(config: WandbConfig) -> "wandb.Settings":
    """Start wandb's helper, silent; returns the user's settings with the mode of ours on top."""
    import wandb

    mode: dict[str, Any] = {} if config.mode == "auto" else {"mode": config.mode}
    return wandb.setup(wandb.Settings(silent=True, **mode)).settings


def run_settings(
    init_timeout_s: float, upload_timeout_s: float, *, rank_pid: int
) -> "wandb.Settings":
    """Bounded, silent, and no copy of the user's code, changes or environment.

    Args:
        init_timeout_s: How long wandb may try its server.
        upload_timeout_s: How long wandb may go on uploading at the end.
        rank_pid: Process whose use of the machine is shown.
    """
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        init_timeout=init_timeout_s,
        finish_timeout=upload_timeout_s,
        finish_timeout_raises=True,
        x_transaction_log_flush_interval=FLUSH_INTERVAL_S,
        x_stats_pid=rank_pid,
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_save_requirements=False,
    )


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
        # Also offline: `wandb sync` follows it, and appends the rows instead of starting again.
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
            "git_commit": git_commit(),
        },
    }


def git_commit() -> str | None:
    """Return the commit of the working directory, ``+changes`` appended if files differ."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    with suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=scaled(5.0), check=False
        )
        return answer.stdout.strip() or None
    return None


def _kept_id(record: RunRecord) -> str | None:
    """Give the id that earlier lives used, so that they all belong together."""
    if not record.resumed:
        return None
    try:
        return (record.folder / "wandb" / "run_id").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
