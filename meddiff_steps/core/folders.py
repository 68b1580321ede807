"""Files that belong together in one folder: a step's option names the folder, a rule and a record know its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

#: A trained network: its weights, and what it is.
NETWORK = WEIGHTS, CARD = ("model.safetensors", "card.json")
#: The grey levels of what a diffusion model generates, fitted after its training and kept beside it.
TONE = ("tone.safetensors", "tone.json")
#: Networks that draw an image from other images: files of weights and cards.
OF_IMAGE_TO_IMAGE = {"diffusion": NETWORK, "regression": ("regression.safetensors", "regression.json")}
IMAGE_TO_IMAGE = (*(file for files in OF_IMAGE_TO_IMAGE.values() for file in files), "history.parquet")
#: What an application writes beside its images: a BIDS derivative.
DERIVATIVE = ("dataset_description.json", "figures.json", "measurements.parquet", "contact-sheet.png")
#: The encoder of texts, and the vectors of the cohort's texts.
TEXT = (*NETWORK, "tokens.arrow")
#: Models as a MONAI bundle.
BUNDLE = ("configs/metadata.json", "configs/inference.json", "models/denoiser.ts", "models/decoder.ts")
#: Networks that can be given (`init_from`), in the order in which they are made.
GIVEN = ("autoencoder", "decoder", "diffusion")
#: Where files of weights and what describes them lie in a MONAI bundle, in a model release, or beside each other.
OF_BASE = (
    *(f"{folder}*.{suffix}" for folder in ("configs/", "") for suffix in ("json", "yaml")),
    *(f"{folder}*.{suffix}" for folder in ("models/", "") for suffix in ("pt", "pth", "safetensors")),
)
#: Below a study's results: its cohort, once it was read.
MANIFEST = "cohort/manifest.parquet"
#: What was done to each scan, and why any was left out.
QUALITY = "preprocessed/qc.parquet"
#: Which scans a person excluded; the user writes it.
DECISIONS = "qc.tsv"
#: The study that made weights, in the folder of a model release or in a study's results.
CONFIGS_OF_BASE = ("config.json", "release/provenance/config.json")
#: The networks of label maps.
MASKS = tuple(f"{name}/{file}" for name in ("autoencoder", "diffusion") for file in NETWORK)
CARDS_OF_MASKS = MASKS[1::2]
#: Options that name a folder, in any step, and the files that are read there.
READ: Mapping[str, tuple[str, ...]] = {
    "simulated": ("participants.tsv",),
    "autoencoder": NETWORK,
    "decoder": NETWORK,
    "diffusion": (*NETWORK, *TONE),
    "few_step": (*NETWORK, *TONE),
    "text": TEXT,
    "masks": MASKS,
    "embedder": NETWORK,
    "predictors": NETWORK,
    "segmenter": NETWORK,
    "base": NETWORK,
}
#: Options of single steps that name a folder, and the files that are read or written there.
OF_STEP: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "autoencoder": {"out": (*NETWORK, "history.parquet", "reconstructions.arrow")},
    "decoder": {"out": (*NETWORK, "history.parquet", "reconstructions.arrow")},
    "diffusion": {"out": (*NETWORK, "history.parquet")},
    "few_step": {"diffusion": NETWORK, "out": (*NETWORK, "history.parquet")},
    "init_weights": {"out": tuple(f"{name}/{file}" for name in GIVEN for file in NETWORK)},
    "tone": {"diffusion": NETWORK, "out": TONE},
    "text": {"out": TEXT},
    "embedder": {"out": NETWORK},
    "predictors": {"out": NETWORK},
    "registration_train": {"out": (*NETWORK, "history.parquet")},
    "shape_completion_train": {"out": (*NETWORK, "history.parquet")},
    "segmenter": {"out": NETWORK},
    "evaluate": {"out": ("metrics.json", "predictions.parquet", "components.parquet")},
    "report": {
        "cohort": ("manifest.parquet", "card.json"),
        "autoencoder": ("card.json", "history.parquet", "reconstructions.arrow"),
        "decoder": ("card.json", "history.parquet", "reconstructions.arrow"),
        "diffusion": ("card.json", "history.parquet"),
        "evaluation": ("metrics.json", "predictions.parquet", "components.parquet", "showcase.arrow"),
        "teacher": ("privacy/report.json", "evaluation/metrics.json"),
        "downstream": ("results.json", "test-opened.json"),
    },
    "describe": {
        "cohort": ("manifest.parquet", "card.json"),
        "autoencoder": ("card.json",),
        "decoder": ("card.json",),
        "masks": CARDS_OF_MASKS,
        "diffusion": ("card.json", "tone.json"),
    },
    "ledger": {
        "autoencoder": ("card.json",),
        "masks": CARDS_OF_MASKS,
        "decoder": ("card.json",),
        "diffusion": ("card.json", "tone.json"),
    },
    **{step: {"out": DERIVATIVE} for step in ("counterfactual", "inpainting", "normative", "reconstruction")},
    "anomaly": {
        "translation": OF_IMAGE_TO_IMAGE["regression"],
        "back": NETWORK,
        "out": DERIVATIVE,
    },
    "shape_completion": {
        "network": NETWORK,
        "out": DERIVATIVE,
    },
    "registration": {
        "score": NETWORK,
        "plain": NETWORK,
        "out": DERIVATIVE,
    },
    "segmentation_model": {"out": IMAGE_TO_IMAGE},
    **{
        step: {"out": (*NETWORK, "history.parquet")}
        for step in ("segmentation_few_labels", "translation_unpaired", "harmonisation_model")
    },
    "harmonisation": {"model": NETWORK, "out": DERIVATIVE},
    "translation_model": {
        "out": IMAGE_TO_IMAGE,
        "lesion": NETWORK,
        "back": NETWORK,
        "volume": NETWORK,
        "solid": NETWORK,
    },
    **{
        step: {
            "model": IMAGE_TO_IMAGE[:-1],
            "lesion": NETWORK,
            "volume": NETWORK,
            "solid": NETWORK,
            "unpaired": NETWORK,
            "out": DERIVATIVE,
        }
        for step in ("segmentation", "translation")
    },
}


def files_of_base(path: str | None, *files: str | None) -> list[str]:
    """Files of given weights that are read: of a folder, or `path` itself, and `files`."""
    named = [file for file in files if file is not None]
    if path is None or not Path(path).is_dir():
        return [*([path] if path else []), *named]
    folder = Path(path)
    ours = [folder / name / file for name in GIVEN for file in NETWORK if (folder / name / NETWORK[1]).is_file()]
    found = [found for pattern in OF_BASE for found in sorted(folder.glob(pattern))]
    learnt = manifest_of_base(path) if ours else None
    return [*(str(one) for one in (ours or found)), *([str(learnt)] if learnt else []), *named]


def manifest_of_base(path: str | None) -> Path | None:
    """The manifest that given weights learnt from, of the results that they are or lie in; None where there is none."""
    folders = [] if path is None else [Path(path), Path(path).parent]
    return next((found for each in folders if (found := each / MANIFEST).is_file()), None)


def folders_of(step: str) -> dict[str, tuple[str, ...]]:
    """The options of a step that name a folder, and its files."""
    return {**READ, **OF_STEP.get(step, {})}


def files_of(step: str, option: str, path: Path) -> list[Path]:
    """The files that an option of a step stands for: those of its folder, or `path` itself."""
    return [path / name for name in folders_of(step).get(option, ())] or [path]
