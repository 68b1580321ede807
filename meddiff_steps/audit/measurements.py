"""L6 of an audit, beside making images again: what was measured in them is measured again.

Needs no diffusion model, but the instruments of the study, which are private: they lie in its folder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from meddiff_steps.audit.reexecution import choose
from meddiff_steps.config import CategoricalCovariate
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging import encoding
from meddiff_steps.provenance.ledger import MEASURED, Row
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release.measuring import Instruments, instruments_of, scaled
from meddiff_steps.release.sealed import Sealed

#: Share by which a number may differ for rounding on another machine, and by how much a level may be less probable than
#: the most probable one.
TOLERANCE = 1e-3
#: By how much the logit of a voxel's label may be less than that of the label that it gets here.  Each voxel is held to
#: it: a share of all voxels would leave room to move the whole of a small structure.
DOUBT = 1e-2


def check_measurements(release: Sealed, models: Path, sample: int, seed: str, threads: int) -> Iterator[Check]:
    """Measure `sample` released images, drawn by `seed`, again by the instruments of a study's folder."""
    if next((row for row in release.released() if row.get("measured") or row.get("labels")), None) is None:
        return
    try:
        instruments, missing = instruments_of(release, models)
    except UserError as error:
        yield Check(6, "measurements", "finding", str(error))
        return
    if instruments.predictors is None and instruments.segmenter is None:
        yield Check(6, "measurements", "not run", "; ".join(missing) or "no run says by what images were measured")
        return
    torch.set_num_threads(threads)
    rows = choose(list(release.released()), sample, seed, "measurements")
    wrong = [f"{row['sample_id']}: {one}" for row in rows for one in _problems(row, release.folder, instruments)]
    good = f"of {len(rows)} images (seed {seed!r}) all measurements and label maps come out again"
    yield judged(6, "measurements", wrong, good, "measurement(s) of images do not come out again")
    if missing:
        yield Check(6, "instruments", "note", "some of what was measured was not measured again", missing)


def _problems(row: Row, release: Path, instruments: Instruments) -> Iterator[str]:
    grid = instruments.grid
    try:
        stored = encoding.decode(release / row["image"]["path"], grid).stored
    except encoding.Undecodable as error:
        yield str(error)
        return
    told = row.get("measured") or {}
    found, labels = instruments.measure(stored)
    likely = instruments.chances(stored)
    for column in sorted(told.keys() | found.keys()):
        if column not in found:  # by an instrument that is not here
            continue
        value, again = told.get(column), found[column]
        covariate = instruments.covariates[column.removesuffix(MEASURED)] if column in likely else None
        if isinstance(covariate, CategoricalCovariate):
            chances = likely[column]
            if value not in covariate.levels or chances[covariate.levels.index(value)] < chances.max() - TOLERANCE:
                yield f"{column} {value!r}, measured {again!r}"
        elif column.endswith(MEASURED) and not (  # volumes: L5, by the label map
            isinstance(value, int | float) and math.isclose(value, float(again), rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        ):
            yield f"{column} {value!r}, measured {again!r}"
    if labels is None:
        return
    if row.get("labels") is None:
        yield "no label map"
        return
    try:
        released = encoding.decode(release / row["labels"]["path"], replace(grid, labels=True)).stored
    except encoding.Undecodable as error:
        yield f"label map: {error}"
        return
    if np.array_equal(released, labels):
        return
    assert instruments.segmenter is not None
    known = released <= len(instruments.segmenter.structures)
    doubt = instruments.segmenter.doubt(torch.from_numpy(scaled(stored)), np.where(known, released, 0))
    if wrong := int((~known | (doubt > DOUBT)).sum()):
        yield f"{wrong} voxels of its label map have other labels"
