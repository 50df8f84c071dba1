"""Writes ``docs/architecture.md`` from the code: ``make architecture``.

The packages, what each is for and what it imports are read from the code, so that the page cannot
go stale; the journeys are told here, and every file that they name must be there.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "chiffon"

ORDER = (
    "cli",
    "embedded",
    "simulate",
    "agent",
    "orchestrator",
    "gateway",
    "planner",
    "observability",
    "capacity",
    "registry",
    "amqp",
    "probes",
    "contract",
)
SINGLES = ("__main__", "process", "settings", "logs", "errors")

JOURNEYS = {
    "A heartbeat, to a row, to an offer": [
        ("agent/base_agent.py", "composes the heartbeat when it is due"),
        ("probes/reader.py", "has the newest readings of the host"),
        ("contract/heartbeat.py", "checks every field"),
        ("amqp/publisher.py", "publishes it, and waits for the broker's confirm"),
        ("amqp/consumer.py", "receives it at the orchestrator (`transport.py`, `frames.py`)"),
        ("orchestrator/ingest.py", "gathers deliveries, commits a batch, acknowledges it"),
        ("orchestrator/batch.py", "decodes each, and keeps the newest of each agent"),
        ("contract/codec.py", "decodes one body"),
        ("registry/heartbeats.py", "records the batch: `sql/heartbeats.sql`"),
        ("registry/offers.py", "finds candidates by an index: `sql/offers.sql`"),
        ("capacity/room.py", "judges each: does the request fit?"),
        ("capacity/service.py", "makes the offer"),
    ],
    "A question, and its answer": [
        ("planner/client.py", "`find` takes the query"),
        ("planner/rpc.py", "publishes the request, and waits for the reply"),
        ("orchestrator/responder.py", "receives it, and sends the reply"),
        ("orchestrator/requests.py", "decodes the body, and picks who answers"),
        ("capacity/service.py", "answers"),
        ("registry/offers.py", "finds candidates"),
        ("capacity/room.py", "judges them"),
    ],
    "A reservation's life": [
        ("planner/client.py", "`reserve` requests it"),
        ("planner/held_reservation.py", "renews it while the context is open"),
        ("planner/rpc.py", "carries each request"),
        ("orchestrator/responder.py", "receives it; releases what nobody took"),
        ("orchestrator/requests.py", "decodes it"),
        ("capacity/reservations.py", "reserves in one transaction; renews, releases, ends"),
        ("registry/reservations.py", "locks, writes, ends: `sql/reservations.sql`"),
        ("capacity/room.py", "judges the locked agents, and says what is left on them"),
        ("orchestrator/expiry.py", "ends what was not renewed, or lost its agent"),
        ("orchestrator/events.py", "publishes that it ended"),
    ],
    "An agent that stops answering": [
        ("orchestrator/connection_events.py", "hides it from offers when its connection closes"),
        ("orchestrator/canary.py", "proves that the path to us is open"),
        ("contract/lease.py", "says for how long a heartbeat counts"),
        ("orchestrator/sweeper.py", "looks for the silent once a second"),
        ("registry/sweep.py", "counts them, and marks them: `sql/sweep.sql`"),
        ("orchestrator/silence.py", "judges: who is offline, and what is one outage"),
        ("orchestrator/events.py", "publishes the transition"),
    ],
}


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Return the modules of ours that a module imports, at its top or when it runs."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.dump(test.test)
        for node in ast.walk(test)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def room(module: str) -> str:
    """Return the package, or the single module, that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "chiffon"


class Code:
    """The modules of the package, and the arrows between them."""

    def __init__(self) -> None:
        self.modules = modules()
        self.arrows: defaultdict[str, set[str]] = defaultdict(set)
        self.module_arrows = 0
        names = set(self.modules)
        for module, path in self.modules.items():
            for other in imports(path, names) - {module, "chiffon"}:
                self.module_arrows += 1
                if room(module) != room(other):
                    self.arrows[room(module)].add(room(other))

    def within(self, name: str) -> list[Path]:
        """Return the modules of one package, or the single module."""
        return [path for module, path in self.modules.items() if room(module) == name]


def page() -> str:
    """Return the page."""
    code = Code()
    return "\n".join([*packages(code), *listing(code), *journeys()])


def packages(code: Code) -> list[str]:
    """Return the table of packages, and how much there is in all."""
    lines = [
        "# Architecture",
        "",
        "Made by `make architecture` from the code; a test fails where it is out of date.",
        "",
        "A package a role, a module a noun. Arrows run down this list only; `import-linter` checks",
        "that. `registry`, `amqp` and `probes` do not know each other, nor do `agent`,",
        "`orchestrator` and `gateway`.",
        "",
        "| package | what it is for | modules | lines | imports |",
        "|---|---|---|---|---|",
    ]
    everything = (*ORDER, *SINGLES)
    for name in everything:
        path = PACKAGE / (f"{name}.py" if name in SINGLES else name)
        files = code.within(name)
        uses = ", ".join(one for one in everything if one in code.arrows[name])
        lines.append(f"| `{path.name}` | {summary(path)} | {len(files)} | {size(files)} | {uses} |")
    between = sum(len(others) for others in code.arrows.values())
    return [
        *lines,
        "",
        f"{len(code.modules)} modules, {size(code.modules.values())} lines; {len(everything)}"
        f" packages and single modules with {between} arrows between them, {code.module_arrows}"
        " between modules.",
        "",
    ]


def listing(code: Code) -> list[str]:
    """Return every module and what it is for."""
    lines = ["## Modules", ""]
    for name in ORDER:
        lines += [f"**{name}**", ""]
        lines += [
            f"- `{path.relative_to(PACKAGE)}`: {summary(path)}"
            for path in code.within(name)
            if path.name not in ("__init__.py", "__main__.py")
        ]
        for path in sorted((PACKAGE / name).glob("sql/*.sql")):
            comment = path.read_text().partition("\n\n")[0].replace("-- ", "").replace("\n", " ")
            lines.append(
                f"- `{path.relative_to(PACKAGE)}`: {comment.partition('. ')[0].rstrip('.')}"
            )
        lines.append("")
    return lines


def journeys() -> list[str]:
    """Return the four journeys, with the files of each in order."""
    lines = ["## Four journeys", "", "Each names its files in order.", ""]
    for title, stops in JOURNEYS.items():
        lines += [f"### {title}", ""]
        for number, (file, what) in enumerate(stops, start=1):
            if not (PACKAGE / file).is_file():
                raise SystemExit(f"a journey names {file}, which is not there")
            lines.append(f"{number}. `{file}`: {what}")
        lines.append("")
    return lines


def size(files: Iterable[Path]) -> int:
    """Return how many lines there are in some files."""
    return sum(len(path.read_text().splitlines()) for path in files)


def summary(path: Path) -> str:
    """Return the first sentence of a module's or package's docstring."""
    file = path / "__init__.py" if path.is_dir() else path
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", "/").rstrip(".")


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(page(), end="")
    else:
        (PROJECT / "docs" / "architecture.md").write_text(page())
