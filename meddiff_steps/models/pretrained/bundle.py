"""What a MONAI bundle says of its networks, read without running anything of it.

A bundle's configuration may hold Python (`$...`), which MONAI evaluates.  Here it is text: definitions of networks and
schedulers are plain values, references (`@name`) among them are followed, and the names of weight files are looked for
in the texts.  See MONAI's documentation of bundles and ConfigParser for the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from meddiff_steps.core.errors import UserError

#: Configurations of a bundle, the first that is there is read.
CONFIGS = tuple(f"{folder}{name}" for folder in ("configs/", "") for name in ("inference.json", "inference.yaml"))
METADATA = ("configs/metadata.json", "metadata.json")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderKlMaisi")
UNETS = ("DiffusionModelUNet", "DiffusionModelUNetMaisi")
SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "RFlowScheduler")
#: What MONAI takes where a definition says nothing (monai 1.6).
USUAL_AUTOENCODER: dict[str, Any] = {
    "channels": [32, 64, 64, 64],
    "num_res_blocks": 2,
    "attention_levels": [False, False, True, True],
    "latent_channels": 3,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "with_encoder_nonlocal_attn": True,
    "with_decoder_nonlocal_attn": True,
    "use_convtranspose": False,
    "in_channels": 1,
    "out_channels": 1,
}
USUAL_UNET: dict[str, Any] = {
    "channels": [32, 64, 64, 64],
    "num_res_blocks": 2,
    "attention_levels": [False, False, True, True],
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "resblock_updown": False,
    "num_head_channels": 8,
    "with_conditioning": False,
    "transformer_num_layers": 1,
    "cross_attention_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "use_combined_linear": False,
    "include_spacing_input": False,
    "include_top_region_index_input": False,
    "include_bottom_region_index_input": False,
}
USUAL_SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "schedule": "linear_beta",
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "prediction_type": "epsilon",
}
#: Keys of schedulers that say how to sample, or which times are trained on more often, and not what is learnt.
OF_SAMPLING = (
    *("clip_sample", "clip_sample_min", "clip_sample_max", "set_alpha_to_one", "steps_offset", "variance_type"),
    *("skip_prk_steps", "use_discrete_timesteps", "sample_method", "loc", "scale", "spatial_dim"),
    *("use_timestep_transform", "transform_scale", "base_img_size_numel"),
)
#: MONAI's names of schedules, and ours.
SCHEDULES = {"scaled_linear_beta": "scaled_linear", "linear_beta": "linear", "cosine": "cosine"}
_FILE = re.compile(r"[\w.\-]+\.(?:pt|pth|safetensors)\b")


@dataclass(frozen=True)
class Bundle:
    """What a bundle says.

    Attributes
    ----------
    origin
        The configuration that was read.
    autoencoder, diffusion
        The keys of a study's sections that describe the same networks.
    files
        Weight files by model, as far as it is clear which is whose.
    image_shape
        Spatial shape of its images, where it says so.
    inputs
        What the network is told, in order, by the words of the bundle.
    scale_factor
        What latents are multiplied by: a number, or the text of an expression; None where nothing is said.
    include_fc
        Whether the diffusion network has projections after attention, as most have.
    sampling
        What the scheduler says of sampling alone, which no section takes over.
    said
        Name, version, licence and the like, from metadata.json.
    """

    origin: Path
    autoencoder: dict[str, Any] | None
    diffusion: dict[str, Any] | None
    files: dict[str, Path] = field(default_factory=dict)
    image_shape: tuple[int, ...] | None = None
    inputs: tuple[str, ...] = ()
    scale_factor: float | str | None = None
    include_fc: bool = True
    sampling: dict[str, Any] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)


def config_of(path: Path) -> Path | None:
    """The configuration of a bundle's folder, or the file itself; None where a folder has none."""
    if path.is_file():
        return path
    return next((path / name for name in CONFIGS if (path / name).is_file()), None)


