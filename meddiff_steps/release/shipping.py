"""Models that come with this package, for `meddiff init --from`: made small, with all that has to travel with them."""

from __future__ import annotations

import re
import shutil
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import CHECKSUMS, atomic_path, read_json, write_atomic, write_checksums, write_json
from meddiff_steps.core.folders import BUNDLE, CARD, GIVEN, NETWORK, TONE
from meddiff_steps.models.trained import load_decoder, load_denoiser, load_first_stage
from meddiff_steps.models.weights import save_tensors
from meddiff_steps.release.models import CONFIG, README

#: Bytes that the weights of one set of models may take: they are in every copy of the package.
LARGEST = 25_000_000
#: What says under which terms they may be used; written by people.
LICENCE = "LICENSE"
METADATA = BUNDLE[0]


def shipped_folder() -> Path:
    """Where models lie that come with the package, each in a folder with its name."""
    return Path(str(files("meddiff_steps") / "shipped"))


def shipped() -> list[str]:
    """Their names."""
    folder = shipped_folder()
    return sorted(each.name for each in folder.iterdir() if (each / CHECKSUMS).is_file()) if folder.is_dir() else []


def models_named(name: str) -> Path:
    """The folder of models: of those that come with the package by their name, of any others their folder.

    Raises
    ------
    UserError
        There are no such models.
    """
    for folder in (shipped_folder() / name, Path(name)):
        if any((folder / each / CARD).is_file() for each in GIVEN):
            return folder
    raise UserError(
        f"--from {name}: there are no such models. With this package come: {', '.join(shipped()) or 'none'}; of your"
        " own, name the folder of a model release (model-release/ of a study with release.models)."
    )


def halved(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network with trained weights as float16; what was computed of data stays as it is.

    Raises
    ------
    UserError
        A weight is too large for float16.
    """
    trained = {name for name, _ in network.named_parameters()}
    state = {name: value.half() if name in trained else value for name, value in network.state_dict().items()}
    if any(not bool(torch.isfinite(value).all()) for value in state.values()):
        raise UserError("a weight is above 65504, the largest number of float16; these models cannot be shipped so")
    return state


def ship(release: Path, out: Path) -> int:
    """Write a model release in half precision into `out`, where its licence is already; the bytes of its weights.

    Raises
    ------
    UserError
        There is no licence, the release lacks a file, or its weights are too large.
    """
    copied = (*(f"diffusion/{name}" for name in TONE), CONFIG)
    needed = (f"autoencoder/{CARD}", f"diffusion/{CARD}", *copied, README, METADATA)
    absent = [name for name in needed if not (release / name).is_file()]
    if absent:
        raise UserError(
            f"{release}: {', '.join(absent)} not there. Give the folder of a model release (model-release/) that is a"
            " MONAI bundle, too; its README says why one is none. Models that are drawn by a student (few_step), told"
            " texts (text.column), or of diffusion.zero_terminal_snr cannot be shipped."
        )
    if not (out / LICENCE).is_file():
        raise UserError(f"{out / LICENCE}: not there. Write under which terms these models and their data are, first.")
    names, digests = [LICENCE], {}
    for model in GIVEN:
        place = release / model
        if model == "decoder" and not (place / CARD).is_file():
            continue
        loaders = {"autoencoder": load_first_stage, "decoder": load_decoder, "diffusion": load_denoiser}
        network = loaders[model](place)[0]
        assert isinstance(network, nn.Module)
        card = read_json(place / CARD)
        save_tensors(halved(network), out / model, {**card, "full_precision_sha256": card["weights_sha256"]})
        digests[model] = read_json(out / model / CARD)["weights_sha256"]
        names += [f"{model}/{file}" for file in NETWORK]
    for file in copied:
        with atomic_path(out / file) as path:
            shutil.copyfile(release / file, path)
        names.append(file)
    write_json(out / METADATA, read_json(release / METADATA) | {"weights_sha256": digests})
    write_atomic(out / README, _readme((release / README).read_text(encoding="utf-8")).encode())
    write_checksums(out, [*names, METADATA, README])
    size = sum((out / name).stat().st_size for name in names if name.endswith(".safetensors"))
    if size > LARGEST:
        raise UserError(f"{out}: weights of {size / 1e6:.1f} MB, at most {LARGEST / 1e6:g} are shipped. Train smaller.")
    return size


def _readme(text: str) -> str:
    kept = re.sub(r"## In MONAI\n.*?(?=## |\Z)", "", text, flags=re.DOTALL)
    return (
        f"{kept}\n## As shipped\n\nWeights are float16, computed with as float32. Each card has the digest of the"
        " weights before (`full_precision_sha256`), which is the one that is named above. Terms:"
        f" {LICENCE}.\n"
    )
