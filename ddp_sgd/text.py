"""Text formatting: tables with aligned columns, the first line of an error. No torch."""

from collections.abc import Container, Sequence


def columns(
    rows: Sequence[Sequence[str]], *, left: Container[int] = (0,), gap: str = "  "
) -> list[str]:
    """Align cells below each other.

    Args:
        rows: Cells, equally many in each row; the first row is usually the head.
        left: Numbers of the columns that begin at the left; the others end at the right.
        gap: What stands between two columns.

    Returns:
        A line for each row, without blanks at its end.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(gap.join(cells).rstrip())
    return lines


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; without a message, the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
