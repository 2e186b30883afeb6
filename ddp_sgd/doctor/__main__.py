"""Command: check every rank, its host and the links between them, without training.

Usage: ``torchrun --nproc_per_node=4 -m ddp_sgd.doctor --config run.yaml``, or with srun, or alone.

Exit codes: 0 the ranks agree and reach each other, remarks included; 64 ranks disagree, or the
environment of one is wrong; 69 ranks did not come, or cannot join; 73 output_dir cannot be written.
"""

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ddp_sgd.cli import run_command
from ddp_sgd.config import CommandLine
from ddp_sgd.console import deliver
from ddp_sgd.distributed.environment import Ranks, may_be_rank_0, only_on_rank, read_ranks
from ddp_sgd.distributed.process_exit import leave
from ddp_sgd.errors import ConfigError, PeerError, RemoteError

if TYPE_CHECKING:
    from ddp_sgd.doctor.protocol import Diagnosis


def main(argv: Sequence[str] | None = None) -> int:
    """Examine the ranks, and return the exit code of the contract.

    Args:
        argv: Arguments after the name of the command; None takes those of the process.
    """
    return run_command(
        doctor,
        argv,
        program="python -m ddp_sgd.doctor",
        about="Look at every rank, its host and the links between them, without training: start "
        "it as the run is started, with the same options. The last line is one JSON object. Exit "
        "code 0: the ranks agree and reach each other. 64: they disagree, or the environment of "
        "one is wrong. 69: ranks did not come, or cannot join. 73: output_dir cannot be written.",
    )


def doctor(line: CommandLine) -> int:
    """Compare the ranks that the environment names, and time the links between them."""
    with only_on_rank(this_one=may_be_rank_0(os.environ)):
        ranks = read_ranks(os.environ)
    try:
        return _consult(line, ranks)
    except (ConfigError, PeerError) as error:
        if ranks.local_rank == 0:  # each host may have its own fault, and reports once
            raise
        raise RemoteError(str(error), error.exit_code) from error


def _consult(line: CommandLine, ranks: Ranks) -> int:
    from ddp_sgd.doctor.facts import gather_facts
    from ddp_sgd.doctor.findings import judge_endpoint
    from ddp_sgd.doctor.protocol import coordinate, visit

    facts = gather_facts(line.config, ranks, os.environ)
    if misled := judge_endpoint(facts):
        raise ConfigError(misled.text)  # at once: this host would only wait
    if ranks.rank == 0:
        return coordinate(line.config, ranks, facts, _print)
    return visit(line.config, ranks, facts)


def _print(diagnosis: "Diagnosis") -> None:
    row = json.dumps(diagnosis.as_row(), allow_nan=False)
    deliver("".join(f"{text}\n" for text in [*diagnosis.lines(), row]))


if __name__ == "__main__":
    leave(main())
