"""Names of keys and stages in earlier versions, and keys that are gone: to tell users, and to read old releases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from meddiff_steps.config.base import Keys

#: The version that brought the names of today.
SINCE = (0, 2)
#: Sections and keys that had other names before it.
RENAMED: dict[Keys, Keys] = {
    ("augmentation",): ("variants",),
    ("augmentation", "variants"): ("variants", "count"),
    ("augment",): ("downstream",),
    ("distill",): ("second_model",),
}
#: Keys that there are no more, and what is in their place.
REMOVED: dict[Keys, str] = {
    ("autoencoder", "linear_path"): "first stages have no linear path any more, which made blocks and noise",
    ("latents", "gaussian_rank"): "covariate effects are always fitted, and no other part of a Gaussian",
    ("diffusion", "component_steps"): "there is no network of components any more",
}


def before_renaming(version: str) -> bool:
    """Whether a version of this package had the old names."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})\b", version)
    return found is not None and (int(found[1]), int(found[2])) < SINCE


def name_today(keys: Keys) -> Keys:
    """What a key is called today."""
    section, *below = keys
    return RENAMED.get(keys, (*RENAMED.get((section,), (section,)), *below))


def old_names(raw: Mapping[str, Any]) -> Iterator[str]:
    """Every old key that is in a study, with its name of today."""
    since = f"(renamed in {SINCE[0]}.{SINCE[1]}.0)"
    for section in raw:
        if (section,) not in RENAMED:
            continue
        below = raw[section]
        for key in below if isinstance(below, Mapping) and below else [None]:
            kind, keys = ("section", (section,)) if key is None else ("key", (section, str(key)))
            yield f"{'.'.join(keys)}: this {kind} is now {'.'.join(name_today(keys))} {since}"
    if isinstance(raw.get("release"), str):
        yield f"release: a sealed release to make again is now given as `--config sealed=FOLDER` {since}"


def keys_gone(raw: Mapping[str, Any]) -> Iterator[str]:
    """Every key in a study that there is no more, with what is in its place."""
    for (section, key), instead in REMOVED.items():
        if isinstance(raw.get(section), Mapping) and key in raw[section]:
            yield f"{section}.{key}: this key is gone: {instead}. Leave it out (removed in {SINCE[0]}.{SINCE[1]}.0)"


def without_gone(content: Mapping[str, Any]) -> dict[str, Any]:
    """A study without keys that are gone."""
    return {section: _without_removed(section, below) for section, below in content.items()}


def translated(content: Mapping[str, Any]) -> dict[str, Any]:
    """A study of an earlier version with the names of today, without keys that are gone; values stay what they are.

    Drawing decoders, which that version did not have, there are none.
    """
    found: dict[str, Any] = {"decoder": {"network": None}}
    for section, below in content.items():
        today = name_today((section,))[0]
        if today == section or today in content:  # of both names, the old one is left to be refused
            found[section] = below
        elif isinstance(below, Mapping):
            found[today] = {name_today((section, key))[-1]: value for key, value in below.items()}
        else:
            found[today] = below
    return without_gone(found)


def _without_removed(section: str, below: Any) -> Any:
    if not isinstance(below, Mapping):
        return below
    return {key: value for key, value in below.items() if (section, key) not in REMOVED}


#: What a release said of itself until then.
_DESCRIBED_0_1 = tuple(
    f"release.{key}"
    for key in "name authors licence suffix skull_stripped acknowledgements url date shard_size card".split()
)
#: What steps could read until then, with all texts of their sections (as `STAGES`).
STAGES_0_1: dict[str, tuple[str, ...]] = {
    "simulate": ("seed", "cohort"),
    "cohort": ("seed", "cohort", "covariates", "splits"),
    "preprocess": ("preprocess",),
    "quality": ("preprocess",),
    "autoencoder": ("seed", "augmentation", "autoencoder", "compute"),
    "latents": ("seed", "augmentation", "latents", "compute"),
    "scale": ("covariates", "latents"),
    "diffusion": ("seed", "covariates", "diffusion", "compute"),
    "embedder": ("seed", "privacy.embedder"),
    "calibrate": ("seed", "privacy.level", "privacy.subgroup"),
    "plan": ("seed", "covariates", "plan", "generate.shard_size"),
    "generate": ("generate", "compute"),
    "filter": ("generate", "compute", "privacy.subgroup", "privacy.max_attempts"),
    "privacy": ("seed", "covariates", "privacy"),
    "gate": ("privacy.enforce",),
    "neighbours": ("study", "title", "cohort", "covariates"),
    "distill": ("seed", "covariates", "distill"),
    "images": ("study", "release.suffix", "release.shard_size", "plan", "preprocess"),
    "release": (
        "study",
        "title",
        "cohort",
        "covariates",
        *_DESCRIBED_0_1,
        "preprocess",
        "generate",
        "distill.subjects",
    ),
    "segmenter": ("seed", "segmentation", "preprocess", "compute"),
    "evaluate": ("seed", "covariates", "plan", "evaluate", "preprocess"),
    "sampler_study": (
        "seed",
        "covariates",
        "plan",
        "generate",
        "evaluate.bootstrap",
        "evaluate.realism_bootstrap",
        "evaluate.permutations",
        "sampler_study",
        "compute",
    ),
    "showcase": ("seed", "covariates", "generate", "evaluate.sweep_steps", "compute"),
    "augment_design": ("seed", "covariates", "plan", "augment"),
    "augment_plan": ("seed", "covariates", "augment"),
    "augment_data": ("seed", "covariates", "augment", "compute"),
    "augment": ("seed", "augment", "compute"),
    "augment_test": ("seed", "covariates", "augment"),
    "report": ("study", "title", "cohort", "covariates", "preprocess"),
    "ledger": (
        "study",
        "title",
        "results",
        "seed",
        "cohort",
        "covariates",
        "splits",
        "preprocess",
        "autoencoder",
        "augmentation",
        "latents",
        "diffusion",
        "plan",
        "generate",
        "privacy",
        "distill",
        "evaluate",
        "segmentation",
        "sampler_study",
        "augment",
        "compute",
        *_DESCRIBED_0_1,
        "release.signing_key",
    ),
    "export": ("study", "release.name", "release.licence"),
    "export_index": ("study", "release.name", "release.licence"),
    "export_models": ("study", "release.name"),
}