def read_bundle(path: Path) -> Bundle:
    """Read a bundle's folder, or a configuration file such as NV-Generate's `config_network_rflow.json`.

    Raises
    ------
    UserError
        There is no configuration, it defines no network that is known, or several; or a network is one that cannot be
        built here.
    """
    origin = config_of(path)
    if origin is None:
        raise UserError(
            f"{path}: no MONAI bundle and no model release. Expected {CONFIGS[0]} or {CONFIGS[1]} (a bundle), or"
            " autoencoder/card.json and diffusion/card.json (a model release)."
        )
    root = origin.parent.parent if origin.parent.name == "configs" else origin.parent
    content = _read(origin)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{origin}: expected a MONAI configuration, which is a mapping; found {type(content).__name__}."
        )
    metadata: Mapping[str, Any] = next((_read(root / name) for name in METADATA if (root / name).is_file()), {})
    first = _definition(content, AUTOENCODERS, ("autoencoder_def", "autoencoder", "network_def"), origin)
    unet = _definition(content, UNETS, ("diffusion_def", "diffusion_unet_def", "diffusion", "unet"), origin)
    if first is None and unet is None:
        targets = sorted({str(entry["_target_"]) for _, entry in _targets(content)})
        raise UserError(
            f"{origin}: no network that is known here; it defines {targets or 'none'}. Known are"
            f" {', '.join((*AUTOENCODERS, *UNETS))}, of MONAI."
        )
    scheduler = _definition(content, SCHEDULERS, ("scheduler", "noise_scheduler"), origin) if unet is not None else None
    inputs, shape = _told(metadata)
    return Bundle(
        origin,
        _autoencoder(first, origin) if first is not None else None,
        _diffusion(unet, scheduler, content, origin) if unet is not None else None,
        _files(content, root),
        shape,
        inputs,
        _scale_factor(content),
        unet is None or unet.get("include_fc", True),
        {key: value for key, value in (scheduler or {}).items() if key in OF_SAMPLING},
        {"name": root.name} | {key: str(metadata[key]) for key in _SAID if metadata.get(key)},
    )


_SAID = ("name", "version", "task", "description", "authors", "copyright", "license", "data_source")


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as JSON or YAML ({error}). Download the bundle again.") from None


