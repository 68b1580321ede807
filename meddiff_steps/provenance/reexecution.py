"""L6 of an audit: released images are made again from their rows and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from meddiff_steps import config
from meddiff_steps.errors import UserError
from meddiff_steps.evaluation.statistics import philox
from meddiff_steps.imaging import release as imaging
from meddiff_steps.models.files import LatentDiffusion, load_autoencoder
from meddiff_steps.provenance.digest import safetensors_digest
from meddiff_steps.provenance.ledger import Row
from meddiff_steps.provenance.record import environment
from meddiff_steps.provenance.verify import Check
from meddiff_steps.synthesis.generate import Generator
from meddiff_steps.training.backend import make_fabric

if TYPE_CHECKING:
    from meddiff_steps.provenance.audit import Request, Sealed

#: Largest difference of a stored value (1000 or 255 is full scale) at which an image counts as the same on another machine.
#: Rounding in another order moved images of the demo by at most 1.
TOLERANCE = {3: 5, 2: 2}


def choose(rows: list[Row], count: int, seed: str, label: str) -> list[Row]:
    """`count` rows, each as likely as any other, in order."""
    if len(rows) <= count:
        return rows
    return [rows[i] for i in sorted(philox(seed, f"audit/{label}").choice(len(rows), count, replace=False))]


def most_bad(population: int, sample: int, confidence: float = 0.95) -> float:
    """Largest share of bad items that a clean sample without replacement is still likely (above 1 - confidence) to miss.

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


@dataclass(frozen=True)
class Comparison:
    """An image made again beside the released one: verdict (`bitwise`, `within tolerance`, `differs`) and the largest difference of a stored value."""

    sample_id: str
    verdict: str
    largest: int


def find_models(folder: Path, recipe: Mapping[str, str]) -> dict[str, Path]:
    """Folders of the two models whose weights a recipe names.

    Raises
    ------
    UserError
        One of them is not there, or has other weights.
    """
    places = {"autoencoder": [folder / "autoencoder"], "diffusion": [folder / "distilled/diffusion", folder / "diffusion"]}
    found: dict[str, Path] = {}
    for kind, candidates in places.items():
        seen = []
        for place in candidates:
            weights = place / "model.safetensors"
            if weights.is_file() and (place / "card.json").is_file():
                try:
                    digest = safetensors_digest(weights)
                except ValueError as error:
                    raise UserError(str(error)) from None
                if digest == recipe[kind]:
                    found[kind] = place
                seen.append(f"{weights} has {digest[:16]}")
        if kind not in found:
            raise UserError(f"{folder}: no {kind} with weights {recipe[kind][:16]} ({'; '.join(seen) or 'no model.safetensors with card.json there'})")
    return found


def remake(rows: list[Row], study: config.Study, models: Path, threads: int) -> Iterator[tuple[Row, np.ndarray]]:
    """The stored values of the images of `rows`, made again; all rows must have the same recipe.

    Raises
    ------
    UserError
        The models are not those of the recipe.
    """
    recipe = rows[0]["recipe"]
    places = find_models(models, recipe)
    wanted = {name: recipe[name] for name in ("sampler", "num_inference_steps", "guidance_scale", "batch_size")}
    fabric = make_fabric(study.compute, threads)
    first_stage, _ = load_autoencoder(places["autoencoder"] / "model.safetensors", places["autoencoder"] / "card.json")
    model = LatentDiffusion.load(places["diffusion"] / "model.safetensors", places["diffusion"] / "card.json")
    generator = Generator(model, first_stage, study.generate.model_copy(update=wanted), fabric)
    columns = ("sample_id", "index", "cohort_root", "noise_index", "attempt", "seed_key")
    subjects = pd.DataFrame([{name: row[name] for name in columns} | row["covariates"] for row in rows])
    for name, covariate in study.covariates.items():
        subjects[name] = subjects[name].astype(object if isinstance(covariate, config.CategoricalCovariate) else float)
    scale, kind = (imaging.VOLUME_SCALE, np.int16) if study.spatial_dims == 3 else (imaging.PICTURE_SCALE, np.uint8)
    by_id = {row["sample_id"]: row for row in rows}
    for sample_id, image in generator.images(subjects, "again"):
        # Shards keep half precision, so the released values went through it.
        yield by_id[sample_id], np.rint(image[0].astype(np.float16).astype(np.float32) * scale).astype(kind)


def compare(row: Row, again: np.ndarray, folder: Path, study: config.Study) -> Comparison:
    """An image that was made again, beside the released file."""
    from meddiff_steps.provenance.audit import Undecodable, decode

    try:
        stored, affine, _ = decode(folder / row["image"]["path"])
    except Undecodable:
        return Comparison(row["sample_id"], "differs", -1)
    if imaging.voxel_digest(again, affine) == row["image"]["voxel_sha256"]:
        return Comparison(row["sample_id"], "bitwise", 0)
    largest = int(np.abs(stored.astype(int) - again.astype(int)).max()) if stored.shape == again.shape else -1
    return Comparison(row["sample_id"], "within tolerance" if 0 <= largest <= TOLERANCE[study.spatial_dims] else "differs", largest)


def check_reexecution(release: Sealed, request: Request) -> Iterator[Check]:
    """Make some released images again."""
    study = release.study
    assert study is not None and request.models is not None
    everyone = list(release.released())
    if not everyone:
        yield Check(6, "images", "not run", "nothing was released")
        return
    rows = choose(everyone, request.sample, request.seed, "re-execution")
    if any(row["recipe"] != rows[0]["recipe"] for row in rows):
        yield Check(6, "images", "finding", "the rows do not share one recipe, so one model cannot have made them all")
        return
    try:
        results = [compare(row, again, release.folder, study) for row, again in remake(rows, study, request.models, request.threads)]
    except UserError as error:
        yield Check(6, "models", "finding", str(error))
        return
    yield Check(6, "models", "pass", f"the models in {request.models} have the weights that the ledger names")
    counts = Counter(result.verdict for result in results)
    text = f"of {len(results)} images made again (seed {request.seed!r}) {counts['bitwise']} are the same bit by bit"
    if counts["within tolerance"]:
        text += f", {counts['within tolerance']} within {TOLERANCE[study.spatial_dims]} stored units"
    bad = [f"{result.sample_id}: differs by up to {result.largest} stored units" for result in results if result.verdict == "differs"]
    if bad:
        yield Check(6, "images", "finding", f"{text}, {len(bad)} differ", bad[:5])
    else:
        bound = most_bad(len(everyone), len(rows))
        yield Check(6, "images", "pass", f"{text}; so with 95 % confidence at most {100 * bound:.1f} % of the {len(everyone)} differ")
    if counts["bitwise"] < len(results):
        there = [record["environment"] for record in release.records.values() if record["step"] in ("generate", "filter")]
        yield Check(6, "environment", "note", "differences between the machine of the release and this one", _environment_difference(there))


def _environment_difference(there: list[dict[str, Any]]) -> list[str]:
    here, found = environment(), []
    for name in sorted({key for one in there for key in one} | set(here)):
        others = {repr(one.get(name)) for one in there}
        if others != {repr(here.get(name))}:
            found.append(f"{name}: {' or '.join(sorted(others))}, here {here.get(name)!r}")
    return found or ["none is recorded; the number of threads remains"]
