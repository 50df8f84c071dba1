"""Draws the plots of `docs/performance.md` from its own tables.

    python -m benchmarks.plots

Figures stand in one place: whoever changes a table draws anew.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from benchmarks.stage import PROJECT

PAGE = PROJECT / "docs" / "performance.md"
FOLDER = PROJECT / "docs" / "plots"
WIDTH, ROW, LEFT = 720, 30, 300
COLORS = ("#2f6f9f", "#c2571a", "#3d8b4f", "#8a4f9e", "#6b6b6b")
STYLE = "font-family='sans-serif' font-size='13' fill='#222'"


def table(heading: str, number: int = 0) -> list[list[str]]:
    """Return the cells of a table below a heading, its own heading first.

    Raises:
        ValueError: There is no such heading, or no such table.
    """
    section = PAGE.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    tables = [block for block in section.split("\n\n") if block.startswith("|")]
    rows = [line.strip("|").split("|") for line in tables[number].splitlines()]
    return [[cell.strip(" *") for cell in row] for row in rows if not row[0].startswith("---")]


def value(cell: str) -> float:
    """Return the number that a cell begins with."""
    return float(cell.split()[0].rstrip("x/s").replace(",", ""))


def bars(title: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Return a plot with a bar for each name, value and label."""
    most = max(size for _, size, _ in rows)
    parts = [f"<text x='10' y='22' {STYLE} font-weight='bold'>{escape(title)}</text>"]
    for number, (name, size, label) in enumerate(rows):
        y = 40 + number * ROW
        width = (WIDTH - LEFT - 90) * size / most
        parts.append(
            f"<text x='{LEFT - 10}' y='{y + 15}' {STYLE} text-anchor='end'>{escape(name)}</text>"
            f"<rect x='{LEFT}' y='{y}' width='{width:.1f}' height='20' fill='{COLORS[0]}'/>"
            f"<text x='{LEFT + width + 6:.1f}' y='{y + 15}' {STYLE}>{escape(label)}</text>"
        )
    return page(parts, 50 + len(rows) * ROW)


def lines(
    title: str, across: Sequence[str], series: dict[str, Sequence[float]], unit: str, most: float
) -> str:
    """Return a plot with a line for each series, over places that are named alike apart."""
    left, right, top, bottom = 60, WIDTH - 190, 40, 260
    step = (right - left) / (len(across) - 1)
    parts = [f"<text x='10' y='22' {STYLE} font-weight='bold'>{escape(title)}</text>"]
    for tick in range(5):
        level = most * tick / 4
        y = bottom - (bottom - top) * tick / 4
        parts.append(
            f"<line x1='{left}' x2='{right}' y1='{y}' y2='{y}' stroke='#ddd'/>"
            f"<text x='{left - 8}' y='{y + 4}' {STYLE} text-anchor='end'>{level:g}{unit}</text>"
        )
    for place, name in enumerate(across):
        parts.append(
            f"<text x='{left + place * step:.0f}' y='{bottom + 20}' {STYLE} text-anchor='middle'>"
            f"{escape(name)}</text>"
        )
    for color, (name, values) in zip(COLORS, series.items(), strict=False):
        points = " ".join(
            f"{left + place * step:.1f},{bottom - (bottom - top) * one / most:.1f}"
            for place, one in enumerate(values)
        )
        at = 50 + 20 * list(series).index(name)
        parts.append(
            f"<polyline points='{points}' fill='none' stroke='{color}' stroke-width='2'/>"
            f"<rect x='{right + 20}' y='{at}' width='12' height='12' fill='{color}'/>"
            f"<text x='{right + 38}' y='{at + 11}' {STYLE}>{escape(name)}</text>"
        )
    return page(parts, bottom + 40)


def page(parts: Sequence[str], height: int) -> str:
    """Return a picture."""
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' "
        f"width='{WIDTH}' height='{height}'><rect width='100%' height='100%' fill='white'/>"
        + "".join(parts)
        + "</svg>\n"
    )


def draw(folder: Path) -> None:
    """Write every plot into a folder."""
    folder.mkdir(exist_ok=True)
    rows = table("Heartbeats committed a second")[1:]
    (folder / "ingest.svg").write_text(
        bars(
            "Heartbeats committed a second by one process",
            [(row[0].split(",")[0], value(row[1]), row[1]) for row in rows],
        )
    )
    head, *rows = table("How long a planner waits")
    (folder / "capacity.svg").write_text(
        lines(
            "find, median, beside an echo over the same broker",
            [f"{row[0]} agents" for row in rows],
            {name: [value(row[place]) for row in rows] for place, name in enumerate(head[2:], 2)},
            " x",
            5.0,
        )
    )
    _, *rows = table("What heartbeats leave behind")
    (folder / "housekeeping.svg").write_text(
        lines(
            "10,000 agents, 2,000 heartbeats a second: MiB on disk",
            [f"{row[0]} min" for row in rows],
            {
                "table": [value(row[1]) for row in rows],
                "indexes": [value(row[2]) for row in rows],
            },
            "",
            50.0,
        )
    )


if __name__ == "__main__":
    draw(FOLDER)
