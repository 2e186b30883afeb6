"""Text tables with aligned columns. No torch."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Align cells below each other.

    Args:
        rows: Cells, equally many in each row; the first row is usually the head.
        left: Numbers of the columns that begin at the left; the others end at the right.

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
        lines.append("  ".join(cells).rstrip())
    return lines
