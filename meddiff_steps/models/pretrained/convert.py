"""Given weights as folders of networks of our own: model.safetensors and card.json, to start trainings from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding, as_declared
from meddiff_steps.config.init_from import ARCHITECTURE, OF_CODEBOOK
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, sha256_file
from meddiff_steps.core.folders import CARD
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.first_stage.base import latent_shape
from meddiff_steps.models.first_stage.kl import Autoencoder
from meddiff_steps.models.pretrained.bundle import Bundle, read_bundle
from meddiff_steps.models.pretrained.checkpoint import read_checkpoint
from meddiff_steps.models.pretrained.names import renamed
from meddiff_steps.models.pretrained.new_level import with_level
from meddiff_steps.models.trained import (
    DenoiserCard,
    load_decoder,
    load_denoiser,
    load_first_stage,
    save_denoiser,
    save_image_network,
)

#: Keys that mean nothing to a network; they need not agree.
UNUSED: Mapping[str, Sequence[str]] = {
    "resnet": (
        "attention_levels",
        "num_head_channels",
        "norm_num_groups",
        "covariate_dim",
        "published",
        "grey_levels",
        "upsampling",
        "codebook",
    ),
    "kl": ("codebook",),
    "unet": ("published",),
    "published": ("num_head_channels", "covariate_dim"),
}
#: Of the process, what a flow ignores.
OF_NOISE_SCHEDULE = ("schedule", "beta_start", "beta_end", "zero_terminal_snr")


@dataclass(frozen=True)
class Sections:
    """What of a study says which networks it has.

    Attributes
    ----------
    image_shape
        Spatial.
    """

    autoencoder: config.Autoencoder
    decoder: config.Decoder
    diffusion: config.Diffusion
    covariates: config.Covariates
    image_shape: tuple[int, ...]

    @classmethod
    def of_study(cls, study: config.Study) -> Self:
        """Of a study; how its networks are trained is left out."""

        def kept(name: str) -> dict[str, Any]:
            section = getattr(study, name)
            values = {key: getattr(section, key) for key in ARCHITECTURE[name]}
            return {
                key: value.model_dump(include=set(OF_CODEBOOK) if key == "codebook" else None)
                if isinstance(value, config.Section)
                else value
                for key, value in values.items()
            }

        rare = study.diffusion.rare
        return cls(
            config.Autoencoder.model_validate(kept("autoencoder")),
            config.Decoder.model_validate(kept("decoder")),
            config.Diffusion.model_validate(kept("diffusion") | ({"rare": rare.model_dump()} if rare else {})),
            study.covariates,
            tuple(study.preprocess.shape),
        )

    def of(self, model: str) -> config.Autoencoder | config.Decoder | config.Diffusion:
        section: config.Autoencoder | config.Decoder | config.Diffusion = getattr(self, model)
        return section


def is_release(path: Path | None) -> bool:
    """Whether a folder holds networks of ours: a model release, or the results of a study."""
    return path is not None and any((path / model / CARD).is_file() for model in ARCHITECTURE)


def convert(base: config.InitFrom, sections: Sections, out: Path) -> dict[str, str]:
    """Write `out`/MODEL/ for every model of `base.models`; the digests of their weights.

    Raises
    ------
    UserError
        The weights are not there, not readable as tensors alone, incomplete, or not those of the study's networks.
    """
    folder = None if base.path is None else Path(base.path)
    if is_release(folder):
        assert folder is not None
        for model in base.models:
            _take_over(folder, model, sections, out)
    else:
        _convert_published(base, sections, out)
    return {model: read_json(out / model / CARD)["weights_sha256"] for model in base.models}


# ------------------------------------------------------------------------------------- models of our own


def _take_over(folder: Path, model: str, sections: Sections, out: Path) -> None:
    """One network of a model release."""
    place = folder / model
    if not (place / CARD).is_file():
        raise UserError(
            f"{place}: there is no {model} among these models. Leave it out of init_from.models, or give another"
            " folder."
        )
    card = read_json(place / CARD)
    shape = sections.image_shape
    if model == "diffusion":
        denoiser, made, _ = load_denoiser(place)
        if made.few_step is not None:
            raise UserError(
                f"{place}: a student of few steps, whose training cannot be continued. Give the folder of its teacher,"
                " diffusion/ of the study's results."
            )
        if made.text is not None:
            raise UserError(
                f"{place}: trained on texts, with an encoder of its own, and no training can go on from that. Leave"
                " diffusion out of init_from.models, or give a model that covariates alone ask."
            )
        _compare(place, sections.diffusion.model_dump(mode="json"), card["settings"], model)
        expected = latent_shape(sections.autoencoder, (1, *shape))
        if made.latent_shape != expected:
            raise UserError(
                f"{place}: trained on latents of shape {list(made.latent_shape)}, those of this study are"
                f" {list(expected)}. Set preprocess.shape to the size it was trained on"
                f" ({[n * sections.autoencoder.downsampling for n in made.latent_shape[1:]]}); its maps of positions"
                " fit no other."
            )
        rare = sections.diffusion.rare
        encoding = as_declared(made.encoding, sections.covariates, rare, f"{place}")
        if rare is not None and encoding.level_counts != made.encoding.level_counts:
            denoiser, made = with_level(denoiser, made, encoding, rare.covariate, rare.like)
        made = replace(made, encoding=encoding)
        save_denoiser(denoiser, made, out / model, {"base": _ingredient(card, place, {})})
        return
    network, _ = load_first_stage(place) if model == "autoencoder" else load_decoder(place)
    settings = sections.of(model).model_dump(mode="json")
    _compare(place, settings, card["settings"], model)
    kept = {"settings": settings, "base": _ingredient(card, place, {})}
    extra = {"latent_shape": list(latent_shape(sections.autoencoder, (1, *shape)))} if model == "autoencoder" else {}
    save_image_network(network, out / model, (1, *shape), kept | extra)


def _ingredient(card: Mapping[str, Any], place: Path, said: Mapping[str, str]) -> dict[str, Any]:
    """What a model release says of one of its networks."""
    bundle = place.parent / "configs" / "metadata.json"
    told = read_json(bundle) if bundle.is_file() else {}
    return {
        "kind": "model release",
        "weights_sha256": card["weights_sha256"],
        "scans": card.get("scans", {}).get("train"),
        **{key: told[key] for key in ("name", "version", "license") if key in told},
        **said,
    }


# ------------------------------------------------------------------------------------- published networks


def _convert_published(base: config.InitFrom, sections: Sections, out: Path) -> None:
    bundle = None if base.path is None else read_bundle(Path(base.path))
    if bundle is not None:
        _check_shape(bundle, sections.image_shape, base.other_shape)
    if "decoder" in base.models:
        raise UserError(
            "init_from.models: decoder: bundles and files hold no drawing decoder of ours; only a model release does."
            " Train it, or set decoder.network: null."
        )
    for model in base.models:
        place = _file(base, bundle, model)
        settings = sections.of(model).model_dump(mode="json")
        if bundle is not None:
            said = getattr(bundle, model)
            if said is None:
                raise UserError(f"{bundle.origin}: it defines no {model}. Leave it out of init_from.models.")
            full = type(sections.of(model)).model_validate(said).model_dump(mode="json")
            _compare(bundle.origin, settings, full, model, given=said)
        checkpoint = read_checkpoint(place)
        facts = {
            "base": {
                "kind": "MONAI bundle" if bundle is not None else "file",
                "file": place.name,
                "file_sha256": sha256_file(place),
                **(bundle.said if bundle is not None else {}),
            }
        }
        if model == "autoencoder":
            _autoencoder(checkpoint.tensors, sections, place, out / model, facts)
        else:
            scale = base.scale_factor or checkpoint.scale_factor or (bundle.scale_factor if bundle else None) or 1.0
            if isinstance(scale, str):
                raise UserError(
                    f"{base.path}: its scale_factor is {scale!r}, which MONAI would evaluate as Python, and"
                    f" {place} holds none. Give the number: init_from.scale_factor."
                )
            include_fc = bundle is None or bundle.include_fc
            _denoiser(checkpoint.tensors, scale, include_fc, sections, place, out / model, facts)


def _file(base: config.InitFrom, bundle: Bundle | None, model: str) -> Path:
    named = getattr(base, model)
    if named is not None:
        return Path(named)
    assert bundle is not None, "a study without files names a path"
    if model not in bundle.files:
        raise UserError(
            f"{bundle.origin}: it does not say, or not clearly, which file holds the weights of {model}. Name it:"
            f" init_from.{model}."
        )
    return bundle.files[model]


def _check_shape(bundle: Bundle, shape: tuple[int, ...], other: bool) -> None:
    if bundle.image_shape is not None and bundle.image_shape != shape and not other:
        raise UserError(
            f"{bundle.origin}: its images have {list(bundle.image_shape)} voxels, preprocess.shape is {list(shape)}."
            f" Set preprocess.shape: {list(bundle.image_shape)}, and the voxel size and orientation that the bundle"
            " documents; or, to train its networks on at another size, init_from.other_shape: true."
        )


def _compare(
    origin: Path,
    study: Mapping[str, Any],
    found: Mapping[str, Any],
    model: str,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a study whose section describes another network; `given`: keys that the source says, by default all."""
    keys = [key for key in ARCHITECTURE[model] if given is None or key in given]
    keys = [key for key in keys if key not in UNUSED.get(str(found.get("network")), ())]
    if found.get("prediction_type") == "flow":
        keys = [key for key in keys if key not in OF_NOISE_SCHEDULE]
    wrong = []
    for key in keys:
        if key == "published":
            wrong += [
                f"published.{name} is {study[key][name]}, expected {value}"
                for name, value in found[key].items()
                if not _alike(name, study[key][name], value)
            ]
        elif key == "codebook" and key in found:
            wrong += [
                f"codebook.{name} is {study[key][name]}, expected {found[key][name]}"
                for name in OF_CODEBOOK
                if study[key][name] != found[key][name]
            ]
        elif key in found and study[key] != found[key]:
            wrong.append(f"{key} is {study[key]}, expected {found[key]}")
    if wrong:
        raise UserError(
            f"{origin}: its {model} is another network than {model} of the study: {'; '.join(wrong)}. Write the"
            f" expected values into the study; `python -m meddiff_steps read_bundle {origin.parent}` shows the whole"
            " section of a bundle."
        )


