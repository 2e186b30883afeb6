"""What every command does around its work: read its line, end with one line and one code."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_sgd.distributed.ranks import may_be_rank_0, told_by
from ddp_sgd.errors import ExitCode, FaultElsewhereError, UserError

if TYPE_CHECKING:
    from ddp_sgd.config import CommandLine, Option


LAUNCHER_READS = "LAUNCH_EXIT_CODE_FILE"
"""Variable that names the file in which a launch script looks for the exit code of a rank."""


def run_command(
    work: "Callable[[CommandLine], int | None]",
    argv: Sequence[str] | None,
    *,
    program: str,
    about: str,
    options: "Sequence[Option]" = (),
    argument: str | None = None,
) -> int:
    """Run a command and turn whatever happens into an exit code.

    Args:
        work: What the command does; returns its exit code, None for 0.
        argv: Arguments after the name of the command; None takes those of the process.
        program: How the command is called, for ``--help``.
        about: One sentence on what it does, for ``--help``.
        options: Options besides the keys of the configuration.
        argument: Name of the one argument that stands alone; None: there is none.

    Returns:
        The exit code of the contract. An error of the user's is one line on stderr, from one rank.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--debug" not in argv:
        # torch reads it when it is imported. Else each rank shows the C++ frames of a lost store.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    def read_and_work() -> int | None:
        from ddp_sgd.config import read_command_line

        with told_by(this_one=may_be_rank_0(os.environ)):
            line = read_command_line(
                argv,
                os.environ,
                program=program,
                about=about,
                options=options,
                argument=argument,
            )
        if line.text is not None:
            sys.stdout.write(line.text)
            return ExitCode.DONE
        return work(line)

    code = exit_code_of(read_and_work, debug="--debug" in argv)
    _tell_the_launcher(code)
    return code


def exit_code_of(work: Callable[[], int | None], *, debug: bool) -> int:
    """Do some work and turn whatever happens into an exit code.

    Args:
        work: Returns its exit code, None for 0.
        debug: Whether an error comes with its traceback.

    Returns:
        The exit code of the contract. An error of the user's is one line on stderr, from one rank.
    """
    try:
        return work() or ExitCode.DONE
    except FaultElsewhereError as error:
        return error.exit_code
    except UserError as error:
        _tell(str(error), debug=debug)
        return error.exit_code
    except Exception as error:  # a defect of ours, or in the user's code
        _tell(
            f"{type(error).__name__} is unexpected: {' '.join(str(error).split())}; "
            "run again with --debug to see where it comes from.",
            debug=debug,
        )
        return ExitCode.INTERNAL


def _tell_the_launcher(code: int) -> None:
    """Leave the code for launch scripts: torchrun exits with 1 whatever it was.

    The first rank of each host does so, since rank 0 may be on another, without a shared disk. A
    run that was refused leaves no ``result.json``: that would be somebody else's.
    """
    path = os.environ.get(LAUNCHER_READS)
    if path and (may_be_rank_0(os.environ) or os.environ.get("LOCAL_RANK") == "0"):
        with suppress(OSError):
            Path(path).write_text(f"{int(code)}\n")


def _tell(message: str, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    sys.stdout.flush()
    print(f"ddp_sgd: error: {message}", file=sys.stderr, flush=True)  # noqa: T201
