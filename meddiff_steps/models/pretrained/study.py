"""The sections of a study that starts from given weights, as YAML for its user to complete."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from meddiff_steps.config.init_from import ARCHITECTURE, OF_CODEBOOK
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CARD
from meddiff_steps.core.registries import claimed_keys
from meddiff_steps.models.pretrained.bundle import Bundle, read_bundle
from meddiff_steps.models.pretrained.convert import is_release

TO_COMPLETE = """\
# To be completed: `covariates`, and which of them each input is. Of a continuous one, `range` has the values that the
# network knows as 0 and 1; of a categorical one, `levels` has the number of each level. Where the bundle does not
# document them, ask its authors: a wrong range makes wrong images.
"""
OF_MAISI = """\
# To be completed: `published.maisi`. `class_label` is the number of your scans' modality (in NV-Generate, of its
# configs/modality_mapping.json; 0 is images of unknown modality, and refused), `spacing_mm` the size of your voxels,
# that of `preprocess.spacing_mm`.
"""
SAMPLING = """\
# Not taken over from the scheduler, for `generate` says how to sample:
# {}
"""
EXPRESSION = """\
# To be completed, where the weights do not hold it: `init_from.scale_factor`, which is {!r} here.
"""
OUR_OWN = """\
# Covariates have to be declared as they were when these models were trained, levels in the same order.
"""


def sections_of(folder: Path) -> str:
    """YAML with `init_from`, the networks that it needs, and what is known of images and licence.

    Raises
    ------
    UserError
        There is neither a bundle nor a model release, or it is of networks that are not known here.
    """
    return _of_release(folder) if is_release(folder) else _of_bundle(folder)


def _of_release(folder: Path) -> str:
    models = [model for model in ARCHITECTURE if (folder / model / CARD).is_file()]
    cards = {model: read_json(folder / model / CARD) for model in models}
    sections: dict[str, Any] = {"init_from": {"path": str(folder), "models": models}}
    if "autoencoder" in cards:
        sections["preprocess"] = {"shape": cards["autoencoder"]["image_shape"][1:]}
    if "diffusion" in cards:
        names = cards["diffusion"]["encoding"]["covariates"]
        sections["covariates"] = {
            each["name"]: {key: each[key] for key in ("unit", "range", "levels") if key in each} for each in names
        }
    for model, card in cards.items():
        settings = {key: card["settings"][key] for key in ARCHITECTURE[model] if key in card["settings"]}
        if settings.get("network") != "published":
            settings.pop("published", None)
        book = settings.pop("codebook", None)
        if settings.get("network") in claimed_keys()["codebook"] and book is not None:
            settings["codebook"] = {key: book[key] for key in OF_CODEBOOK}
        sections[model] = settings | {"optimiser": {"steps": 0}}
    return OUR_OWN + _yaml(sections)


def _of_bundle(folder: Path) -> str:
    bundle = read_bundle(folder)
    models = [model for model in ("autoencoder", "diffusion") if getattr(bundle, model) is not None]
    given: dict[str, Any] = {"path": str(folder), "models": models}
    for model in models:
        if model not in bundle.files:
            given[model] = "PATH OF ITS WEIGHTS"
    given["licence"] = bundle.said.get("license", "LICENCE OF THE WEIGHTS")
    sections: dict[str, Any] = {"init_from": given}
    if bundle.image_shape is not None:
        sections["preprocess"] = {"shape": list(bundle.image_shape)}
    for model in models:
        sections[model] = getattr(bundle, model) | {"optimiser": {"steps": 0}}
    sections["decoder"] = {"network": None}
    if bundle.diffusion is not None:
        flow = bundle.diffusion.get("prediction_type") == "flow"
        sampler = {"sampler": "flow"} if flow else {"sampler": "ddim_even", "num_inference_steps": 50}
        sections["generate"] = sampler | {"guidance_scale": 1.0}
    return "".join(_comments(bundle)) + _yaml(sections)


def _comments(bundle: Bundle) -> Iterator[str]:
    """What is left for the user to say, and what is not taken over."""
    published = bundle.diffusion["published"] if bundle.diffusion is not None else {}
    if published.get("inputs"):
        yield TO_COMPLETE
        if bundle.inputs:
            yield f"# Inputs, by the bundle's words: {', '.join(bundle.inputs)}\n"
    if published.get("maisi"):
        yield OF_MAISI
    if isinstance(bundle.scale_factor, str):
        yield EXPRESSION.format(bundle.scale_factor)
    if bundle.sampling:
        yield SAMPLING.format(", ".join(f"{key}: {json.dumps(value)}" for key, value in bundle.sampling.items()))


def _yaml(content: Any) -> str:
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


class _Dumper(yaml.SafeDumper):
    """Mappings one key a line, lists of numbers and words in one."""


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    plain = all(not isinstance(one, (dict, list)) for one in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=plain)


_Dumper.add_representer(list, _list)