def _alike(name: str, study: Any, found: Any) -> bool:
    """Whether a key of `published` agrees; what inputs and classes mean is for the study to say."""
    if name == "inputs":
        return len(study) == len(found)
    if name == "told_by":
        return sorted(study) == sorted(found)
    if name == "maisi" and study is not None and found is not None:
        return study["num_class_embeds"] == found["num_class_embeds"] and (study["spacing_mm"] is None) == (
            found["spacing_mm"] is None
        )
    return bool(study == found)


def _autoencoder(
    tensors: Mapping[str, Tensor], sections: Sections, origin: Path, out: Path, facts: Mapping[str, Any]
) -> None:
    settings, shape = sections.autoencoder, sections.image_shape
    network = build_first_stage(settings, len(shape))
    if not isinstance(network, Autoencoder):
        raise UserError(
            f"autoencoder.network: {settings.network} is no network of MONAI, whose weights {origin} holds. Set"
            " autoencoder.network: kl, and what else `python -m meddiff_steps read_bundle` shows."
        )
    network.net.load_state_dict(renamed(tensors, network.net, str(origin)))
    told = {"settings": settings.model_dump(mode="json"), "latent_shape": list(latent_shape(settings, (1, *shape)))}
    save_image_network(network, out, (1, *shape), told | dict(facts))


