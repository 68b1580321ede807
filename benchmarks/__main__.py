"""Our way beside the peers': `python -m benchmarks run [NAME...]`, then `python -m benchmarks render`.

`run` measures the named comparisons (all without a name) and writes one JSON file each; `render` makes the page and its
figure from whatever JSON files are there.  `--quick` checks in a minute that everything
runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import data, measure, render, sampling, scaling, training
from benchmarks.places import Setting
from meddiff_steps.core.files import write_json

#: Comparisons in the order in which they use each other's networks, and the minutes that each may take on two quiet
#: cores.
COMPARISONS: dict[str, tuple[Callable[[Setting], dict[str, Any]], float]] = {
    "autoencoder": (training.autoencoder, 9.0),
    "diffusion": (training.diffusion, 3.0),
    "sampling": (sampling.sampling, 11.0),
    "loader": (data.loader, 1.0),
    "preprocessing": (data.preprocessing, 1.0),
    "release": (data.release, 0.5),
    "diversity": (data.diversity, 1.5),
    "scaling": (scaling.scaling, 4.0),
}
HERE = Path(__file__).parent
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


def measured(name: str, setting: Setting, busy: bool = False) -> dict[str, Any]:
    """Run one comparison and say on what and when, and whether the machine had other work."""
    compare, minutes = COMPARISONS[name]
    torch.set_num_threads(setting.threads)
    facts = {
        "name": name,
        "title": (compare.__doc__ or name).splitlines()[0],
        "date": measure.now(),
        "quick": setting.quick,
        "busy": busy,
    }
    facts |= {"machine": measure.machine(), "versions": measure.versions()}
    start = time.perf_counter()
    found = compare(setting)
    return facts | {"seconds": round(time.perf_counter() - start, 1), "budget_seconds": minutes * 60} | found


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(COMPARISONS)}; all by default")] = None,
    quick: Annotated[bool, typer.Option(help="Check that everything runs; the figures mean nothing.")] = False,
    work: Annotated[Path, typer.Option(help="Folder for cohorts and weights, reused by later runs.")] = Path(
        "results/benchmarks"
    ),
    results: Annotated[Path | None, typer.Option(help="Folder for the JSON files.")] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads of both sides; all cores by default.")] = None,
    busy: Annotated[bool, typer.Option(help="The machine has other work meanwhile; the page says so.")] = False,
) -> None:
    """Measure comparisons and write a JSON file for each."""
    unknown = sorted(set(names or ()) - set(COMPARISONS))
    if unknown:
        raise typer.BadParameter(f"no comparison is called {', '.join(unknown)}; there are {', '.join(COMPARISONS)}")
    folder = results or (work / "quick" if quick else HERE / "results")
    work = work / ("quick-work" if quick else "work")
    work.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(work, quick, *([threads] if threads else []))
    for name in names or COMPARISONS:
        typer.echo(f"{name}: up to {COMPARISONS[name][1]:g} minutes on two quiet cores", err=True)
        found = measured(name, setting, busy)
        write_json(folder / f"{name}.json", found)
        for line in render.lines(found):
            typer.echo(line)


@app.command("render")
def render_page(
    results: Annotated[Path, typer.Option(help="Folder of the JSON files.")] = HERE / "results",
    docs: Annotated[Path, typer.Option(help="Folder of the page; its figure goes to images/ in it.")] = Path("docs"),
) -> None:
    """Make docs/benchmarks.md and its figure from the results."""
    typer.echo(render.page(results, docs))


if __name__ == "__main__":
    app()
