"""A study of image and mask pairs, run by its steps in one process: cohort to sealed release."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from meddiff_steps import config
from meddiff_steps.provenance.record import recorded

SHAPE = (16, 16, 16)
SUBJECTS = 40
#: What the label maps of the cohort call the two structures.
LEFT, RIGHT = 7, 3

STUDY: dict[str, Any] = {
    "study": "pairs",
    "covariates": {"left": {"unit": "mL", "range": [0.001, 5]}, "right": {"unit": "mL", "range": [0.001, 5]}},
    "splits": {"train": 0.4, "val": 0.1, "calibration": 0.3, "test": 0.2},
    "preprocess": {"shape": list(SHAPE), "spacing_mm": 1, "shards": 2},
    "pairs": {"channel": "seg", "structures": {"left": [LEFT], "right": [RIGHT]}},
    "variants": {"count": 2, "max_shift_voxels": 1, "max_contrast": 0.1},
    "autoencoder": {"channels": [8, 8], "latent_channels": 4, "optimiser": {"steps": 4, "batch_size": 2}},
    "decoder": {"channels": 8, "num_res_blocks": 1, "crop": 8, "optimiser": {"steps": 2, "batch_size": 2}},
    "diffusion": {"channels": [8], "num_res_blocks": 1, "optimiser": {"steps": 4, "batch_size": 2}},
    "plan": [{"name": "syn", "subjects": 6}],
    "generate": {"batch_size": 4, "shard_size": 4, "num_inference_steps": 2, "drawing_steps": 2},
    "privacy": {
        "level": 0.4,
        "enforce": "report",
        "bootstrap": 100,
        "embedder": {"optimiser": {"steps": 2, "batch_size": 4}},
    },
    "segmentation_study": {
        "shares": [0.5, 1.0],
        "seeds": 2,
        "channels": [8, 8],
        "bootstrap": 200,
        "optimiser": {"steps": 3, "batch_size": 2},
    },
    "compute": {"device": "cpu", "precision": "32-true"},
    "release": {"name": "Pairs", "authors": ["A. Author"]},
}


def pair(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A head of 16^3 voxels with two bodies in it, no two alike, uint8 image and label map."""
    axes = np.indices(SHAPE)

    def body(centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        return sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)) <= 1

    labels = np.zeros(SHAPE, np.uint8)
    for label, middle in ((LEFT, (4.5, 8, 8)), (RIGHT, (11, 8, 7))):
        labels[body(middle + draw.uniform(-0.7, 0.7, 3), draw.uniform(1.8, 4.2, 3))] = label
    image = 60.0 * body((7.5, 7.5, 7.5), (7.5, 7.5, 7.5)) + 60 * (labels == LEFT) + 110 * (labels == RIGHT)
    image[image > 0] += draw.normal(0, 4, np.count_nonzero(image))
    return image.clip(0, 255).astype(np.uint8), labels


def write_cohort(folder: Path, subjects: int = SUBJECTS) -> Path:
    """Scans, label maps and a table of them; the volumes are the covariates."""
    draw, rows = np.random.default_rng(0), []
    for number in range(subjects):
        name = f"s{number:02d}"
        image, labels = pair(draw)
        for kind, array in (("image", image), ("seg", labels)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / kind / f"{name}.nii.gz")
        volumes = {"left": (labels == LEFT).sum() / 1000, "right": (labels == RIGHT).sum() / 1000}
        rows.append({"subject_id": name, "path": f"image/{name}.nii.gz", **volumes})
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return folder / "cohort.csv"


def study_of(cohort: Path, **changes: Any) -> config.Study:
    """The study of a cohort that `write_cohort` wrote."""
    content = STUDY | {"cohort": {"source": "table", "table": str(cohort)}} | changes
    channel = {"path": str(cohort.parent / "seg/{subject_id}.nii.gz"), "kind": "labels"}
    content["preprocess"] = content["preprocess"] | {"channels": {"seg": channel}}
    return config.parse_study(content, "test")