def _denoiser(
    tensors: Mapping[str, Tensor],
    scale_factor: float,
    include_fc: bool,
    sections: Sections,
    origin: Path,
    out: Path,
    facts: Mapping[str, Any],
) -> None:
    settings = sections.diffusion
    if settings.network != "published":
        raise UserError(
            f"diffusion.network: {settings.network} is no network of MONAI alone, whose weights {origin} holds. Set"
            " diffusion.network: published, and what else `python -m meddiff_steps read_bundle` shows."
        )
    shape = latent_shape(sections.autoencoder, (1, *sections.image_shape))
    made = DenoiserCard(settings, shape, published_encoding(settings, sections.covariates), 0)
    denoiser = made.build()
    network: Any = denoiser.network
    network.unet.load_state_dict(renamed(tensors, network.unet, str(origin), include_fc))
    denoiser.scale = torch.tensor(1.0 / scale_factor)
    save_denoiser(denoiser, made, out, {"scale_factor": scale_factor, **facts})


def published_encoding(settings: config.Diffusion, covariates: config.Covariates) -> CovariateEncoding:
    """Covariates as a published network is told them: 0 and 1 at the ends of a range, levels by their place.

    The ends of a covariate that it is not told are those that the study declares.
    """
    given = {each.covariate: each.range for each in settings.published.inputs if each.range is not None}
    continuous = {name: each for name, each in covariates.items() if isinstance(each, config.ContinuousCovariate)}
    ranges = {name: given.get(name) or each.range for name, each in continuous.items()}
    declared = {name: each.model_copy(update={"column": None}) for name, each in covariates.items()}
    return CovariateEncoding(declared, {}, {}).scaled(ranges)
