"""Entry point of commands: parse options, run, report an error in one line, return an exit code."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ddp_sgd.console import deliver, report_error, settle
from ddp_sgd.distributed.environment import may_be_rank_0, only_on_rank
from ddp_sgd.distributed.process_exit import leave_for_launcher
from ddp_sgd.errors import ExitCode, RemoteError, StoppedError, UserError
from ddp_sgd.text import mask

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from ddp_sgd.config import CommandLine


class _End(NamedTuple):
    """How some work ended.

    Args:
        code: Exit code of the contract.
        line: The message of a code above 0, on one line.
        traceback: Where an error comes from, if requested; else empty.
        is_first: Whether this process ran into it first.
    """

    code: int
    line: str = ""
    traceback: str = ""
    is_first: bool = True


def run_command(
    work: "Callable[[CommandLine], int | None]",
    argv: Sequence[str] | None,
    *,
    program: str,
    about: str,
    add_options: "Callable[[ArgumentParser], None] | None" = None,
    argument: str | None = None,
) -> int:
    """Run a command and turn its outcome into an exit code.

    Args:
        work: What the command does; returns its exit code, None for 0.
        argv: Arguments after the name of the command; None takes those of the process.
        program: How the command is called, for ``--help``.
        about: One sentence on what it does, for ``--help``.
        add_options: Adds what the command takes besides the keys of the configuration.
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

        with only_on_rank(this_one=may_be_rank_0(os.environ)):
            line = read_command_line(
                argv,
                os.environ,
                program=program,
                about=about,
                add_options=add_options,
                argument=argument,
            )
        if line.text is not None:
            deliver(line.text)
            return ExitCode.DONE
        return work(line)

    end = _do(read_and_work, debug="--debug" in argv)
    leave_for_launcher(end.code, end.line, traceback=end.traceback, is_first=end.is_first)
    return end.code


def exit_code_of(work: Callable[[], int | None], *, debug: bool) -> int:
    """Do some work and turn its outcome into an exit code.

    Args:
        work: Returns its exit code, None for 0.
        debug: Whether an error comes with its traceback.

    Returns:
        The exit code of the contract. An error of the user's is one line on stderr, from one rank.
    """
    return _do(work, debug=debug).code


def _do(work: Callable[[], int | None], *, debug: bool) -> _End:
    try:
        code = work() or ExitCode.DONE
    except RemoteError as error:
        return _End(error.exit_code, str(error), is_first=False)
    except StoppedError as error:
        report_error(error)
        return _End(error.exit_code, str(error))
    except UserError as error:
        return _report(error.exit_code, str(error), debug=debug)
    except Exception as error:  # a defect of ours, or in the user's code
        line = (
            f"{type(error).__name__} is unexpected: {mask(' '.join(str(error).split()))}; "
            "run again with --debug to see where it comes from."
        )
        return _report(ExitCode.INTERNAL, line, debug=debug)
    finally:
        settle()
    if code == ExitCode.STOPPED:
        return _End(code, "the run was stopped on request; start it again, it goes on from there.")
    return _End(code, f"the command ended with code {int(code)}; see what it printed.")


def _report(code: int, line: str, *, debug: bool) -> _End:
    origin = traceback.format_exc() if debug else ""
    report_error(line, origin)
    return _End(code, line, origin)