class PairsStudy:
    """The folder of a study, and its steps by the rules' names; each reads what the rule of that name does."""

    def __init__(self, results: Path, study: config.Study, threads: int = 1) -> None:
        self.root, self.study, self.threads = results, study, threads
        self.shards = [f"{i:04d}" for i in range(study.preprocess.shards)]
        planned, size = sum(group.subjects for group in study.plan), study.generate.shard_size
        self.planned = [f"{i:04d}" for i in range(-(-planned // size))]
        self.manifest, self.plan = results / "cohort/manifest.parquet", results / "plan.parquet"
        self.decoder = {"decoder": results / "decoder"} if study.decoder.network else {}
        self.models = {"autoencoder": results / "autoencoder", "diffusion": results / "diffusion", **self.decoder}
        self.masks = {"masks": results / "masks"}

    def each(self, pattern: str, shards: list[str] | None = None) -> list[Path]:
        return [self.root / pattern.format(shard) for shard in (self.shards if shards is None else shards)]

    @property
    def images(self) -> list[Path]:
        return self.each("preprocessed/shard-{}.arrow")

    @property
    def label_maps(self) -> list[Path]:
        return self.each("masks/maps/shard-{}.arrow")

    def step(self, name: str, **files: Any) -> None:
        """Run a step with its record, as its rule does."""
        run = import_module(f"meddiff_steps.steps.{name}").run
        recorded(name, run)(config=config.freeze(self.study, name, self.root / "config"), **files)

    def preprocess(self) -> None:
        self.step("cohort", out=self.manifest, card=self.root / "cohort/card.json")
        tables = self.each("preprocessed/qc/shard-{}.parquet")
        for shard, out, qc, maps in zip(self.shards, self.images, tables, self.label_maps, strict=True):
            self.step("preprocess", manifest=self.manifest, shard=int(shard), out=out, qc=qc)
            self.step("masks", images=out, out=maps)
        self.step("quality", qc=tables, out=self.root / "preprocessed/qc.parquet")

    def first_stage(self, where: str, images: list[Path]) -> dict[str, Any]:
        """Train an autoencoder below a folder, encode with it; what a diffusion model is then trained from."""
        folder, threads, given = self.root / where, {"threads": self.threads}, {"manifest": self.manifest}
        out, scale = folder / "autoencoder", folder / "latents/scale.safetensors"
        state = self.root / "state" / where / "autoencoder"
        self.step("autoencoder", **given, images=images, out=out, state=state, **threads)
        given["latents"] = [folder / "latents" / path.name for path in images]
        for image, latents in zip(images, given["latents"], strict=True):
            self.step("latents", images=image, autoencoder=out, out=latents, **threads)
        card = scale.with_name("manifest.json")
        self.step("scale", **given, images=images, autoencoder=out, scale=scale, out=card, **threads)
        return given | {"scale": scale}

    def diffusion(self, where: str, **given: Any) -> None:
        state, out = self.root / "state" / where / "diffusion", self.root / where / "diffusion"
        self.step("diffusion", **given, out=out, state=state, threads=self.threads)

    def train_masks(self) -> None:
        self.diffusion("masks", **self.first_stage("masks", self.label_maps))

    def train_images(self) -> None:
        given, maps = self.first_stage(".", self.images), self.root / "masks/latents"
        told = {"label_latents": [maps / path.name for path in self.images]}
        self.diffusion(".", **given, **told, label_scale=maps / "scale.safetensors")
        given = {"manifest": self.manifest, "images": self.images}
        if self.decoder:
            files = {"autoencoder": self.root / "autoencoder", "out": self.root / "decoder"}
            self.step("decoder", **given, **files, state=self.root / "state/decoder", threads=self.threads)
        self.step("tone", **given, **self.models | self.masks, out=self.root / "diffusion", threads=self.threads)

    @property
    def detecting(self) -> dict[str, Path]:
        return {
            "autoencoder": self.root / "autoencoder",
            "scale": self.root / "latents/scale.safetensors",
            "embedder": self.root / "instruments/embedder",
            "reference": self.root / "privacy/reference.safetensors",
            "reference_scans": self.root / "privacy/reference-scans.arrow",
        }

    @property
    def calibration(self) -> Path:
        return self.root / "privacy/calibration.json"

    def calibrate(self) -> None:
        given = {"manifest": self.manifest, "images": self.images}
        self.step("embedder", **given, out=self.root / "instruments/embedder", threads=self.threads)
        self.step("calibrate", **given, **self.detecting, out=self.calibration, label_maps=self.label_maps)

    def filter(self, shard: str, generated: Path) -> None:
        files = {"out": self.root / f"filtered/shard-{shard}.arrow", "generated": generated, "plan": self.plan}
        files |= {"decisions": self.root / f"privacy/decisions/shard-{shard}.parquet"}
        files |= {"calibration": self.calibration}
        self.step("filter", shard=int(shard), **files, **self.detecting | self.models | self.masks)

    def draw(self) -> None:
        self.step("plan", manifest=self.manifest, out=self.plan)
        for shard in self.planned:
            out = self.root / f"generated/shard-{shard}.arrow"
            given = {"plan": self.plan, "shard": int(shard), "threads": self.threads}
            self.step("generate", **given, out=out, **self.models, **self.masks)
            self.filter(shard, out)

    def judge(self) -> None:
        decisions, report = self.root / "privacy/decisions.parquet", self.root / "privacy/report.json"
        self.step(
            "privacy",
            **{"manifest": self.manifest, "images": self.images, "plan": self.plan, "label_maps": self.label_maps},
            generated=self.each("generated/shard-{}.arrow", self.planned),
            filtered=self.each("filtered/shard-{}.arrow", self.planned),
            shard_decisions=self.each("privacy/decisions/shard-{}.parquet", self.planned),
            **{"calibration": self.calibration, "decisions": decisions, "out": report, "threads": self.threads},
            **self.detecting | self.models | self.masks,
        )
        released = self.root / "privacy/released.parquet"
        self.step("gate", report=report, decisions=decisions, plan=self.plan, out=released)

    def release(self) -> Path:
        """Write the release and seal it."""
        predictors, out = self.root / "instruments/predictors", self.root / "release"
        self.step("predictors", manifest=self.manifest, images=self.images, out=predictors)
        released, privacy = self.root / "privacy/released.parquet", self.root / "privacy/report.json"
        tables = self.each("images/shard-{}.parquet", self.planned)
        for shard, table in zip(self.planned, tables, strict=True):
            generated = self.root / f"filtered/shard-{shard}.arrow"
            self.step("images", generated=generated, released=released, release=out, out=table, predictors=predictors)
        told: dict[str, Any] = {"privacy": privacy, "images": tables, **self.models, **self.masks}
        description = out / "dataset_description.json"
        self.step("describe", released=released, **told, cohort=self.root / "cohort", out=description)
        self.step(
            "ledger",
            **{"plan": self.plan, "decisions": self.root / "privacy/decisions.parquet", **told},
            **{"calibration": self.calibration, "description": description, "out": out / "provenance/root.json"},
            private=self.root / "privacy/ledger-private.parquet",
        )
        return out

    def compare_segmenters(self) -> Path:
        out = self.root / "segmentation_study/results.json"
        self.step(
            "segmentation_study",
            **{"manifest": self.manifest, "images": self.images, "label_maps": self.label_maps, "out": out},
            filtered=self.each("filtered/shard-{}.arrow", self.planned),
            released=self.root / "privacy/released.parquet",
            cases=out.with_name("cases.parquet"),
            threads=self.threads,
        )
        return out

    def run(self) -> Path:
        """All of it, up to and with the sealed release."""
        for part in (self.preprocess, self.train_masks, self.train_images, self.calibrate, self.draw, self.judge):
            part()
        return self.release()
