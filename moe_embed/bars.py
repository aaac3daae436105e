"""Stacked bars of bytes against a limit: as text for a terminal, and as an SVG that needs nothing else."""

import html
from collections.abc import Mapping

from moe_embed import page

GIB = 2**30


def as_text(parts: Mapping[str, float], *, limit: float, width: int = 100) -> list[str]:
    """A line a part, with its bytes and its share of the limit, and one bar of all of them with the limit as "|"."""
    scale = (width - 31) / max(limit, sum(parts.values()))
    lines, bar, total = [], "", 0.0
    for i, (name, size) in enumerate(parts.items()):
        mark = "#=+-*%@"[i % 7]
        lines.append(f"  {name:<14}{size / GIB:8.2f} GiB  {mark * max(round(size * scale), size > 0)}")
        total += size
        bar += mark * (round(total * scale) - len(bar))
    place = round(limit * scale)
    bar = bar.ljust(place)
    return [*lines, f"  {'all':<14}{total / GIB:8.2f} GiB  {bar[:place]}|{bar[place:]}"]


def as_svg(parts: Mapping[str, float], *, limit: float, title: str) -> str:
    """One stacked bar with a legend; the limit is a line across it."""
    width, left, top, height = 720, 20, 54, 46
    total = sum(parts.values())
    scale = (width - 2 * left) / (1.05 * max(limit, total))
    shapes, x = [], float(left)
    for i, (name, size) in enumerate(parts.items()):
        color, label = page.COLORS[i % len(page.COLORS)], f"{name} {size / GIB:.2f} GiB"
        shapes.append(
            f'<rect x="{x:.1f}" y="{top}" width="{size * scale:.1f}" height="{height}" fill="{color}">'
            f"<title>{html.escape(label)}</title></rect>"
        )
        row, column = divmod(i, 3)
        cx, cy = left + 230 * column, top + height + 44 + 22 * row
        shapes.append(f'<rect x="{cx}" y="{cy - 11}" width="12" height="12" fill="{color}"/>')
        shapes.append(f'<text x="{cx + 18}" y="{cy}">{html.escape(label)}</text>')
        x += size * scale
    at = left + limit * scale
    shapes.append(f'<path d="M{at:.1f} {top - 8}V{top + height + 8}" stroke="#000" stroke-width="2"/>')
    shapes.append(f'<text x="{at:.1f}" y="{top + height + 22}" text-anchor="end">limit {limit / GIB:.2f} GiB</text>')
    font = min(15, 2 * (width - 2 * left) / max(len(title), 1))  # a long title is smaller, not cut off
    bottom = top + height + 44 + 22 * -(-len(parts) // 3)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom}" viewBox="0 0 {width} {bottom}" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{left}" y="26" font-size="{font:.3g}">{html.escape(title)}</text>{"".join(shapes)}</svg>\n'
    )
