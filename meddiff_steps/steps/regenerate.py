"""Step `regenerate`: images of a release made again from its ledger and its models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_json
from meddiff_steps.provenance.verify import shown
from meddiff_steps.release.regeneration import (
    Added,
    as_text,
    environment_difference,
    regenerate,
    regenerate_more,
    summary,
    write_added,
)
from meddiff_steps.release.sealed import open_release
from meddiff_steps.steps import options


def run(
    release: Annotated[Path, typer.Argument(help="root of the release; its folder `provenance` is enough")],
    models: Annotated[
        Path, typer.Option(help="folder with autoencoder/ and diffusion/, each model.safetensors and card.json")
    ],
    out: Annotated[
        Path, typer.Option(help="folder to write the images to, at the paths that they have in the release")
    ],
    subject: Annotated[
        list[str] | None,
        typer.Option(help="participant, with or without sub-; repeat for several; all of them if not given"),
    ] = None,
    shard: Annotated[int | None, typer.Option(help="number of one shard")] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="subjects of a group, more than it had: those of the release and new ones")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="group of the plan that --count is about, if there are several")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="comparison to write (JSON)")] = None,
    threads: options.ThreadsBeside = 1,
) -> None:
    """Make images again: one subject, one shard, or all; write them, and say whether they are what was released.

    `bitwise`: the image shows the same to the last bit.  `within tolerance`: it differs by rounding, as on another
    processor.  `differs`: by more.  Exit code 0 if none differs, 1 if one does, 2 if it could not run.

    With --count the subjects of the release come out as they were, and more are made by the same plan; OUT/added.tsv
    lists these.  That needs the study's own folder as --models, since covariates are drawn as the training scans have
    them.  No privacy filter looks at new images.
    """
    if subject and shard is not None:
        raise UserError("--subject and --shard: give one of them.")
    if out.resolve() == release.resolve() or release.resolve() in out.resolve().parents:
        raise UserError(f"--out {out}: lies in the release, which is sealed. Give another folder.")
    if (subject and count is not None) or (group is not None and count is None):
        raise UserError("--count makes one group of the plan larger: give it without --subject, and --group with it.")
    sealed = open_release(release)
    added: list[Added] = []
    if count is not None:
        comparisons, added = regenerate_more(sealed, models, out, threads, count, group, shard)
        if shard is None:
            write_added(out / "added.tsv", added)
    else:
        comparisons = regenerate(sealed, sealed.rows_of(subjects=subject or None, shard=shard), models, out, threads)
    found = summary(comparisons)
    environment = environment_difference(sealed) if found["verdicts"]["bitwise"] < len(comparisons) else []
    if json is not None:
        content = found | {
            "release_sha256": sealed.sha256,
            "environment": environment,
            "subjects": [vars(c) for c in comparisons],
        }
        write_json(json, content | ({} if count is None else {"added": [vars(one) for one in added]}))
    print("\n".join(map(shown, as_text(comparisons, environment, added))))
    raise typer.Exit(1 if found["verdicts"]["differs"] + found["verdicts"]["missing"] else 0)
