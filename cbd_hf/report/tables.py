"""Plain tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def format_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of equal keys as aligned columns under a header; numbers to the right."""
    if not rows:
        return "(nothing)"
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = ["  ".join(name.ljust(width) for name, width in widths.items())]
    lines.append("  ".join("-" * width for width in widths.values()))
    for row in rows:
        cells = (
            row[name].rjust(width) if row[name][:1].isdigit() else row[name].ljust(width)
            for name, width in widths.items()
        )
        lines.append("  ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


__all__ = ["format_table"]
