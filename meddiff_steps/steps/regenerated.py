"""Step `regenerated`: whether a cohort that was made again, shard by shard, is the one that was released."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.core.files import read_json, write_json
from meddiff_steps.release.regeneration import Added, Comparison, as_text, summary, write_added


def run(
    shard: Annotated[
        list[Path], typer.Option(help="comparison of one shard (JSON of step `regenerate`); repeat for every shard")
    ],
    out: Annotated[Path, typer.Option(help="comparison of the cohort to write (JSON)")],
) -> None:
    """Put the comparisons of all shards together, and list subjects that the release did not have in added.tsv beside
    it.

    Exit code 0 if no image differs, 1 if one does.
    """
    parts = [read_json(path) for path in shard]
    comparisons = [Comparison(**subject) for part in parts for subject in part["subjects"]]
    added = sorted((Added(**one) for part in parts for one in part.get("added", [])), key=lambda one: one.sample_id)
    environment = sorted({line for part in parts for line in part["environment"]})
    found = summary(comparisons)
    releases = sorted({part["release_sha256"] for part in parts})
    write_json(
        out,
        found | {"release_sha256": releases, "environment": environment, "subjects": [vars(c) for c in comparisons]},
    )
    if any("added" in part for part in parts):
        write_added(out.with_name("added.tsv"), added)
    print("\n".join(as_text(comparisons, environment, added)))
    raise typer.Exit(1 if found["verdicts"]["differs"] + found["verdicts"]["missing"] else 0)
