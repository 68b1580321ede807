"""Trained classifiers on images: a table of probabilities, a row per arm, seed and image."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from monai.networks.nets import ResNet
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.downstream.classifier import PREDICT_BATCH, Reader, build, predict
from meddiff_steps.downstream.design import generators_of, recipe


def load_classifiers(
    weights: Sequence[Path], settings: config.Classifier, image_shape: Sequence[int], classes: int
) -> dict[tuple[str, int], ResNet]:
    """All trained classifiers by recipe and seed, in evaluation mode on the CPU.

    Raises
    ------
    UserError
        A file cannot be read, or its layers are not those of the configured network.
    """
    found: dict[tuple[str, int], ResNet] = {}
    for path in weights:
        try:
            with safe_open(str(path), "pt") as stored:
                states: dict[tuple[str, int], dict] = {}
                for key in stored.keys():  # noqa: SIM118 a file of safetensors is no mapping
                    name, number, layer = key.split("/", 2)
                    states.setdefault((name, int(number)), {})[layer] = stored.get_tensor(key)
            for which, state in states.items():
                model = build(settings, image_shape, classes)
                model.load_state_dict(state)
                found[which] = model.requires_grad_(False).eval()
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{path}: no weights of the configured classifier ({str(error).splitlines()[0]}). Run `downstream`"
                " again."
            ) from None
    return found


def score(
    classifiers: dict[tuple[str, int], ResNet],
    arms: Sequence[config.Arm],
    downstream: config.Downstream,
    facts: pd.DataFrame,
    rows: np.ndarray,
    read: Reader,
    levels: Sequence[str],
    views: int = 1,
) -> pd.DataFrame:
    """Probabilities of every classifier of `arms` for every image, each image read once.

    Parameters
    ----------
    downstream
        Says how many seeds of classifiers and of generators there are.
    facts
        What the table says of each image (image_id, subject_id, level, subgroup, set), in the order of `rows`.
    rows
        What `read` takes.
    views
        Images that `read` gives of each row, one after the other; their probabilities are averaged.

    Returns
    -------
    DataFrame
        arm, generator, seed, the columns of `facts`, and a column `probability_LEVEL` per level; empty without arms or
        images.  An arm without images of a generator has rows of generator 0 alone.
    """
    cells = [
        (arm, generator, number)
        for arm in arms
        for generator in generators_of(arm, downstream)
        for number in range(downstream.seeds)
    ]
    wanted = list(dict.fromkeys((recipe(arm, generator), number) for arm, generator, number in cells))
    probability = np.empty((len(wanted), len(rows), len(levels)))
    for start in tqdm(
        range(0, len(rows) if wanted else 0, max(1, PREDICT_BATCH // views)),
        desc="classifying",
        mininterval=5,
        file=sys.stderr,
    ):
        chosen = rows[start : start + max(1, PREDICT_BATCH // views)]
        images = read(chosen)
        for number, which in enumerate(wanted):
            found = predict(classifiers[which], images.__getitem__, np.arange(len(images)))
            probability[number, start : start + len(chosen)] = found.reshape(len(chosen), views, -1).mean(1)
    parts = []
    for arm, generator, number in cells:
        found = probability[wanted.index((recipe(arm, generator), number))]
        columns = {f"probability_{level}": found[:, i] for i, level in enumerate(levels)}
        parts.append(facts.reset_index(drop=True).assign(arm=arm.name, generator=generator, seed=number, **columns))
    if not parts or not len(rows):
        return pd.DataFrame()
    table = pd.concat(parts, ignore_index=True)
    first = ["arm", "generator", "seed"]
    return table[[*first, *(name for name in table if name not in first)]]
