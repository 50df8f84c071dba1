"""The plots in the documentation."""

from pathlib import Path

from benchmarks import plots


def test_they_are_of_the_tables_beside_them(tmp_path: Path) -> None:
    """If not: `python -m benchmarks.plots`."""
    plots.draw(tmp_path)

    drawn = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert drawn == {file.name: file.read_text() for file in plots.FOLDER.iterdir()}
