"""Tables as text."""

from collections.abc import Sequence


def table_lines(cells: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row of texts: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
