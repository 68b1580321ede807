"""Ways to tell a diffusion model what to draw, side by side: the same network, data, noise and steps.

    python -m benchmarks.conditioning results/demo                       # covariates
    python -m benchmarks.conditioning results/hippocampus-pairs --maps   # label maps

The study has to be finished up to its predictors; its autoencoder and latents are used.  So that the way of telling is
all that tells, nothing is known in closed form: effects of covariates are left out of the prior that every arm begins
with.  Images are as the autoencoder decodes them, without drawing decoder and grey levels, for the covariates of
held-out scans, or for their label maps.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import typer
from safetensors.numpy import load_file, save_file
from scipy import ndimage

from benchmarks.adapting import RESAMPLES, SPACES
from benchmarks.drawing import draw, planned
from meddiff_steps import config
from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.files import read_json, write_atomic, write_json
from meddiff_steps.core.random_streams import batch_noise
from meddiff_steps.evaluation.fidelity import covariate_fidelity
from meddiff_steps.evaluation.metrics import measure
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale
from meddiff_steps.evaluation.realism.measure import judge
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.instruments.feature_spaces.assemble import spaces
from meddiff_steps.instruments.feature_spaces.base import Context, extract
from meddiff_steps.instruments.predictors import load_predictors
from meddiff_steps.models.masks import MaskModel
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.report.application_figures import completion_sheet
from meddiff_steps.statistics.bootstrap import Bootstrap
from meddiff_steps.steps import diffusion

log = logging.getLogger(__name__)

COVARIATES = ("modulation", "addition", "cross_attention", "concatenation")
MAPS = ("concatenation", "spade", "controlnet")
#: Held-out scans whose covariates or label maps are asked for, at most, and how many are shown.
MOST, SHOWN = 100, 6


def study_of(content: dict[str, Any], key: str, way: str, steps: int, width: int) -> config.Study:
    """The study whose network is told in one way."""
    changed = json.loads(json.dumps(content))
    optimiser = changed["diffusion"]["optimiser"] | {"steps": steps, "validate_every": max(steps // 4, 1)}
    changed["diffusion"] |= {"network": "conditioned", "conditioning": {key: way}, "channels": [width]}
    changed["diffusion"] |= {"optimiser": optimiser, "guide_share": 0.0}
    return config.parse_study(changed, "conditioning")


def bare(scale: Path, path: Path) -> Path:
    """What `scale` measured of latents, with nothing of covariates: neither effects nor directions."""
    found = load_file(scale)
    for name in ("effects", "readout", "feature_mean"):
        found[f"effects.{name}"] = np.zeros_like(found[f"effects.{name}"])
    found["effects.feature_covariance"] = np.eye(len(found["effects.feature_mean"]), dtype=np.float32)
    found["effects.readout_deviations"] = np.ones_like(found["effects.readout_deviations"])
    found["effects.deviation"] = np.ones((), np.float32)
    save_file(found, path)
    return path


def drawn_by_maps(
    model: TrainedModel,
    masks: MaskModel,
    settings: config.Generate,
    plan: pd.DataFrame,
    label_maps: np.ndarray,
    path: Path,
) -> None:
    """Write the images of a plan, each for the label map of its scan."""
    columns = {"sample_id": pa.string(), "image": TensorColumn("float16", model.image_shape)}
    with ShardWriter(path, columns) as writer:
        for start in range(0, len(plan), settings.batch_size):
            part = plan.iloc[start : start + settings.batch_size]
            told = model.condition(part, masks.maps(label_maps[start : start + len(part)]))
            latents = model.sample(batch_noise(part["seed_key"].tolist(), model.latent_shape), told, settings)
            for name, image in zip(part["sample_id"], model.decode(latents).cpu().numpy(), strict=True):
                writer.append(sample_id=name, image=image)


def overlap(images: Shards, label_maps: np.ndarray, real: np.ndarray, seed: str, label: str) -> dict[str, Any]:
    """How well an image keeps to its label map: Pearson's r, in and about the structures, between the image and the
    scan whose map it is.
    """
    found = []
    for row, (labels, scan) in enumerate(zip(label_maps, real, strict=True)):
        near = ndimage.binary_dilation(labels > 0, iterations=2)
        found.append(float(np.corrcoef(images.tensor("image", row)[0][near].astype(float), scan[near])[0, 1]))
    weights = Bootstrap([str(i) for i in range(len(found))], RESAMPLES, seed, label)
    values = np.array(found)
    return dict(weights.figure(lambda w: (w @ values) / w.sum(1), len(found)))


def train(results: Path, study: config.Study, measured: Path, folder: Path, maps: bool) -> dict[str, Any]:
    """Run the step; how long a gradient step took, and what the network is."""
    if not (folder / "diffusion/card.json").is_file():
        frozen = config.freeze(study, "diffusion", folder / "config")
        latents = sorted((results / "latents").glob("shard-*.arrow"))
        labels = sorted((results / "masks/latents").glob("shard-*.arrow")) if maps else None
        label_scale = results / "masks/latents/scale.safetensors" if maps else None
        begun = time.process_time()
        diffusion.run(
            *(frozen, results / "cohort/manifest.parquet", latents, measured, folder / "diffusion", folder / "state"),
            *(None, labels, label_scale),
        )
        write_json(folder / "cost.json", {"core_seconds": round(time.process_time() - begun)})
    card = read_json(folder / "diffusion/card.json")
    return {
        "core_seconds": read_json(folder / "cost.json")["core_seconds"],
        "parameters": card["parameters"],
        "validation_loss": card["validation_loss"],
    }


def figures(
    results: Path, images: Images, reference: Images, known: Images, covariates: config.Covariates, seed: str
) -> dict[str, Any]:
    """Realism beside held-out scans, and what predictors measure of each covariate."""
    measuring = spaces(SPACES, Context(len(reference.shards.shape("image")) - 1))
    drawn, real, others = (extract(measuring, one.shards, one.rows, "images") for one in (images, reference, known))
    found: dict[str, Any] = {}
    for space in measuring:
        ruler = Scale.of(others[space.name], len(reference))
        samples = (
            Sample(ruler.standard(values[space.name]), one.units)
            for values, one in ((drawn, images), (real, reference))
        )
        draws = Draws(RESAMPLES, RESAMPLES, 100, seed, space.name)
        found[f"Frechet, {space.name}"] = judge(*samples, ruler, draws, ("frechet",))["frechet"]
    predictors = load_predictors(results / "instruments/predictors")
    told, _ = measure(predictors, images, "synthetic", covariates, {})
    truth, _ = measure(predictors, reference, "real", covariates, {})
    for name, each in covariate_fidelity(
        pd.concat([told, truth], ignore_index=True), covariates, resamples=RESAMPLES, seed=seed
    ).items():
        found[name] = each["auc" if each["kind"] == "categorical" else "r"]
    return found


def main(
    results: Annotated[Path, typer.Argument(help="results of the study")],
    maps: Annotated[bool, typer.Option("--maps", help="ways to tell label maps, not covariates")] = False,
    steps: Annotated[int, typer.Option(help="of every arm")] = 1500,
    width: Annotated[int, typer.Option(help="channels of every arm")] = 64,
    seed: Annotated[str, typer.Option(help="of all that is drawn")] = "conditioning",
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("results/conditioning"),
) -> None:
    """Train every arm, measure, and print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    frozen = sorted((results / "config").glob("study-*.json"), key=lambda path: path.stat().st_mtime)[-1]
    content = read_json(frozen) | {"seed": seed}
    out.mkdir(parents=True, exist_ok=True)
    measured = bare(results / "latents/scale.safetensors", out / "scale.safetensors")
    base = config.parse_study(content, "conditioning")
    table = read_manifest(results / "cohort/manifest.parquet", base.covariates)
    real = Shards(sorted((results / "preprocessed").glob("shard-*.arrow")))
    table = table[table["scan_id"].isin(real.image_ids())]
    scans = Images.of(real, "scan_id", "subject_id", table, "cohort")
    plan = planned(table.loc[table["split"] == "test", ["scan_id", *base.covariates]].head(MOST), seed)
    reference = scans.of_splits(["test"]).at_most(MOST)
    known = scans.of_splits(["train"]).at_most(2 * MOST)
    fabric = make_fabric(base.compute, torch.get_num_threads())
    settings = base.generate.model_copy(update={"guidance_scale": 1.0, "drawing_steps": 1})
    label_maps = truth = None
    if maps:
        shards = Shards(sorted((results / "masks/maps").glob("shard-*.arrow")))
        place = {name: row for row, name in enumerate(shards.column("scan_id"))}
        label_maps = np.stack([shards.tensor("labels", place[name]) for name in plan["scan_id"]])
        label_maps = label_maps.reshape(len(plan), *real.shape("image")[1:])
        there = {name: row for row, name in enumerate(real.image_ids())}
        truth = np.stack([real.tensor("image", there[name])[0].astype(float) for name in plan["scan_id"]])
    found: dict[str, Any] = {}
    for way in MAPS if maps else COVARIATES:
        folder = out / way
        study = study_of(content, "maps" if maps else "covariates", way, steps, width)
        cost = train(results, study, measured, folder, maps)
        path = folder / "images.arrow"
        if not path.exists():
            model = TrainedModel.load(results / "autoencoder", folder / "diffusion", fabric, base.compute, toned=False)
            if label_maps is not None:
                masks = MaskModel.load(results / "masks", fabric, base.compute)
                drawn_by_maps(model, masks, settings, plan, label_maps, path)
            else:
                draw(model, settings, plan, path)
        images = Images.of(Shards([path]), "sample_id", "seed_key", plan, str(path))
        found[way] = cost | {"figures": figures(results, images, reference, known, base.covariates, seed)}
        if label_maps is not None and truth is not None:
            found[way]["figures"]["keeps to the map, r"] = overlap(Shards([path]), label_maps, truth, seed, "own")
    write_json(out / "figures.json", found)
    drawn = {way: Shards([out / way / "images.arrow"]) for way in found}
    write_atomic(out / "contact-sheet.png", sheet(real, drawn, plan))
    text = rows(found)
    write_atomic(out / "table.md", text.encode())
    print(text)


def sheet(real: Shards, drawn: Mapping[str, Shards], plan: pd.DataFrame) -> bytes:
    """Held-out scans, each beside what every way drew for its covariates or its label map; PNG."""
    there = {name: row for row, name in enumerate(real.image_ids())}
    lines = []
    for i, name in enumerate(plan["scan_id"].head(SHOWN)):
        images = [real.tensor("image", there[name]), *(shards.tensor("image", i) for shards in drawn.values())]
        lines.append((str(name), [np.asarray(image) for image in images]))
    return completion_sheet("Ways to tell a network what to draw", lines, ["scan", *drawn])


def rows(found: dict[str, Any]) -> str:
    """A table in Markdown: a line per way."""
    names = list(next(iter(found.values()))["figures"])
    lines = [f"| | parameters | core seconds | held-out loss | {' | '.join(names)} |", f"|{'---|' * (len(names) + 4)}"]
    for way, each in found.items():
        cells = ["{value:.3g} [{low:.3g}, {high:.3g}]".format(**each["figures"][name]) for name in names]
        facts = [f"{each['parameters']:,}", str(each["core_seconds"]), f"{each['validation_loss']:.3f}"]
        lines.append(f"| `{way}` | {' | '.join([*facts, *cells])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
