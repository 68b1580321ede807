"""The house: folders of the package are floors, from below to above, and no import runs up a floor.

Whoever adds a folder gives it a floor here: above everything that it imports.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "meddiff_steps"
HOUSE = PACKAGE.parent / "docs/architecture.md"
#: From the cellar to the roof.
FLOORS = (
    *("core", "statistics", "config", "compute", "cohort", "simulation", "imaging", "diffusion", "models"),
    *("training", "synthesis", "instruments", "evaluation", "privacy", "downstream", "applications"),
    *("provenance", "release", "audit", "report", "operations", "steps", "command", "__main__"),
)
SOURCES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path, package: Path = PACKAGE) -> str:
    """Floor of a file: its folder in the package, or its own name if it lies at the top."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of whatever a file imports of the package, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports of this package are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def arrows(package: Path = PACKAGE) -> Iterator[tuple[str, str, str]]:
    """Floors of who imports and of what is imported, and where, for every import from another floor."""
    for path in sorted(package.rglob("*.py")):
        for line, name in imported(path):
            top, _, rest = name.partition(".")
            below = rest.partition(".")[0]
            if top == package.name and below not in ("", "__version__", part(path, package)):
                yield part(path, package), below, f"{path.relative_to(package.parent)}:{line} imports {name}"


def upward(package: Path = PACKAGE) -> list[str]:
    """Imports that run up a floor."""
    return [f"{where} (floor {a} -> {b})" for a, b, where in arrows(package) if FLOORS.index(b) > FLOORS.index(a)]


def test_every_folder_has_a_floor():
    parts = {part(path) for path in SOURCES} - {"__init__"}
    assert parts <= set(FLOORS), f"no floor yet: {sorted(parts - set(FLOORS))}; add them to FLOORS"
    assert len(set(FLOORS)) == len(FLOORS)
    folders = [name for name in FLOORS if name != "__main__"]
    assert re.findall(r"^\| `(\w+)` \| .+ \|$", HOUSE.read_text(encoding="utf-8"), re.M)[: len(folders)] == folders


def test_no_import_runs_up_a_floor():
    """So there is no circle between folders either."""
    wrong = upward()
    assert not wrong, "\n".join(["imports that run up a floor:", *wrong])


@pytest.mark.parametrize(
    "statement",
    [
        "from meddiff_steps.{0}.module import name",
        "from meddiff_steps.{0} import module",
        "from meddiff_steps import {0}",
        "import meddiff_steps.{0}.module as other",
        "def run():\n    from meddiff_steps.{0}.module import name",
    ],
)
@pytest.mark.parametrize(("low", "high"), pairwise(FLOORS[:-1]))
def test_an_import_that_runs_up_a_floor_is_found(tmp_path, low, high, statement):
    package = tmp_path / PACKAGE.name
    for floor, other in ((low, high), (high, low)):
        (package / floor).mkdir(parents=True)
        (package / floor / "module.py").write_text(statement.format(other))
    (said,) = upward(package)
    assert f"(floor {low} -> {high})" in said and f"{PACKAGE.name}/{low}/module.py:" in said


@pytest.mark.parametrize(("above", "below"), pairwise(("provenance", "release", "audit")))
def test_what_is_sealed_knows_nothing_of_who_looks_at_it(above, below):
    assert not [where for a, b, where in arrows() if (a, b) == (above, below)]


def test_steps_and_commands_alone_know_the_workflow():
    """A domain imports no step and no Snakemake."""
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}"
        for path in SOURCES
        if part(path) not in ("steps", "command", "__main__")
        for line, name in imported(path)
        if name.startswith(("snakemake", "meddiff_steps.steps"))
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_between_modules():
    """Within a folder, too, imports lead down."""
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in SOURCES}
    leads = {
        module: {found for _, name in imported(path) for found in (name, name.rpartition(".")[0]) if found in modules}
        for module, path in modules.items()
    }
    while free := {module for module, needed in leads.items() if not needed & leads.keys()}:
        leads = {module: needed for module, needed in leads.items() if module not in free}
    assert not leads, f"a circle runs through {sorted(leads)}"


def test_steps_without_networks_start_without_torch():
    """Which takes seconds of each job."""
    steps = "cohort, describe, gate, ledger, plan, preprocess, quality, report"
    code = f"import sys; from meddiff_steps.steps import {steps}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
