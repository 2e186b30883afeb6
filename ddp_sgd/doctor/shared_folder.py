"""Shared folder check: rank 0 leaves a file in the output folder, the others look for it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex


@contextmanager
def leave_token(folder: Path) -> Iterator[tuple[str | None, str]]:
    """Put a file into a folder for a while, by which other hosts know it again.

    Yields:
        Name of the file, or None with the reason why nothing can be written there.
    """
    # os.path finds no fault with a name that is too long: it is not there.
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]  # noqa: PTH110
    token = folder / f".doctor-{token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token.write_text("python -m ddp_sgd.doctor looks whether hosts share this folder.\n")
    except OSError as error:
        _clean_up(None, made)
        yield None, error.strerror or str(error)
        return
    try:
        yield token.name, ""
    finally:
        _clean_up(token, made)


def sees_token(folder: Path, token: str | None) -> bool:
    """Whether rank 0's file is in the folder that this host knows by the same name.

    Args:
        folder: The output folder of this rank.
        token: Name of the file; None: rank 0 could not write one.
    """
    return token is not None and os.path.exists(folder / token)  # noqa: PTH110


def _clean_up(token: Path | None, made: Sequence[Path]) -> None:
    with suppress(OSError):
        if token:
            token.unlink(missing_ok=True)
        for place in made:
            place.rmdir()
