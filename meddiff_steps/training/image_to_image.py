"""A diffusion that draws an image from images, and the same network without noise: trained and written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from meddiff_steps import config
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import resolve
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path
from meddiff_steps.core.folders import NETWORK, OF_IMAGE_TO_IMAGE
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.models.image_to_image import load_image_to_image
from meddiff_steps.models.slices import Slices
from meddiff_steps.models.weights import ingredient, save_model
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.image_to_image import ImageToImageTask, Way

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Network:
    """What is to be trained.

    Attributes
    ----------
    name
        For its random numbers, its curve and its state.
    way
        With noise or without.
    pairs
        What it learns.
    folder, files
        Where weights and card are written.
    slices, labelled
        As of `ImageToImage`, and of `ImageToImageTask`.
    base
        Folder of a network whose weights it begins with.
    mean
        Folder of the regression whose guess is the mean of what a diffusion draws.
    steps
        Of its training; those of the study when left out.
    facts
        For the card besides.
    """

    name: str
    way: Way
    pairs: Pairs
    folder: Path
    files: tuple[str, str] = NETWORK
    slices: Slices | None = None
    labelled: np.ndarray | None = None
    base: Path | None = None
    mean: Path | None = None
    steps: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.base is None or self.files == NETWORK, "what begins with another has its own folder"


def with_noise_and_without(pairs: Pairs, folder: Path, slices: Slices | None = None) -> list[Network]:
    """The two of an application, with their files in one folder.  Contrasts are drawn about what the one without noise
    says; marks, of which that says logits, about their mean over scans.
    """
    mean = folder if pairs.kind == "contrast" else None
    return [
        Network("regression", "regression", pairs, folder, OF_IMAGE_TO_IMAGE["regression"], slices),
        Network("diffusion", "diffusion", pairs, folder, OF_IMAGE_TO_IMAGE["diffusion"], slices, mean=mean),
    ]


def volume_wise(pairs: Pairs, begun: Path, volume: Path, solid: Path, steps: int, more: int) -> list[Network]:
    """The diffusion in the folder `begun`, of slices and trained for `steps`, with layers across slices that are
    inserted and trained for `more` (Zhu et al. 2023b); and one of volumes that costs as much and learns as long.  All
    draw about what the regression in `begun` says.
    """
    return [
        Network("volume", "diffusion", pairs, volume, slices="joined", base=begun, mean=begun, steps=more),
        Network("solid", "diffusion", pairs, solid, slices="solid", mean=begun, steps=steps + more),
    ]


def rows_to_train_on(rows: Mapping[str, Sequence[int] | np.ndarray], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of train and val scans; `key` is the study's section.

    Raises
    ------
    UserError
        There is nothing to train on.
    """
    if not len(rows["train"]):
        raise UserError(f"{key}: no preprocessed scan is in the train split. Enlarge splits.train.")
    return np.asarray(rows["train"]), np.asarray(rows["val"])


def labelled_subjects(subjects: Iterable[str], count: int | None, root: str, key: str) -> list[str]:
    """The first `count` of an order of subjects that the study's seed decides, so that few are part of more; all for
    None.

    Raises
    ------
    UserError
        There are fewer; `key` is the study's.
    """
    names = sorted(set(subjects))
    if count is not None and count > len(names):
        raise UserError(f"{key}: {count} of {len(names)} training subjects. Take fewer, or enlarge splits.train.")
    order = step_generator(root, "labelled", 0).permutation(len(names))
    return [names[i] for i in order[:count]]


def train(
    networks: Sequence[Network],
    settings: config.ImageToImage,
    variants: config.Variants,
    compute: config.Compute,
    rows: tuple[np.ndarray, np.ndarray],
    root: str,
    fabric: Fabric,
    state: Path,
) -> None:
    """Train networks one after the other and write them, each resuming from its own folder below `state`.

    Parameters
    ----------
    networks
        In the order in which they are trained; the curves of all lie in the folder of the first.
    settings
        Of all of them, so that their trainings cost the same but for `Network.steps`.
    rows
        Of train and val scans.
    root
        The study's seed, and what they are for.
    """
    curves = []
    for network in networks:
        name, pairs, base, said, mean = network.name, network.pairs, None, None, None
        fabric.barrier()  # the first process may just write what this one begins with
        if network.base is not None:
            base, said = load_image_to_image(network.base, *NETWORK)
        if network.mean is not None:
            mean = load_image_to_image(network.mean, *OF_IMAGE_TO_IMAGE["regression"])
        steps = {} if network.steps is None else {"steps": network.steps}
        optimiser = settings.optimiser.model_copy(update=steps)
        wanted = settings.model_copy(update={"optimiser": optimiser})
        more: dict[str, Any] = {"labelled": network.labelled, "base": base, "slices": network.slices, "mean": mean}
        task = ImageToImageTask(network.way, wanted, variants, pairs, *rows, f"{root}/{name}", fabric, **more)
        kept = task.kept()
        compiled = speed_up(task.costly, compute, fabric, training=True)
        curve = fit(task, optimiser, fabric, state / name, f"{root.rpartition('/')[2]}: {name}")
        curves.append(curve.assign(network=name))
        if not fabric.is_global_zero:
            continue
        validation = curve[curve["metric"] == "val/loss"]["value"]
        facts = {
            **task.card,
            **{"way": network.way, "source": list(pairs.source), "target": list(pairs.target)},
            **{
                "kind": pairs.kind,
                "labels": list(pairs.labels),
                "optimiser": optimiser.model_dump(mode="json"),
            },
            "precision": resolve(compute)[1],
            "scans": {"train": len(task.train_rows), "val": len(rows[1])},
            "kept_for_gradients_bytes": kept,
            **{**ingredient(said), **network.facts},
            "validation_loss": float(validation.iloc[-1]) if len(validation) else None,
            **({"compiled": True} if compiled else {}),
        }
        save_model(task.modules["average"], network.folder, facts, *network.files)
    if fabric.is_global_zero:
        with atomic_path(networks[0].folder / "history.parquet") as path:
            pd.concat(curves, ignore_index=True).to_parquet(path, index=False)
