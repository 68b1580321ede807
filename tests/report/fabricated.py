"""A tiny fabricated study of balls with a known volume: all inputs of the steps `evaluate` and `report`."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from meddiff_steps.cohort.manifest import write_manifest
from meddiff_steps.config import freeze, parse_study
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.instruments.embedder import Embedder
from meddiff_steps.models.weights import save_model
from meddiff_steps.steps import evaluate, predictors, report

SPLIT_OF = ["train"] * 6 + ["val", "calibration", "test", "test"]


def ball(size: float, sex: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A disc or ball whose number of voxels is about `size`; a bright spot marks one sex."""
    grid = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")
    radius = (size * 3 / 4 / np.pi) ** (1 / 3) if len(shape) == 3 else (size / np.pi) ** 0.5
    distance = np.sqrt(sum(np.square(g + rng.uniform(-0.5, 0.5)) for g in grid))
    image = 0.6 * np.clip(radius + 0.5 - distance, 0, 1) + (0.3 if sex == "M" else 0.0) * (distance < 1.5)
    return np.clip(image + rng.normal(0, 0.02, shape), 0, 1)[None].astype(np.float16)


class Fabricated:
    """All inputs of both steps under one directory; `page` is the report on them."""

    page: str

    def __init__(
        self, root: Path, shape: tuple[int, ...], scans: int = 120, synthetic: int = 40, simulated: bool = True
    ) -> None:
        self.root = root
        rng = np.random.default_rng(7)
        low, high = (150, 900) if len(shape) == 3 else (30, 250)
        columns = {"scan_id": pa.string(), "image": TensorColumn("float16", (1, *shape))}
        study = parse_study(
            {
                "study": "balls",
                "title": "Balls & <discs>",
                "cohort": {"source": "simulated"} if simulated else {"source": "bids", "root": "somewhere"},
                "covariates": {
                    "size": {"unit": "voxel", "range": [0, 2000], "description": "Number of voxels (of a ball)"},
                    "sex": {"levels": ["F", "M"], "description": "Sex"},
                },
                "preprocess": {"shape": list(shape), "spacing_mm": 2.0 if len(shape) == 3 else None},
                "autoencoder": {"stem": "none", "channels": [16, 32]},
                "plan": [
                    {"name": "cohort", "subjects": synthetic},
                    {"name": "sweep", "subjects": 1, "covariates": "counterfactual", "grid": {"size": [low, high]}},
                ],
                "generate": {"batch_size": 8},
                "sampler_study": {
                    "samplers": ["dpmpp", "heun"],
                    "num_inference_steps": [3, 2],
                    "guidance_scales": [1, 2],
                    "images": 20,
                },
                "diffusion": {"channels": [8], "num_res_blocks": 1},
                "decoder": {"channels": 8, "num_res_blocks": 1},
                "compute": {"device": "cpu"},
                "evaluate": {
                    "bootstrap": 100,
                    "realism_bootstrap": 100,
                    "permutations": 100,
                    "ssim_pairs": 20,
                    "max_images": 45,
                    "cutoffs": [0.1],
                    "sanity_images": 16,
                },
            },
            "test",
        )
        self.stage = {name: freeze(study, name, root) for name in ("predictors", "evaluate", "report", "sampler_study")}
        self.study = study
        table = pd.DataFrame(
            {
                "scan_id": [f"sub-{i:03d}_T1w" for i in range(scans)],
                "subject_id": [f"sub-{i:03d}" for i in range(scans)],
            }
        )
        table["session_id"], table["path"], table["sha256"], table["content_sha256"] = (
            None,
            "x.nii.gz",
            "0" * 64,
            "0" * 64,
        )
        table["split"] = [SPLIT_OF[i % 10] for i in range(scans)]
        table["size"], table["sex"] = rng.uniform(low, high, scans), np.where(rng.random(scans) < 0.5, "F", "M")
        self.pictures = [
            ball(r.size, r.sex, shape, rng)
            for r in table[["size", "sex"]].itertuples(index=False, name="Row")
            if not callable(r.size)
        ]
        table.loc[[3, 14], "size"], table.loc[5, "sex"] = np.nan, None
        for name in ("cohort", "autoencoder", "decoder", "diffusion", "evaluation"):
            (root / name).mkdir()
        write_manifest(table, root / "cohort/manifest.parquet")
        self.shards = [root / f"shard-{k}.arrow" for k in range(2)]
        for k, path in enumerate(self.shards):
            with ShardWriter(path, columns) as shard:
                for i in range(k, scans, 2):
                    shard.append(scan_id=table["scan_id"][i], image=self.pictures[i])
        plan = pd.DataFrame(
            {
                "sample_id": [f"cohort{i:03d}" for i in range(synthetic)] + ["sweep0", "sweep1"],
                "group": ["cohort"] * synthetic + ["sweep"] * 2,
            }
        )
        plan["index"], plan["attempt"], plan["cohort_root"], plan["shard"] = range(len(plan)), 0, "s/cohort", 0
        plan["noise_index"] = plan["index"]
        plan["seed_key"] = [f"{i:032x}" for i in range(synthetic)] + ["f" * 32] * 2
        plan["size"], plan["sex"] = rng.uniform(low, high, len(plan)), np.where(rng.random(len(plan)) < 0.5, "F", "M")
        made = [ball(s, x, shape, rng) for s, x in zip(plan["size"], plan["sex"], strict=True)]
        plan.loc[1, "size"] = np.nan
        plan.to_parquet(root / "plan.parquet", index=False)
        with ShardWriter(root / "generated.arrow", {"sample_id": pa.string(), "image": columns["image"]}) as shard:
            for name, image in zip(plan["sample_id"], made, strict=True):
                shard.append(sample_id=name, image=image)
        held = table[table["split"].isin(["val", "test"])]
        with ShardWriter(
            root / "autoencoder/reconstructions.arrow",
            {**columns, "split": pa.string(), "reconstruction": columns["image"]},
        ) as shard:
            for i, row in held.iterrows():
                image = self.pictures[int(i)]  # type: ignore[call-overload]
                shard.append(
                    scan_id=row["scan_id"],
                    split=row["split"],
                    image=image,
                    reconstruction=np.clip(image + np.float16(0.1), 0, 2),
                )
        kinds = {
            "panel": pa.string(),
            "row": pa.int64(),
            "position": pa.int64(),
            "label": pa.string(),
            "image": columns["image"],
        }
        with ShardWriter(root / "evaluation/showcase.arrow", kinds) as shard:
            for panel in ("sweep:size", "sweep:sex", "interpolation"):
                for position in range(3):
                    shard.append(panel=panel, row=0, position=position, label=f"{position}", image=made[position])
        torch.manual_seed(0)
        save_model(Embedder(shape), root / "embedder", {"image_shape": [1, *shape]})
        # As if the decoder drew what the autoencoder makes.
        shutil.copy(root / "autoencoder/reconstructions.arrow", root / "decoder")
        for name in ("autoencoder", "decoder", "diffusion"):
            (root / name / "card.json").write_text(
                json.dumps({"digest": "ab" * 32, "psnr": {"value": 30.0, "low": 29.0, "high": 31.0, "n": 9}})
            )
            pd.DataFrame({"step": [0, 10], "metric": ["train/loss", "val/loss"], "value": [1.0, 0.5]}).to_parquet(
                root / name / "history.parquet", index=False
            )
        (root / "cohort/card.json").write_text(json.dumps({"simulated": simulated, "scans": scans}))
        qc = pd.DataFrame(
            {"scan_id": table["scan_id"], "status": "ok", "reason": None, "shape": "[4, 4]", "cut_off_share": 0.01}
        )
        qc.to_parquet(root / "qc.parquet", index=False)

    def learn(self, tag: str = "", **changes: Any) -> None:
        """Predictors of the covariates."""
        options = {"manifest": self.root / "cohort/manifest.parquet", "images": self.shards} | changes
        predictors.run(config=self.stage["predictors"], out=self.root / f"predictors{tag}", **options)

    def evaluate(self, tag: str = "", **changes: Any) -> dict[str, Any]:
        r = self.root
        options: dict[str, Any] = {
            "config": self.stage["evaluate"],
            "manifest": r / "cohort/manifest.parquet",
            "images": self.shards,
            "generated": [r / "generated.arrow"],
            "plan": r / "plan.parquet",
            "reconstructions": r / "autoencoder/reconstructions.arrow",
            "embedder": r / "embedder",
            "predictors": r / "predictors",
            "out": r / f"evaluation{tag}",
        }
        if not (r / "predictors").exists():
            self.learn()
        evaluate.run(**options | changes)
        return self.metrics(tag)

    def metrics(self, tag: str = "") -> dict[str, Any]:
        return json.loads((self.root / f"evaluation{tag}/metrics.json").read_text())

    def report(self, tag: str = "", **changes: Any) -> str:
        r = self.root
        options: dict[str, Any] = {
            "config": self.stage["report"],
            "cohort": r / "cohort",
            "qc": r / "qc.parquet",
            "images": self.shards,
            "generated": [r / "generated.arrow"],
            "plan": r / "plan.parquet",
            "autoencoder": r / "autoencoder",
            "decoder": r / "decoder",
            "diffusion": r / "diffusion",
            "evaluation": r / "evaluation",
            "out": r / f"report{tag}.html",
            "contact_sheet": r / f"sheet{tag}.png",
        }
        report.run(**options | changes)
        return (r / f"report{tag}.html").read_text(encoding="utf-8")