def _targets(content: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every definition of an object below, with the name of its key."""
    if isinstance(content, Mapping):
        if isinstance(content.get("_target_"), str):
            yield name, content
        for key, value in content.items():
            yield from _targets(value, str(key))
    elif isinstance(content, list):
        for value in content:
            yield from _targets(value, name)


def _definition(
    content: Mapping[str, Any], classes: Sequence[str], usual: Sequence[str], origin: Path
) -> dict[str, Any] | None:
    """The definition of an object of one of some classes, references followed; by its usual names if there are more."""
    found = {name: entry for name, entry in _targets(content) if entry["_target_"].rpartition(".")[2] in classes}
    if len(found) > 1:
        found = {name: found[name] for name in [name for name in usual if name in found][:1]} or found
    if len(found) > 1:
        raise UserError(
            f"{origin}: {sorted(found)} are all {' or '.join(classes)}, and none is called {' or '.join(usual)}. Write"
            " a configuration with the one that is wanted alone, and name it in init_from.path."
        )
    if not found:
        return None
    ((name, entry),) = found.items()
    return {key: _value(value, content, f"{name}.{key}", origin) for key, value in entry.items() if key != "_requires_"}


def _followed(value: Any, content: Mapping[str, Any], depth: int = 0) -> Any:
    """What a reference leads to; all else as it is."""
    if isinstance(value, str) and value.startswith("@") and depth < 10:
        target: Any = content
        for key in re.split(r"::|#", value[1:]):
            target = target.get(key) if isinstance(target, Mapping) else None
        if target is not None:
            return _followed(target, content, depth + 1)
    return value


def _value(value: Any, content: Mapping[str, Any], where: str, origin: Path, depth: int = 0) -> Any:
    """A plain value; a reference to one is followed, an expression refused."""
    value = _followed(value, content, depth)
    if isinstance(value, list):
        return [_value(one, content, where, origin, depth + 1) for one in value]
    if isinstance(value, str) and value.startswith(("$", "@")):
        raise UserError(
            f"{origin}: {where} is {value!r}, which MONAI would evaluate as Python; nothing of a bundle is run here."
            " Write its value in its place, in a copy of the configuration, and name that in init_from.path."
        )
    return value


def _scalar(value: Any, where: str, origin: Path) -> Any:
    """One number for all levels, where each has its own in the bundle."""
    several = value if isinstance(value, list) else [value]
    if len(set(several)) != 1:
        raise UserError(f"{origin}: {where} is {value}; networks here have one number for all levels.")
    return several[0]


def _refuse(where: str, given: Mapping[str, Any], expected: Mapping[str, Any], origin: Path) -> None:
    wrong = {key: given[key] for key, value in expected.items() if given[key] != value}
    if wrong:
        raise UserError(
            f"{origin}: {where} has {wrong}, which networks here do not have (expected"
            f" { ({key: expected[key] for key in wrong}) }). Its weights cannot be used."
        )


def _autoencoder(given: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    given = USUAL_AUTOENCODER | _channels(given)
    attention = {
        "attention_levels": [False] * len(given["channels"]),
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
    }
    plain = {"norm_eps": 1e-6, "use_convtranspose": False, "in_channels": 1, "out_channels": 1}
    _refuse("the autoencoder", given, attention | plain, origin)
    return {
        "network": "kl",
        "stem": "none",
        "grey_levels": "0..1",
        # MAISI's decoder interpolates linearly: found by comparing outputs, for names and shapes are the same
        "upsampling": "linear" if str(given["_target_"]).endswith("Maisi") else "nearest",
        "channels": given["channels"],
        "num_res_blocks": _scalar(given["num_res_blocks"], "num_res_blocks of the autoencoder", origin),
        "norm_num_groups": given["norm_num_groups"],
        "latent_channels": given["latent_channels"],
    }


def _channels(given: Mapping[str, Any]) -> dict[str, Any]:
    """Under today's name of the key: monai-generative and MAISI call it num_channels."""
    return {("channels" if key == "num_channels" else key): value for key, value in given.items()}


def _diffusion(
    unet: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    content: Mapping[str, Any],
    origin: Path,
) -> dict[str, Any]:
    maisi = str(unet["_target_"]).endswith("Maisi")
    given = USUAL_UNET | _channels(unet)
    regions = {"include_top_region_index_input": False, "include_bottom_region_index_input": False}
    _refuse("the diffusion network", given, {"norm_eps": 1e-6} | regions, origin)
    _refuse("the diffusion network", given, {"use_combined_linear": False}, origin)
    if not maisi:
        _refuse("the diffusion network", given, {"num_class_embeds": None}, origin)
    elif given["with_conditioning"]:
        raise UserError(f"{origin}: this MAISI network is told a context; only those without are known here.")
    concatenated = given["in_channels"] - given["out_channels"]
    attended = given["cross_attention_dim"] if given["with_conditioning"] else 0
    told = [name for name, n in (("concatenation", concatenated), ("cross_attention", attended)) if n]
    if concatenated and attended and concatenated != attended:
        raise UserError(
            f"{origin}: the diffusion network has {concatenated} channels beside the latents and attends to vectors of"
            f" {attended} numbers. Expected the same numbers in both."
        )
    count = concatenated or attended
    heads = given["num_head_channels"]
    depth = len(given["channels"])
    published: dict[str, Any] = {
        "inputs": [{"value": 0.5} for _ in range(count)],
        "told_by": told or ["concatenation", "cross_attention"],
        "head_channels": heads if isinstance(heads, list) else [heads] * depth,
        "resblock_updown": given["resblock_updown"],
        "transformer_num_layers": given["transformer_num_layers"],
        "upcast_attention": given["upcast_attention"],
    }
    if maisi:
        spacing = content.get("spacing")
        plain = isinstance(spacing, list) and all(isinstance(one, (int, float)) for one in spacing)
        published["maisi"] = {
            "num_class_embeds": given["num_class_embeds"] or 0,
            "class_label": 0,
            "spacing_mm": (spacing if plain else [1.0, 1.0, 1.0]) if given["include_spacing_input"] else None,
        }
    return {
        "network": "published",
        "channels": given["channels"],
        "attention_levels": given["attention_levels"],
        "num_res_blocks": _scalar(given["num_res_blocks"], "num_res_blocks of the diffusion network", origin),
        "norm_num_groups": given["norm_num_groups"],
        "published": published,
        **_process(scheduler, content, origin),
    }


def _process(scheduler: Mapping[str, Any] | None, content: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    if scheduler is None:
        found = sorted({str(entry["_target_"]) for _, entry in _targets(content) if "Scheduler" in entry["_target_"]})
        raise UserError(
            f"{origin}: it defines a diffusion network and no scheduler that is known here (found: {found or 'none'};"
            f" known are {', '.join(SCHEDULERS)}, of MONAI), so that nothing says what the network predicts. Ask its"
            " authors, and write it into a copy of the configuration, such as `noise_scheduler: {_target_:"
            " DDPMScheduler, prediction_type: epsilon, schedule: scaled_linear_beta, beta_start: 0.0015, beta_end:"
            " 0.0195}`; name that in init_from.path."
        )
    known = {*USUAL_SCHEDULER, *OF_SAMPLING}
    strange = sorted(key for key in scheduler if key not in known and not key.startswith("_"))
    if strange:
        raise UserError(
            f"{origin}: the scheduler has {strange}, which may change what the network learnt and are not known here;"
            f" known are {', '.join(USUAL_SCHEDULER)}. Write the scheduler by these into a copy of the configuration,"
            " and name that in init_from.path."
        )
    given = USUAL_SCHEDULER | dict(scheduler)
    if str(given["_target_"]).endswith("RFlowScheduler"):
        return {"prediction_type": "flow", "num_train_timesteps": given["num_train_timesteps"]}
    if given["schedule"] not in SCHEDULES or given["prediction_type"] not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{origin}: the scheduler has schedule {given['schedule']} and prediction_type {given['prediction_type']};"
            f" known are {', '.join(SCHEDULES)}, and epsilon or v_prediction."
        )
    return {
        "prediction_type": given["prediction_type"],
        "schedule": SCHEDULES[given["schedule"]],
        "num_train_timesteps": given["num_train_timesteps"],
        "beta_start": given["beta_start"],
        "beta_end": given["beta_end"],
    }


def _files(content: Mapping[str, Any], root: Path) -> dict[str, Path]:
    """Weight files by model: by the names of the keys that they stand under, or as they are usually called."""
    named: dict[str, set[str]] = {"autoencoder": set(), "diffusion": set()}
    for key, value in content.items():
        if not isinstance(value, str):
            continue
        lowered = key.lower()
        if "mask" in lowered or "controlnet" in lowered:
            continue
        kind = "autoencoder" if "autoencoder" in lowered else "diffusion" if "diff" in lowered else None
        if kind is not None:
            named[kind] |= set(_FILE.findall(value))
    found = {}
    for kind, names in named.items():
        places = [root / folder / name for name in sorted(names) for folder in ("models", ".")]
        there = [place for place in places if place.is_file()]
        if len(there) == 1 or (not there and len(names) == 1):
            found[kind] = there[0] if there else places[0]
    return found


def _told(metadata: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """What the network is told, and the shape of its images, as metadata.json says."""
    data = metadata.get("network_data_format", {})
    if not isinstance(data, Mapping):
        return (), None
    inputs: tuple[str, ...] = ()
    for entry in _values(data.get("inputs")):
        channels = entry.get("channel_def")
        if entry.get("type") == "tabular" and isinstance(channels, Mapping):
            inputs = tuple(str(channels[key]) for key in sorted(channels, key=lambda key: int(key)))
    for entry in _values(data.get("outputs")):
        shape = entry.get("spatial_shape")
        if entry.get("type") == "image" and isinstance(shape, list) and all(isinstance(n, int) for n in shape):
            return inputs, tuple(shape)
    return inputs, None


def _scale_factor(content: Mapping[str, Any]) -> float | str | None:
    """That of the inferer for latents, or the one at the top; as text where it is no number."""
    inferers = [entry for _, entry in _targets(content) if entry["_target_"].endswith("LatentDiffusionInferer")]
    given = [each["scale_factor"] for each in (*inferers, content) if each.get("scale_factor") is not None]
    value = _followed(given[0], content) if given else None
    return float(value) if isinstance(value, (int, float)) else None if value is None else str(value)


def _values(content: Any) -> list[Mapping[str, Any]]:
    return [value for value in content.values() if isinstance(value, Mapping)] if isinstance(content, Mapping) else []
