"""A level that few have: what a base learns of it from a handful of subjects, what it forgets, and whom it gives away.

    python -m benchmarks.rare results/demo --subjects 8

The study has to be finished up to its privacy report, and has a covariate `--covariate` with a level `--level`.  Its
autoencoder, drawing decoder and detectors are used as they are; they saw that level.  The base is a diffusion model of
the same settings that was trained on the study's training scans without the level.  Of subjects with the level that the
study did not train on, `--subjects` are learnt from, and all others are what figures are measured against.

Arms: the base itself, asked for the level; DreamBooth (`diffusion.rare`); the same without anything of the base beside
the few scans; and the study's own model, which knew hundreds with the level.  Each draws every held-out scan's
covariates, with the level and without it where they are.
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
import pyarrow.compute as pc
import typer
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.drawing import draw, planned
from meddiff_steps import config
from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import full_float32, make_fabric
from meddiff_steps.core.files import read_json, write_atomic, write_json
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale
from meddiff_steps.evaluation.realism.measure import judge
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments.feature_spaces.assemble import spaces
from meddiff_steps.instruments.feature_spaces.base import Context, FeatureSpace, extract
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.privacy import assessment, attacks
from meddiff_steps.privacy.detectors.base import directions
from meddiff_steps.privacy.reference import ReferenceFiles, load_detectors
from meddiff_steps.statistics.bootstrap import Bootstrap
from meddiff_steps.statistics.measures import auc, smaller_side
from meddiff_steps.steps import diffusion, scale

log = logging.getLogger(__name__)

#: `diffusion.rare` of each arm that is trained.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "DreamBooth": {"share": 0.5, "preserved": 200},
    "the few scans alone": {"share": 0.9, "preserved": 1},
}
BASE, WHOLE = "base, never met the level", "the study's model, all that have the level"
SPACES, RESAMPLES = ("random", "radiomics", "structure"), 1000
#: Synthetic images with the level per real one of the few, and scans without it, that a classifier learns from.
CONTROLS = 200


@dataclass(frozen=True)
class Trial:
    """What all arms share.

    Attributes
    ----------
    study
        As it was frozen.
    results, out
        Of the study; what is written.
    table
        The study's manifest, with a column `part`: `base` (training scans without the level), `few`, `with` and
        `without` (held out, with the level and without it), or None.
    """

    study: dict[str, Any]
    results: Path
    out: Path
    covariate: str
    level: str
    table: pd.DataFrame
    seed: str

    @property
    def covariates(self) -> config.Covariates:
        return self.of({}).covariates

    def of(self, changes: Mapping[str, Any]) -> config.Study:
        """The study with changes of its section `diffusion`."""
        content = json.loads(json.dumps(self.study)) | {"seed": self.seed}
        optimiser = content["diffusion"]["optimiser"] | dict(changes.get("optimiser", {}))
        content["diffusion"] |= dict(changes) | {"optimiser": optimiser}
        if "rare" in changes:  # whose weights it goes on from is told to the step
            content["init_from"] = {"path": str(self.out), "models": ["autoencoder", "diffusion"]}
            content["autoencoder"]["optimiser"]["steps"] = 0
        return config.parse_study(content, "rare")

    def manifest(self, parts: tuple[str, ...], path: Path) -> Path:
        """A manifest whose training scans are those of `parts`; nobody else is in it."""
        self.table[self.table["part"].isin(parts)].drop(columns="part").assign(split="train").to_parquet(
            path, index=False
        )
        return path

    def rows(self, shards: Shards, part: str) -> np.ndarray:
        """Rows of `shards`, whose column scan_id says whose they are, of one part."""
        wanted = set(self.table.loc[self.table["part"] == part, "scan_id"])
        return np.array([row for row, name in enumerate(shards.column("scan_id")) if name in wanted])


def prepare(results: Path, covariate: str, level: str, subjects: int, seed: str, out: Path) -> Trial:
    """Deal the subjects."""
    frozen = sorted((results / "config").glob("study-*.json"), key=lambda path: path.stat().st_mtime)[-1]
    table = pd.read_parquet(results / "cohort/manifest.parquet")
    has, trained = table[covariate] == level, table["split"] == "train"
    unseen = sorted(set(table.loc[has & ~trained, "subject_id"]))
    few = {unseen[i] for i in step_generator(seed, "rare", 0).permutation(len(unseen))[:subjects]}
    part = np.select(
        [trained & ~has, table["subject_id"].isin(few), has & ~trained, ~trained & table[covariate].notna()],
        ["base", "few", "with", "without"],
        "",
    )
    trial = Trial(read_json(frozen), results, out, covariate, level, table.assign(part=part), seed)
    log.info("%s", trial.table["part"].value_counts().to_dict())
    return trial


def train(trial: Trial, name: str, study: config.Study, parts: tuple[str, ...], base: Path | None) -> Path:
    """Fit the effects (of a base) and train the diffusion network; what is there is kept."""
    folder = trial.out / name.replace(" ", "-").replace(",", "")
    if (folder / "diffusion/card.json").is_file():
        return folder / "diffusion"
    folder.mkdir(parents=True, exist_ok=True)
    frozen = {stage: config.freeze(study, stage, folder / "config") for stage in ("scale", "diffusion")}
    manifest, measured = trial.manifest(parts, folder / "manifest.parquet"), folder / "scale.safetensors"
    encoded = sorted((trial.results / "latents").glob("shard-*.arrow"))
    kept = _of_manifest(encoded, manifest, folder / "latents.arrow")
    images = sorted((trial.results / "preprocessed").glob("shard-*.arrow"))
    begun = time.process_time()
    scale.run(
        *(frozen["scale"], manifest, [kept], images, trial.results / "autoencoder", measured, folder / "latents.json"),
        base,
    )
    diffusion.run(
        frozen["diffusion"], manifest, [kept], measured, folder / "diffusion", folder / "state", None, None, None, base
    )
    write_json(folder / "cost.json", {"core_seconds": round(time.process_time() - begun)})
    return folder / "diffusion"


def _of_manifest(encoded: list[Path], manifest: Path, path: Path) -> Path:
    """Latents of the scans of a manifest alone."""
    wanted = pa.array(pd.read_parquet(manifest, columns=["scan_id"])["scan_id"])
    tables = []
    for shard in encoded:
        with pa.memory_map(str(shard)) as source:
            found = pa.ipc.open_file(source).read_all()
            tables.append(found.filter(pc.is_in(found["scan_id"], wanted)))
    whole = pa.concat_tables(tables)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        for batch in whole.to_batches(max_chunksize=1):
            writer.write_batch(batch)
    return path


def figures(trial: Trial, drawn: Mapping[str, Mapping[str, Path]], models: Mapping[str, Path]) -> dict[str, Any]:
    """Every figure of every arm."""
    real = Shards(sorted((trial.results / "preprocessed").glob("shard-*.arrow")))
    measuring = spaces(SPACES, Context(len(real.shape("image")) - 1))
    parts = ("base", "few", "with", "without")
    rows = {part: trial.rows(real, part) for part in parts}
    scans = {part: extract(measuring, real, rows[part], part) for part in parts}
    made = {
        name: {
            part: extract(measuring, Shards([path]), np.arange(len(Shards([path]))), name)
            for part, path in each.items()
        }
        for name, each in drawn.items()
    }
    found = {name: {"like": _like(trial, measuring, scans, each)} for name, each in made.items()}
    for name, each in made.items():
        found[name]["told"] = _told(trial, scans, each)
        found[name]["gain"] = _gain(trial, scans, each["with"])
    found["real scans"] = {"told": _told(trial, scans, scans), "gain": _gain(trial, scans, None)}
    for name, risk in _risks(trial, real, rows, drawn, models).items():
        found[name]["privacy"] = risk
    return found


def _like(
    trial: Trial, measuring: list[FeatureSpace], scans: Mapping[str, Any], made: Mapping[str, Any]
) -> dict[str, Any]:
    """Frechet distance to held-out scans with the level, and to those without it, per feature space."""
    found: dict[str, Any] = {}
    for part in ("with", "without"):
        for space in measuring:
            ruler = Scale.of(scans["base"][space.name], len(scans[part][space.name]))
            both = (made[part][space.name], scans[part][space.name])
            samples = [Sample(ruler.standard(x), np.arange(len(x)).astype(str)) for x in both]
            draws = Draws(RESAMPLES, RESAMPLES, 100, trial.seed, part)
            found[f"{part}, {space.name}"] = judge(*samples, ruler, draws, ("frechet",))["frechet"]
    return found


def _classifier(positive: np.ndarray, negative: np.ndarray) -> Any:
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced"))
    return fitted.fit(np.concatenate([positive, negative]), np.arange(len(positive) + len(negative)) < len(positive))


def _auc(trial: Trial, classifier: Any, positive: np.ndarray, negative: np.ndarray, label: str) -> dict[str, Any]:
    scores = classifier.decision_function(np.concatenate([positive, negative]))
    members = np.arange(len(scores)) < len(positive)
    subjects = [str(i) for i in range(len(scores))]
    bootstrap = Bootstrap(subjects, RESAMPLES, trial.seed, label)
    return dict(bootstrap.figure(auc(members, scores), smaller_side(members, subjects)))


def _told(trial: Trial, scans: Mapping[str, Any], judged: Mapping[str, Any]) -> dict[str, Any]:
    """Can a classifier of real scans, half of the held-out ones, tell the level in the others, or in drawn images?"""
    with_, without = scans["with"]["radiomics"], scans["without"]["radiomics"]
    classifier = _classifier(with_[::2], without[::2])
    return _auc(trial, classifier, judged["with"]["radiomics"][1::2], judged["without"]["radiomics"][1::2], "told")


def _gain(trial: Trial, scans: Mapping[str, Any], synthetic: Any) -> dict[str, Any]:
    """A classifier that learns from the few and from scans without the level, and from synthetic images beside them."""
    few, negative = scans["few"]["radiomics"], scans["base"]["radiomics"][:CONTROLS]
    positive = few if synthetic is None else np.concatenate([few, synthetic["radiomics"]])
    classifier = _classifier(positive, negative)
    return _auc(trial, classifier, scans["with"]["radiomics"], scans["without"]["radiomics"], "gain")


def _risks(
    trial: Trial,
    real: Shards,
    rows: Mapping[str, np.ndarray],
    drawn: Mapping[str, Mapping[str, Path]],
    models: Mapping[str, Path],
) -> dict[str, Any]:
    """The attacks on the few (`privacy.assessment`); strangers are held-out people with the level."""
    privacy, study = trial.results / "privacy", trial.of({})
    fabric = make_fabric(study.compute.model_copy(update={"precision": "32-true", "compile": False}), 1)
    card = read_json(privacy / "calibration.json")
    files = ReferenceFiles(
        *(
            privacy / "reference-scans.arrow",
            trial.results / "autoencoder",
            trial.results / "latents/scale.safetensors",
        ),
        trial.results / "instruments/embedder",
    )
    detectors = load_detectors(
        files, load_file(privacy / "reference.safetensors"), card["detectors"], card["mirrors"], fabric
    )
    seen = {part: directions(detectors, real, rows[part]) for part in ("few", "with")}
    scans = read_manifest(trial.results / "cohort/manifest.parquet").set_index("scan_id")
    chosen = np.concatenate([rows["few"], rows["with"]])
    members = np.arange(len(chosen)) < len(rows["few"])
    who = scans.loc[[real.column("scan_id")[row] for row in chosen]].reset_index()
    found: dict[str, Any] = {}
    for name, paths in drawn.items():
        shards = Shards([paths["with"]])
        images = directions(detectors, shards, np.arange(len(shards)))
        generator = step_generator(trial.seed, "risk", 0)
        nearer = {
            detector: attacks.nearer_to_training(
                images[detector] @ seen["few"][detector].T,
                images[detector] @ seen["with"][detector].T,
                RESAMPLES,
                generator,
            )
            for detector in images
        }
        model = TrainedModel.load(trial.results / "autoencoder", models[name], fabric, toned=False)
        with full_float32():
            latents = model.encode(real.tensors("image", chosen).astype(np.float32))
            losses = assessment.denoising_losses(model, latents, model.condition(who))
        weights = attacks.membership(members, -losses, who["subject_id"].tolist(), RESAMPLES, trial.seed, "loss")
        found[name] = {"nearer": nearer, "weights": weights["auc"]}
    return found


def table(found: Mapping[str, Any]) -> str:
    """A table in Markdown: a line per arm."""

    def cell(figure: Mapping[str, Any] | None) -> str:
        return "" if figure is None else "{value:.3g} [{low:.3g}, {high:.3g}]".format(**figure)

    like = [f"{part}, {space}" for part in ("with", "without") for space in SPACES]
    nearer = list(next(each["privacy"]["nearer"] for each in found.values() if "privacy" in each))
    head = [
        "level told, AUC",
        "classifier of the few and these, AUC",
        *like,
        *(f"nearer, {name}" for name in nearer),
        "weights, AUC",
    ]
    lines = [f"| | {' | '.join(head)} |", f"|{'---|' * (len(head) + 1)}"]
    for name, each in found.items():
        risk = each.get("privacy", {})
        cells = [each["told"], each["gain"], *(each.get("like", {}).get(key) for key in like)]
        cells += [*(risk.get("nearer", {}).get(key) for key in nearer), risk.get("weights")]
        lines.append(f"| {name} | {' | '.join(map(cell, cells))} |")
    return "\n".join(lines) + "\n"


def main(
    results: Annotated[Path, typer.Argument(help="results of the study")],
    covariate: Annotated[str, typer.Option(help="whose level it is")] = "diagnosis",
    level: Annotated[str, typer.Option(help="that few have")] = "case",
    subjects: Annotated[int, typer.Option(help="to learn it from")] = 8,
    steps: Annotated[int, typer.Option(help="on the few")] = 300,
    rate: Annotated[float, typer.Option(help="learning rate on the few")] = 3e-4,
    seed: Annotated[str, typer.Option(help="of who is learnt from, and of all that is drawn")] = "rare",
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("results/rare"),
) -> None:
    """Train every arm, measure, and print the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trial = prepare(results, covariate, level, subjects, seed, out)
    models = {BASE: train(trial, "base", trial.of({}), ("base",), None), WHOLE: results / "diffusion"}
    for name, rare in ARMS.items():
        optimiser = {"steps": steps, "learning_rate": rate, "validate_every": steps}
        changes = {"rare": {"covariate": covariate, "level": level, **rare}, "optimiser": optimiser}
        models[name] = train(trial, name, trial.of(changes), ("few",), models[BASE])
    study, plans = trial.of({}), {}
    for part in ("with", "without"):
        scans = trial.table.loc[trial.table["part"] == part, list(trial.covariates)]
        plans[part] = planned(scans, trial.seed, part, f"noise/{part}")
    fabric = make_fabric(study.compute, 1)
    drawn: dict[str, dict[str, Path]] = {}
    for name, place in models.items():
        drawn[name] = {}
        for part, plan in plans.items():
            path = out / f"{name.replace(' ', '-').replace(',', '')}-{part}.arrow"
            if not path.exists():
                decoder = results / "decoder" if study.decoder.network is not None else None
                model = TrainedModel.load(
                    results / "autoencoder", place, fabric, study.compute, decoder=decoder, toned=False
                )
                draw(model, study.generate, plan, path)
            drawn[name][part] = path
    found = figures(trial, drawn, models)
    write_json(out / "figures.json", found)
    text = table(found)
    write_atomic(out / "table.md", text.encode())
    print(text)


if __name__ == "__main__":
    typer.run(main)
