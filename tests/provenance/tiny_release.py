"""A small sealed release, made by the steps themselves from models that were never trained."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.cohort.manifest import write_manifest
from meddiff_steps.core.files import atomic_path, write_json
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.instruments.predictors import LocalHistograms, Predictor, Predictors, save_predictors
from meddiff_steps.instruments.segmenter import new_segmenter
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.student import Distilled
from meddiff_steps.models.drawing.base import build as build_decoder
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.tone import ToneCurve
from meddiff_steps.models.trained import save_image_network, save_tone
from meddiff_steps.models.weights import save_model
from meddiff_steps.privacy.verdict import (
    CALIBRATED,
    COPIES_FOUND,
    FILLED,
    STRANGERS,
    Gate,
    bounds,
    holds,
    limits_of,
    measured,
)
from meddiff_steps.provenance import verify
from meddiff_steps.provenance.ledger import measured_columns, public_schema
from meddiff_steps.provenance.record import Observer, recorded
from meddiff_steps.provenance.signature import generate as generate_key
from meddiff_steps.steps import describe, gate, generate, images, ledger, plan
from meddiff_steps.synthesis.plan import redraw
from meddiff_steps.training.word_vectors import fit_words

SHAPE = {3: [8, 8, 8], 2: [8, 8]}
LIMITS = {"aligned": 0.9, "learned": 0.8, "latent": 0.7}
#: Subjects that were drawn again, given up, and taken for a double of another.
AGAIN, GIVEN_UP, DOUBLE = "syn000001", "syn000002", "syn000004"
UNTROUBLED = "syn000003"
#: Fields of a recipe that rows of older versions lack.
LATER_FIELDS = tuple(verify.LATER["recipe"])


def schema_of(rows: Sequence[dict[str, Any]], covariates: config.Covariates) -> pa.Schema:
    """Columns of ledger.parquet as the version that wrote `rows` had them; a study's own steps take its covariates by
    name, as its frozen config has them.
    """
    covariates = dict(sorted(covariates.items()))
    shown: dict[str, Any] = next((row for row in rows if row.get("image")), {})
    measured = measured_columns(covariates, shown.get("measured") or {})
    schema = public_schema(covariates, measured=measured, labels="labels" in shown)
    present = {key for row in rows for key in row.get("recipe") or ()}
    place = schema.get_field_index("recipe")
    fields = [field for field in schema.field(place).type if field.name not in LATER_FIELDS or field.name in present]
    return schema.set(place, pa.field("recipe", pa.struct(fields)))


#: Given to planned subjects in turn.
TEXTS = ["Mass, {age} years.", 'Mass "left", no effusion.']


def passing_gates(study: config.Study, calibration: dict[str, Any], counts: dict[str, int]) -> Iterator[Gate]:
    """All tests of a verdict, each passed with a figure that says so."""
    left_out = {"value": (counts["failed"] + counts["duplicates"]) / counts["planned"], "n": counts["planned"]}
    plain = {
        CALIBRATED: {"value": calibration["subjects"], "n": calibration["subjects"]},
        COPIES_FOUND: {"value": 1.0, "low": 0.9, "high": 1.0, "n": 40},
        STRANGERS: {"value": 0.05, "low": 0.02, "high": 0.11, "n": 100},
        FILLED: left_out,
    }
    for name, limit in limits_of(study.privacy, study.covariates, calibration, False).items():
        middle = 0.5 if bounds(name, limit)[0] > 0 else 0.02
        interval = {"value": middle, "low": middle - 0.02, "high": middle + 0.02, "n": 40}
        yield holds(name, True, plain[name], limit, "") if name in plain else measured(name, interval, limit, "")


class Place:
    """A study's folder, up to and with its sealed release.

    Parameters
    ----------
    shard_size
        Subjects per shard.
    sign
        Whether the release is signed by `self.key`.
    limit
        Subjects per dataset of the release; the ten that are planned need four datasets of at most three.
    drawing
        Whether there is a drawing decoder.
    toned
        Whether the grey levels of generated images are changed.
    student
        Whether a student of the diffusion model draws.
    texts
        Whether images are asked for in words, too.
    """

    def __init__(
        self,
        root: Path,
        dims: int = 3,
        shard_size: int = 4,
        sign: bool = True,
        seed: str = "seed",
        limit: int = 1000,
        drawing: bool = True,
        toned: bool = True,
        student: bool = False,
        measured: bool = True,
        texts: bool = False,
    ) -> None:
        self.texts = texts
        self.measured = measured
        segmented = measured and dims == 3
        self.toned = toned
        self.results = root / "results/tiny"
        self.release = self.results / "release"
        self.private = self.results / "privacy/ledger-private.parquet"
        self.key = root / "key.pem"
        generate_key(self.key)
        self.study = config.parse_study(
            {
                "study": "tiny",
                "seed": seed,
                "covariates": {"age": {"unit": "year", "range": [20, 90]}, "sex": {"levels": ["F", "M"]}}
                | ({"dark_ml": {"unit": "mL", "range": [0, 4000]}} if segmented else {}),
                "segmentation": {"labels": "{scan_id}.nii.gz", "structures": {"dark_ml": {"labels": [1]}}}
                if segmented
                else None,
                "cohort": {"source": "bids", "root": str(root / "secret")},
                "preprocess": {"shape": SHAPE[dims], "spacing_mm": 20 if dims == 3 else None},
                "autoencoder": {"channels": [8], "latent_channels": 2},
                "decoder": {"channels": 8, "num_res_blocks": 1} if drawing else {"network": None},
                "diffusion": {"channels": [8], "num_res_blocks": 1},
                "text": {"column": "report"} if texts else {},
                "plan": [
                    {"name": "syn", "subjects": 6, "where": {"age": [25, 88]}, "texts": TEXTS if texts else []},
                    {
                        "name": "cf",
                        "subjects": 2,
                        "covariates": "counterfactual",
                        "grid": {"age": [30, 70.5]},
                        "base": {"sex": "F"},
                    },
                ],
                "few_step": {"method": "consistency" if student else None, "num_inference_steps": 2},
                "generate": {
                    "sampler": "consistency" if student else "ddim",
                    "num_inference_steps": 2,
                    "drawing_steps": 2,
                    "batch_size": 4,
                    "shard_size": shard_size,
                },
                "privacy": {"max_attempts": 2, "max_failed_share": 0.5},
                "compute": {"device": "cpu", "precision": "32-true"},
                "release": {
                    "name": "Tiny",
                    "authors": ["A. Author", "B. Author"],
                    "signing_key": str(self.key) if sign else None,
                    "shard_size": limit,
                },
            },
            "test",
        )
        self.make()

    def frozen(self, stage: str) -> Path:
        return config.freeze(self.study, stage, self.results / "config")

    def real(self, step: str, run: Callable[..., None], **arguments: Any) -> None:
        recorded(step, run)(config=self.frozen(step), **arguments)

    def stand_in(self, step: str, write: Callable[[], None], **files: Any) -> None:
        """A step that is too slow for a test: its files are written by `write`, and recorded as if it had run."""
        observer = Observer(step, self.results, {"config": self.frozen(step), **files})
        write()
        observer.finish()

    def make(self) -> None:
        self.make_models()
        root, models = self.results, self.model_files()
        cohort = {"manifest": root / "cohort/manifest.parquet", "qc": root / "preprocessed/qc.parquet"}
        self.real("plan", plan.run, **cohort, out=root / "plan.parquet")
        self.plan = pd.read_parquet(root / "plan.parquet")
        self.shards = sorted(self.plan["shard"].unique())
        for shard in self.shards:
            self.make_shard(int(shard), models)
        self.judge()
        self.write_images()
        self.tables = [root / f"images/shard-{shard:04d}.parquet" for shard in self.shards]
        self.complete()
        self.seal()

    def write_images(self) -> None:
        root = self.results
        for shard in self.shards:
            self.real(
                "images",
                images.run,
                generated=root / f"filtered/shard-{shard:04d}.arrow",
                released=root / "privacy/released.parquet",
                release=self.release,
                out=root / f"images/shard-{shard:04d}.parquet",
                **self.instruments(),
            )

    def model_files(self) -> dict[str, Path]:
        kinds = ("autoencoder", *(("decoder",) if self.study.decoder.network else ()))
        released = self.results / ("few_step" if self.study.student_draws else "diffusion")
        return {kind: self.results / kind for kind in kinds} | {"diffusion": released}

    def make_models(self) -> None:
        root, study = self.results, self.study
        (root / "cohort").mkdir(parents=True)
        draw = np.random.default_rng(3)
        ids = [f"sub-{i:02d}" for i in range(40)]
        scans = pd.DataFrame(
            {
                "scan_id": ids,
                "subject_id": ids,
                "session_id": None,
                "path": "x",
                "sha256": "0",
                "content_sha256": "0",
                "split": "train",
            }
        )
        scans = scans.assign(age=draw.uniform(21, 89, 40).round(1), sex=draw.choice(["F", "M"], 40))
        if self.texts:
            scans["text"] = "Left mass. No effusion."
        if "dark_ml" in study.covariates:
            scans = scans.assign(dark_ml=draw.uniform(1000, 3000, 40).round(1))
        manifest, card = root / "cohort/manifest.parquet", root / "cohort/card.json"

        def write_cohort() -> None:
            write_manifest(scans, manifest)
            write_json(card, {"scans": 40, "subjects": 40, "simulated": False})

        self.stand_in("cohort", write_cohort, out=manifest, card=card)
        shard = root / "preprocessed/shard-0000.arrow"
        found, quality = root / "preprocessed/qc/shard-0000.parquet", root / "preprocessed/qc.parquet"
        checks = pd.DataFrame({"scan_id": ids, "status": ["ok"] * 39 + ["left out"]})

        def write_shard() -> None:
            write_json(shard, {"stands for": "images"})
            found.parent.mkdir()
            checks.to_parquet(found)

        self.stand_in("preprocess", write_shard, manifest=manifest, out=shard, qc=found)
        self.stand_in("quality", lambda: checks.to_parquet(quality), qc=[found], out=quality)
        if self.measured:
            self.make_instruments(manifest, shard)
        torch.manual_seed(1)
        first = build_first_stage(study.autoencoder, study.spatial_dims)
        shape = [1, *study.preprocess.shape]
        latent = [2, *(n // 2 for n in shape[1:])]
        encoding = CovariateEncoding.fit(scans, study.covariates)
        second = Denoiser(study.diffusion, latent, encoding.level_counts, tokens={"text": 8} if self.texts else None)
        with torch.no_grad():  # brighter and rougher than an untrained network, so that images are images
            for parameter in first.parameters():
                parameter.mul_(1.7)
            for parameter in second.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))  # its last layer begins at zero
            if self.texts:
                second.text = fit_words(scans["text"].tolist(), ids, 4, 8, 5)
            tone = ToneCurve()
            if self.toned:
                tone.values.copy_(tone.values**0.9)
        files = self.model_files()
        settings = {
            "settings": study.autoencoder.model_dump(mode="json"),
            "image_shape": shape,
            "latent_shape": latent,
            "precision": "32-true",
        }
        self.stand_in(
            "autoencoder",
            lambda: save_model(first, files["autoencoder"], settings),
            manifest=manifest,
            images=[shard],
            out=files["autoencoder"],
        )
        if study.decoder.network:
            decoder = build_decoder(study.decoder, shape)
            with torch.no_grad():
                decoder.deviation.fill_(0.1)
                for parameter in decoder.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            facts = {"settings": study.decoder.model_dump(mode="json"), "precision": "32-true"}
            self.stand_in(
                "decoder",
                lambda: save_image_network(decoder, files["decoder"], shape, facts),
                manifest=manifest,
                images=[shard],
                autoencoder=files["autoencoder"],
                out=files["decoder"],
            )
        described = {
            "settings": study.diffusion.model_dump(mode="json"),
            "latent_shape": latent,
            "variants": 0,
            "encoding": encoding.to_json(),
            **({"tokens": {"text": 8}, "text": second.text.to_json()} if second.text else {}),
        }
        latents = root / "latents/shard-0000.arrow"
        self.stand_in(
            "latents", lambda: write_json(latents, {}), images=shard, autoencoder=files["autoencoder"], out=latents
        )
        self.stand_in(
            "diffusion",
            lambda: save_model(second, root / "diffusion", described),
            manifest=manifest,
            latents=[latents],
            out=root / "diffusion",
        )
        if study.student_draws:
            distilled = Distilled.of(study.few_step, study.generate).to_json()
            taught = copy.deepcopy(second)
            taught.network.load_state_dict({name: 0.9 * value for name, value in second.network.state_dict().items()})
            self.stand_in(
                "few_step",
                lambda: save_model(taught, files["diffusion"], described | {"few_step": distilled}),
                manifest=manifest,
                latents=[latents],
                diffusion=root / "diffusion",
                out=files["diffusion"],
            )
        self.stand_in(
            "tone",
            lambda: save_tone(tone, files["diffusion"], {"images": 40, "used": True}),
            manifest=manifest,
            images=[shard],
            **files,
            out=files["diffusion"],
        )
        calibration = {
            "status": "CALIBRATED",
            "level": 0.05,
            "subjects": 99,
            "needed": 59,
            "detectors": list(LIMITS),
            "thresholds": LIMITS,
            "groups": {},
        }
        place = root / "privacy/calibration.json"
        self.stand_in(
            "calibrate",
            lambda: write_json(place, calibration),
            images=[shard],
            autoencoder=files["autoencoder"],
            out=place,
        )

    def instruments(self) -> dict[str, Path]:
        if not self.measured:
            return {}
        kinds = ("predictors", *(["segmenter"] if self.study.segmentation else []))
        return {kind: self.results / "instruments" / kind for kind in kinds}

    def make_instruments(self, manifest: Path, shard: Path) -> None:
        """What measures covariates, with weights that were drawn."""
        draw, shape, files = np.random.default_rng(5), self.study.preprocess.shape, self.instruments()
        histograms = LocalHistograms(shape)
        by_name = {}
        for name, covariate in self.study.covariates.items():
            levels = tuple(getattr(covariate, "levels", ()))
            weights = draw.normal(0, 0.1, (histograms.size, 1)).astype(np.float32)
            offset = np.array([50.0 if not levels else 0.0])
            by_name[name] = Predictor(weights, offset, levels, (0, 1)[: len(levels)], 1.0, 40)
        learnt = Predictors(histograms, by_name, {}, 40)
        given: dict[str, Any] = {"manifest": manifest, "images": [shard]}
        self.stand_in(
            "predictors", lambda: save_predictors(learnt, files["predictors"]), **given, out=files["predictors"]
        )
        if self.study.segmentation is not None:
            torch.manual_seed(2)
            settings = self.study.segmentation
            model = new_segmenter(settings, shape, self.study.seed).eval()
            with torch.no_grad():
                for parameter in model.net.final_conv.parameters():
                    parameter.mul_(20)
            facts = {"image_shape": [1, *shape], "structures": list(settings.structures), "channels": settings.channels}
            self.stand_in(
                "segmenter", lambda: save_model(model, files["segmenter"], facts), **given, out=files["segmenter"]
            )

    def make_shard(self, shard: int, models: dict[str, Path]) -> None:
        root = self.results
        out, filtered = root / f"generated/shard-{shard:04d}.arrow", root / f"filtered/shard-{shard:04d}.arrow"
        self.real("generate", generate.run, plan=root / "plan.parquet", shard=shard, out=out, **models)
        redraw(self.plan, 1).to_parquet(root / "again.parquet")
        generate.run(
            config=self.frozen("generate"), plan=root / "again.parquet", shard=shard, out=root / "again.arrow", **models
        )
        decisions = root / f"privacy/decisions/shard-{shard:04d}.parquet"

        def write() -> None:
            first, second = Shards([out]), Shards([root / "again.arrow"])
            columns = {
                "sample_id": pa.string(),
                "attempt": pa.int64(),
                "image": TensorColumn("float16", first.shape("image")),
            }
            rows = []
            with ShardWriter(filtered, columns) as writer:
                for place, name in enumerate(first.column("sample_id")):
                    for attempt, drawn in enumerate((first, second)):
                        bad = name == GIVEN_UP or (name == AGAIN and attempt == 0)
                        rows.append(self.candidate(name, attempt, bad))
                        if not bad:
                            writer.append(sample_id=name, attempt=attempt, image=drawn.tensor("image", place))
                            break
            with atomic_path(decisions) as path:
                pd.DataFrame(rows).to_parquet(path, index=False)

        files = {
            "plan": root / "plan.parquet",
            "generated": out,
            "calibration": root / "privacy/calibration.json",
            **models,
        }
        self.stand_in("filter", write, **files, out=filtered, decisions=decisions, shard=shard)
        for name in ("again.parquet", "again.arrow"):
            (root / name).unlink()

    def candidate(self, name: str, attempt: int, bad: bool) -> dict[str, Any]:
        draw = np.random.default_rng([*name.encode(), attempt])
        similarity = {detector: draw.uniform(0, 1) * limit for detector, limit in LIMITS.items()} | (
            {"learned": 0.93} if bad else {}
        )
        row = redraw(self.plan[self.plan["sample_id"] == name], attempt).iloc[0]
        front = {"sample_id": name, "attempt": attempt, "seed_key": row["seed_key"]}
        front |= {"decision": "rejected" if bad else "accepted", "reason": "learned" if bad else ""}
        nearest = {f"nearest_{detector}": int(draw.integers(40)) for detector in LIMITS}
        return front | {f"similarity_{detector}": value for detector, value in similarity.items()} | nearest

    def judge(self) -> None:
        root = self.results
        report, decisions = root / "privacy/report.json", root / "privacy/decisions.parquet"
        parts = [root / f"privacy/decisions/shard-{shard:04d}.parquet" for shard in self.shards]

        def write() -> None:
            table = pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True)
            table.loc[(table["sample_id"] == DOUBLE) & (table["decision"] == "accepted"), "decision"] = "duplicate"
            with atomic_path(decisions) as path:
                table.to_parquet(path, index=False)
            counts = {
                "planned": len(self.plan),
                "released": int((table["decision"] == "accepted").sum()),
                "duplicates": 1,
                "failed": 1,
                "candidates": len(table),
                "rejected": int((table["decision"] == "rejected").sum()),
            }
            calibration = {
                "status": "CALIBRATED",
                "detectors": list(LIMITS),
                "level": 0.05,
                "subjects": 99,
                "needed": 59,
            }
            gates = [gate.to_json() for gate in passing_gates(self.study, calibration, counts)]
            write_json(report, {"verdict": "PASS", "gates": gates, "counts": counts, "calibration": calibration})

        filtered = [root / f"filtered/shard-{shard:04d}.arrow" for shard in self.shards]
        self.stand_in(
            "privacy",
            write,
            plan=root / "plan.parquet",
            shard_decisions=parts,
            filtered=filtered,
            decisions=decisions,
            out=report,
        )
        self.real(
            "gate",
            gate.run,
            report=report,
            decisions=decisions,
            plan=root / "plan.parquet",
            out=root / "privacy/released.parquet",
        )

    def complete(self) -> None:
        root = self.results
        card, report = root / "cohort/card.json", root / "privacy/report.json"
        out = self.release / "dataset_description.json"
        self.real(
            "describe",
            describe.run,
            released=root / "privacy/released.parquet",
            privacy=report,
            images=self.tables,
            cohort=card.parent,
            qc=root / "preprocessed/qc.parquet",
            **self.model_files(),
            out=out,
        )

    def seal(self) -> dict[str, Any]:
        root = self.results
        self.real(
            "ledger",
            ledger.run,
            plan=root / "plan.parquet",
            decisions=root / "privacy/decisions.parquet",
            privacy=root / "privacy/report.json",
            calibration=root / "privacy/calibration.json",
            images=self.tables,
            description=self.release / "dataset_description.json",
            private=self.private,
            out=self.release / "provenance/root.json",
            **self.model_files(),
        )
        return json.loads((self.release / "provenance/root.json").read_text())
