"""Files that belong together in one folder: a step's option names the folder, a rule and a record know its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

#: A trained network.
NETWORK = ("model.safetensors", "card.json")
#: The grey levels of what a diffusion model generates, fitted after its training and kept beside it.
TONE = ("tone.safetensors", "tone.json")
#: Options that name a folder, in any step, and the files that are read there.
READ: Mapping[str, tuple[str, ...]] = {
    "simulated": ("participants.tsv",),
    "autoencoder": NETWORK,
    "decoder": NETWORK,
    "diffusion": (*NETWORK, *TONE),
    "few_step": (*NETWORK, *TONE),
    "embedder": NETWORK,
    "segmenter": NETWORK,
}
#: Options of single steps that name a folder, and the files that are read or written there.
OF_STEP: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "autoencoder": {"out": (*NETWORK, "history.parquet", "reconstructions.arrow")},
    "decoder": {"out": (*NETWORK, "history.parquet", "reconstructions.arrow")},
    "diffusion": {"out": (*NETWORK, "history.parquet")},
    "few_step": {"diffusion": NETWORK, "out": (*NETWORK, "history.parquet")},
    "tone": {"diffusion": NETWORK, "out": TONE},
    "embedder": {"out": NETWORK},
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
        "cohort": ("card.json",),
        "autoencoder": ("card.json",),
        "decoder": ("card.json",),
        "diffusion": ("card.json", "tone.json"),
    },
    "ledger": {"autoencoder": ("card.json",), "decoder": ("card.json",), "diffusion": ("card.json", "tone.json")},
    "counterfactual": {
        "out": ("dataset_description.json", "figures.json", "measurements.parquet", "contact-sheet.png")
    },
}


def folders_of(step: str) -> dict[str, tuple[str, ...]]:
    """The options of a step that name a folder, and its files."""
    return {**READ, **OF_STEP.get(step, {})}


def files_of(step: str, option: str, path: Path) -> list[Path]:
    """The files that an option of a step stands for: those of its folder, or `path` itself."""
    return [path / name for name in folders_of(step).get(option, ())] or [path]
