"""Does starting from somebody's weights pay? A few subjects: models that are trained from scratch, and models that go
on from a base that never saw them.

    python -m benchmarks.adapting results/ixi-4mm --subjects 25
    python -m benchmarks.adapting results/ixi-4mm --models meddiff_steps/shipped/ixi-4mm

The base study has to be finished up to its diffusion model and predictors.  Of the subjects that its networks did not
learn from, `--subjects` are learnt from here and the others are what every figure is measured against.  Every arm draws
images for the covariates of these others, from the same noise, and is measured by the instruments of the base study.
The optimiser of an arm is the same for each network that it trains; an arm that starts from the base trains the
diffusion network alone.  Grey levels are not fitted, for any arm.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import typer

from benchmarks.drawing import draw, planned
from meddiff_steps import config
from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.files import read_json, write_atomic, write_json
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.evaluation import spectrum
from meddiff_steps.evaluation.fidelity import covariate_fidelity
from meddiff_steps.evaluation.metrics import measure, radial_power
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale
from meddiff_steps.evaluation.realism.measure import judge
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.instruments.feature_spaces.assemble import spaces
from meddiff_steps.instruments.feature_spaces.base import Context, extract
from meddiff_steps.instruments.predictors import load_predictors
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.steps import autoencoder, decoder, diffusion, latents, scale

log = logging.getLogger(__name__)

#: What an arm changes in `diffusion`; None: nothing is given, all is trained anew.
ARMS: Mapping[str, Mapping[str, Any] | None] = {
    "base as it is": {"steps": 0},
    "from scratch": None,
    "all weights": {},
    "all, towards the base": {"towards_base": 1.0},
    "adapters of rank 8": {"trains": "adapters", "learning_rate": 3e-3},
}
SPACES, METRICS = ("random", "radiomics", "structure"), ("frechet", "classifier_auc")
RESAMPLES = 1000
#: Scans that the base learnt from, at most, which set the scale of features and the floor.
KNOWN = 250


@dataclass(frozen=True)
class Case:
    """What all arms share.

    Attributes
    ----------
    study
        Of the base, as it was frozen.
    models
        Folder with the base's networks.
    manifest, images
        Of the subjects that the base did not learn from: few in `train`, the others in `test`.
    """

    study: dict[str, Any]
    models: Path
    manifest: Path
    images: Path
    out: Path
    seed: str


def prepare(results: Path, models: Path, subjects: int, tests: int, seed: str, out: Path) -> Case:
    """Deal the subjects that the base did not learn from, and copy their images."""
    frozen = sorted((results / "config").glob("study-*.json"), key=lambda path: path.stat().st_mtime)[-1]
    table = pd.read_parquet(results / "cohort/manifest.parquet")
    real = Shards(sorted((results / "preprocessed").glob("shard-*.arrow")))
    ids = real.image_ids()
    others = sorted(set(table.loc[(table["split"] != "train") & table["scan_id"].isin(ids), "subject_id"]))
    order = [others[i] for i in step_generator(seed, "adapting", 0).permutation(len(others))]
    learnt, judged = order[:subjects], order[subjects : subjects + tests]
    mine = table[table["subject_id"].isin([*learnt, *judged])].copy()
    mine["split"] = np.where(mine["subject_id"].isin(learnt), "train", "test")
    case = Case(read_json(frozen), models, out / "manifest.parquet", out / "images.arrow", out, seed)
    out.mkdir(parents=True, exist_ok=True)
    mine.to_parquet(case.manifest, index=False)
    columns = {"scan_id": pa.string(), "image": TensorColumn("float16", real.shape("image"))}
    with ShardWriter(case.images, columns) as writer:
        for row, name in enumerate(ids):
            if name in set(mine["scan_id"]):
                writer.append(scan_id=name, image=real.tensor("image", row))
    log.info("%d subjects to learn from, %d to measure against", len(learnt), len(judged))
    return case


def study_of(case: Case, arm: Mapping[str, Any] | None, steps: Mapping[str, int], rate: float) -> config.Study:
    """The study of an arm."""
    content = json.loads(json.dumps(case.study))
    for name, count in steps.items():
        content[name]["optimiser"] |= {"steps": count, "validate_every": max(count, 1), "ema_decay": None}
    if arm is not None:
        content["init_from"] = {"path": str(case.models), "models": ["autoencoder", "diffusion"]}
        content["autoencoder"]["optimiser"]["steps"] = 0
        if content["decoder"]["network"] is not None:
            content["init_from"]["models"].append("decoder")
            content["decoder"]["optimiser"]["steps"] = 0
        changed = dict(arm)
        content["diffusion"]["optimiser"]["learning_rate"] = changed.pop("learning_rate", rate)
        if "steps" in changed:
            content["diffusion"]["optimiser"]["steps"] = changed.pop("steps")
        content["diffusion"] |= changed
    content["seed"] = case.seed
    return config.parse_study(content, "adapting")


def train(case: Case, study: config.Study, given: bool, folder: Path) -> TrainedModel:
    """Run the steps of an arm; what is given is not trained."""
    frozen = {stage: config.freeze(study, stage, folder / "config") for stage in config.STAGES}
    drawing, state = study.decoder.network is not None, folder / "state"
    first = case.models / "autoencoder" if given else folder / "autoencoder"
    second = case.models / "decoder" if given else folder / "decoder"
    if not given:
        autoencoder.run(frozen["autoencoder"], case.manifest, [case.images], first, state / "autoencoder")
    encoded = (case.out if given else folder) / "latents.arrow"
    if not encoded.exists():
        latents.run(frozen["latents"], case.images, first, encoded)
    base = case.models / "diffusion" if given else None
    measured = folder / "scale.safetensors"
    scale.run(
        *(frozen["scale"], case.manifest, [encoded], [case.images], first, measured, folder / "latents.json", base)
    )
    if drawing and not given:
        decoder.run(frozen["decoder"], case.manifest, [case.images], first, second, state / "decoder")
    out = folder / "diffusion"
    diffusion.run(frozen["diffusion"], case.manifest, [encoded], measured, out, state / "diffusion", None, base)
    fabric = make_fabric(study.compute, torch.get_num_threads())
    return TrainedModel.load(first, out, fabric, study.compute, decoder=second if drawing else None, toned=False)


def compare(results: Path, case: Case, covariates: config.Covariates, drawn: Mapping[str, Images]) -> dict[str, Any]:
    """Every figure of every arm, beside real scans of other people."""
    test = Images.of(
        Shards([case.images]), "scan_id", "subject_id", read_manifest(case.manifest, covariates), "test"
    ).of_splits(["test"])
    shards = Shards(sorted((results / "preprocessed").glob("shard-*.arrow")))
    table = read_manifest(results / "cohort/manifest.parquet", covariates)
    known = Images.of(shards, "scan_id", "subject_id", table, "base").of_splits(["train"]).at_most(KNOWN)
    measuring = spaces(SPACES, Context(len(test.shards.shape("image")) - 1))
    features = {name: extract(measuring, some.shards, some.rows, name) for name, some in drawn.items()}
    real, others = (extract(measuring, some.shards, some.rows, "scans") for some in (test, known))
    predictors = load_predictors(results / "instruments/predictors")
    truth, power = measure(predictors, test, "real", covariates, {})
    floor = known.at_most(len(test)).ids
    chosen = [known.ids.index(name) for name in floor]
    found: dict[str, Any] = {}
    for name, images in [*drawn.items(), ("scans that the base learnt from", None)]:
        like = {}
        for space in measuring:
            ruler = Scale.of(others[space.name], len(test))
            reference = Sample(ruler.standard(real[space.name]), test.units)
            values = others[space.name][chosen] if images is None else features[name][space.name]
            units = known.units[chosen] if images is None else images.units
            sample = Sample(ruler.standard(values), units)
            like[space.name] = judge(
                sample, reference, ruler, Draws(RESAMPLES, RESAMPLES, 100, case.seed, name), METRICS
            )
        found[name] = {"realism": like}
        if images is not None:
            told, _ = measure(predictors, images, "synthetic", covariates, {})
            both = pd.concat([told, truth], ignore_index=True)
            found[name] |= {
                "covariates": covariate_fidelity(both, covariates, resamples=RESAMPLES, seed=case.seed),
                "power": spectrum.band_power_ratio(
                    radial_power(images, "image"), power, paired=False, resamples=RESAMPLES, seed=case.seed
                ),
            }
    return found


def rows(found: Mapping[str, Any]) -> str:
    """A table in Markdown: a line per arm."""

    def cell(figure: Mapping[str, Any]) -> str:
        return "{value:.3g} [{low:.3g}, {high:.3g}]".format(**figure)

    names = list(next(iter(found.values()))["covariates"])
    head = [*(f"Frechet, {name}" for name in SPACES), "AUC, random", *names, "power above half of Nyquist"]
    lines = [f"| | {' | '.join(head)} |", f"|{'---|' * (len(head) + 1)}"]
    for name, figures in found.items():
        like = figures["realism"]
        cells = [cell(like[space]["frechet"]) for space in SPACES] + [cell(like["random"]["classifier_auc"])]
        if "covariates" in figures:
            kinds = figures["covariates"].values()
            cells += [cell(each["auc" if each["kind"] == "categorical" else "r"]) for each in kinds]
            cells += [cell(figures["power"]["above_half"])]
        else:
            told = next(iter(found.values()))["covariates"].values()
            cells += [cell(each["auc" if each["kind"] == "categorical" else "r"]["ceiling"]) for each in told] + ["1"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    results: Annotated[Path, typer.Argument(help="results of the base study")],
    models: Annotated[Path | None, typer.Option(help="its networks; by default of its results")] = None,
    subjects: Annotated[int, typer.Option(help="to learn from")] = 25,
    tests: Annotated[int, typer.Option(help="to measure against, at most")] = 100,
    steps: Annotated[int, typer.Option(help="of the diffusion network")] = 500,
    decoding_steps: Annotated[int, typer.Option(help="of autoencoder and decoder, where they are trained")] = 1000,
    rate: Annotated[float, typer.Option(help="learning rate where all weights go on from the base")] = 1e-3,
    arms: Annotated[list[str] | None, typer.Option("--arm", help=f"of {', '.join(ARMS)}; all by default")] = None,
    seed: Annotated[str, typer.Option(help="of who is learnt from, and of all that is drawn")] = "adapting",
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("results/adapting"),
) -> None:
    """Train every arm, measure, and print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    case = prepare(results, models or results, subjects, tests, seed, out)
    counts = {"autoencoder": decoding_steps, "decoder": decoding_steps, "diffusion": steps}
    covariates = study_of(case, None, counts, rate).covariates
    scans = read_manifest(case.manifest, covariates)
    drawn, plan = {}, planned(scans.loc[scans["split"] == "test", list(covariates)], seed)
    for name in arms or ARMS:
        folder = out / name.replace(" ", "-").replace(",", "")
        path, study = folder / "images.arrow", study_of(case, ARMS[name], counts, rate)
        if not path.exists():  # what was drawn is kept: remove the folder of an arm to make it again
            begun = time.process_time()
            model = train(case, study, ARMS[name] is not None, folder)
            write_json(folder / "cost.json", {"core_seconds": round(time.process_time() - begun)})
            draw(model, study.generate, plan, path)
        drawn[name] = Images.of(Shards([path]), "sample_id", "seed_key", plan, str(path))
    found = compare(results, case, covariates, drawn)
    write_json(out / "figures.json", found)
    text = rows(found) + "\n"
    write_atomic(out / "table.md", text.encode())
    print(text)


if __name__ == "__main__":
    typer.run(main)
