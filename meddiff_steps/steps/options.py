"""Options that several steps take: each is declared once, under the name that rules give the file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Option(help="frozen config of this step's stage; `freeze` writes it")]
Manifest = Annotated[Path, typer.Option(help="cohort/manifest.parquet")]
Images = Annotated[list[Path], typer.Option(help="preprocessed shard; repeat for all of them")]
Quality = Annotated[Path, typer.Option(help="preprocessed/qc.parquet")]
KeptBy = Annotated[
    Path | None,
    typer.Option("--qc", help="preprocessed/qc.parquet: scans that it left out do not count. Without, all do"),
]
Latents = Annotated[list[Path], typer.Option(help="latent shard; repeat for all of them")]
Scale = Annotated[Path, typer.Option(help="latents/scale.safetensors")]
Autoencoder = Annotated[Path, typer.Option(help="folder autoencoder/: model.safetensors and card.json")]
Decoder = Annotated[
    Path | None, typer.Option(help="folder decoder/: model.safetensors and card.json; left out where there is none")
]
Diffusion = Annotated[Path, typer.Option(help="folder diffusion/: model, card.json, and tone of what it generates")]
Masks = Annotated[
    Path | None,
    typer.Option(help="folder masks/: autoencoder/ and diffusion/ of label maps; left out where there are none"),
]
LabelMaps = Annotated[
    list[Path] | None,
    typer.Option(help="shard of the scans' label maps; repeat for all of them. Left out where there are none"),
]
Base = Annotated[
    Path | None, typer.Option(help="folder init/MODEL: given weights to start from; left out where there are none")
]
FewStep = Annotated[
    Path | None, typer.Option(help="folder few_step/, as diffusion/, of a student; left out where there is none")
]
Text = Annotated[
    Path | None, typer.Option(help="folder text/: encoder, card and tokens.arrow; left out where there are no texts")
]
Embedder = Annotated[Path, typer.Option(help="folder of the copy detector: model.safetensors and card.json")]
Predictors = Annotated[Path, typer.Option(help="folder of the predictors of covariates: model.safetensors, card.json")]
Segmenter = Annotated[
    Path | None, typer.Option(help="folder of the segmenter, which measures volumes; left out where there is none")
]
Reference = Annotated[Path, typer.Option(help="privacy/reference.safetensors")]
ReferenceScans = Annotated[
    Path, typer.Option(help="privacy/reference-scans.arrow: the training scans as they are compared")
]
Calibration = Annotated[Path, typer.Option(help="privacy/calibration.json")]
Plan = Annotated[Path, typer.Option(help="plan.parquet")]
Shard = Annotated[int, typer.Option(help="number of the shard")]
Generated = Annotated[list[Path], typer.Option(help="generated shard, before the filter; repeat for all of them")]
ImageTables = Annotated[list[Path], typer.Option(help="table of a shard's released images; repeat for all of them")]
Cohort = Annotated[Path, typer.Option(help="folder cohort/: manifest.parquet and card.json")]
Filtered = Annotated[list[Path], typer.Option(help="shard of accepted images; repeat for all of them")]
Decisions = Annotated[Path, typer.Option(help="privacy/decisions.parquet")]
Released = Annotated[Path, typer.Option(help="privacy/released.parquet")]
Privacy = Annotated[Path, typer.Option(help="privacy/report.json")]
Metrics = Annotated[Path, typer.Option(help="evaluation/metrics.json")]
Root = Annotated[Path, typer.Option(help="release/provenance/root.json")]
Template = Annotated[Path | None, typer.Option(help="The file that preprocess.registration.template names.")]
Exclude = Annotated[Path | None, typer.Option(help="Table of scans that a person excluded (qc.tsv).")]
State = Annotated[Path, typer.Option(help="folder for resumable checkpoints")]
Points = Annotated[Path, typer.Option(help="shapes (.npz): points_mm, missing, ids")]
Threads = Annotated[int, typer.Option(help="CPU threads; changes the last bits of CPU results")]
ThreadsBeside = Annotated[
    int, typer.Option(help="CPU threads; images are made again with as many as drew them, where the release says so")
]
