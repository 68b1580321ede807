"""L6 of an audit: released images are made again from their rows and compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from scipy.stats import hypergeom

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import philox
from meddiff_steps.provenance.ledger import Row
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release import versions
from meddiff_steps.release.regeneration import (
    PURPOSE,
    TOLERANCE,
    Comparison,
    compare,
    environment_difference,
    remake,
    summary,
)
from meddiff_steps.release.sealed import Sealed


def choose(rows: list[Row], count: int, seed: str, label: str) -> list[Row]:
    """`count` rows, each as likely as any other, in order."""
    if len(rows) <= count:
        return rows
    return [rows[i] for i in sorted(philox(seed, f"audit/{label}").choice(len(rows), count, replace=False))]


def most_bad(population: int, sample: int, confidence: float = 0.95) -> float:
    """Largest share of bad items that a clean sample without replacement is still likely (above 1 - confidence) to
    miss.

    Exact, by the hypergeometric distribution; 59 clean of many leave at most 5 %.

    >>> round(most_bad(1_000_000, 59), 3), most_bad(20, 20)
    (0.049, 0.0)
    """
    low, high = 0, population
    while low < high:
        middle = (low + high + 1) // 2
        if hypergeom.pmf(0, population, middle, sample) > 1 - confidence:
            low = middle
        else:
            high = middle - 1
    return low / population if population else 0.0


def check_reexecution(release: Sealed, models: Path, sample: int, seed: str, threads: int) -> Iterator[Check]:
    """Make `sample` released images, drawn by `seed`, again.

    Of a release of another version this one may be unable to load the models, or may draw otherwise: where no image
    comes out as it was released, that says nothing of the release.  Where some do, the version is not the reason why
    others do not.
    """
    study = release.study
    assert study is not None
    everyone = list(release.released())
    if not everyone:
        yield Check(6, "images", "not run", "nothing was released")
        return
    rows = choose(everyone, sample, seed, "re-execution")
    again = remake(rows, release, models, threads)
    try:
        results = [compare(row, image, release.folder, study, labels)[0] for row, image, labels in again]
        if sorted(result.sample_id for result in results) != [row["sample_id"] for row in rows]:
            raise UserError(f"of {len(rows)} images {len(results)} were made again")
    except versions.OtherVersion as error:
        yield Check(6, "images", "not run", str(error))
        return
    except UserError as error:
        yield Check(6, "models", "finding", str(error))
        return
    named = f"the models in {models} have the weights that the ledger names"
    if release.is_other and not any(_is_same(result) for result in results):
        yield Check(6, "models", "note", named)
        advice = versions.advice(release.version, PURPOSE)
        yield Check(
            6, "images", "not run", f"none of {len(results)} images comes out the same by this version; {advice}"
        )
        return
    yield Check(6, "models", "pass", named)
    yield _judge(results, len(everyone), TOLERANCE[study.spatial_dims], seed)
    if drawn := [result for result in results if result.labels]:
        wrong = [f"{result.sample_id}: another label map" for result in drawn if result.labels != "same"]
        good = f"{len(drawn)} label maps that images were drawn from come out again, bit by bit"
        yield judged(6, "label-maps", wrong, good, "label map(s) do not come out again")
    if any(result.verdict != "bitwise" for result in results):
        differences = environment_difference(release) or ["none is recorded"]
        yield Check(
            6, "environment", "note", "differences between the machine of the release and this one", differences
        )


def _is_same(result: Comparison) -> bool:
    return result.verdict in ("bitwise", "within tolerance")


def _judge(results: list[Comparison], population: int, tolerance: int, seed: str) -> Check:
    """What images made again say of all images of a release."""
    counts = summary(results)["verdicts"]
    text = f"of {len(results)} images made again (seed {seed!r}) {counts['bitwise']} are the same bit by bit"
    if counts["within tolerance"]:
        text += f", {counts['within tolerance']} within {tolerance} stored units"
    bad = [
        f"{result.sample_id}: {result.verdict}, by up to {result.largest} stored"
        f" units{' (its header or the ledger says otherwise)' * (result.largest == 0)}"
        for result in results
        if not _is_same(result)
    ]
    if bad:
        return Check(6, "images", "finding", f"{text}, {len(bad)} are not", bad[:5])
    bound = math.ceil(round(1000 * most_bad(population, len(results)), 6)) / 10  # rounded up: it is an upper bound
    text += (
        f"; if nobody could foresee the seed, at most {bound:.1f} % of the {population} differ, with 95 % confidence"
    )
    return Check(6, "images", "pass", text)
