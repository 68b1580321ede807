"""The classifier of the downstream study: a small ResNet, trained the same way in every arm.

Every random number is a function of the study's seed, the classifier's number and the step; classifiers with the same
number start at the same weights in every arm, so that arms are compared pairwise.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from monai.networks.nets import ResNet
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from meddiff_steps import config
from meddiff_steps.compute.device import channels_last, to_channels_last
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.perturbations import augment as perturb
from meddiff_steps.training.loop import batch_rows, learning_rate_scale, update_average

#: Images classified at once.
PREDICT_BATCH = 64

#: Rows to float32 images (rows, channels, *spatial) in [0, 1].
Reader = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Task:
    """One classifier to train.

    Attributes
    ----------
    recipe, number
        Training set and seed.
    arm
        How the training set is used (weighting, classical augmentation, mixup).
    rows, levels
        Training rows and their classes, both (images,).
    """

    recipe: str
    number: int
    arm: config.Arm
    rows: np.ndarray
    levels: np.ndarray


@dataclass(frozen=True)
class Trained:
    """Weights of the step that did best on the validation subjects, and the curve (step, log_loss, auc)."""

    task: Task
    state: dict[str, Tensor]
    curve: pd.DataFrame
    kept_step: int


def build(settings: config.Classifier, image_shape: Sequence[int], classes: int) -> ResNet:
    """The network, (b, channels, *spatial) to logits (b, classes).

    A stride of 2 and no pooling at the entry, since images were reduced already.  MONAI 1.6.1 hands `norm` to the first
    layer only, so all of them keep batch normalisation.
    """
    return ResNet(
        "basic",
        list(settings.blocks),
        list(settings.channels),
        spatial_dims=len(image_shape) - 1,
        n_input_channels=image_shape[0],
        num_classes=classes,
        conv1_t_size=3,
        conv1_t_stride=2,
        no_max_pool=True,
    )


def initial(settings: config.Classifier, image_shape: Sequence[int], classes: int, root: str, number: int) -> ResNet:
    """The network at its first step; the same for classifier `number` of every arm."""
    torch.manual_seed(int(step_generator(root, "augment/weights", number).integers(2**31)))
    return build(settings, image_shape, classes)


def class_weights(levels: np.ndarray, classes: int) -> np.ndarray:
    """Weights per class whose mean over the images is 1, (classes,); a class without images weighs nothing."""
    counts = np.bincount(levels, minlength=classes)
    return np.where(counts > 0, len(levels) / np.maximum(counts, 1) / max(1, (counts > 0).sum()), 0.0)


def draw_batch(task: Task, root: str, step: int, size: int, classes: int) -> np.ndarray:
    """Positions in `task.rows` of one batch, (size,): shuffled epochs, or by class for oversampling."""
    stream = f"{root}/augment/{task.number}"
    if task.arm.balance != "oversample":
        return batch_rows(stream, step, size, len(task.rows))
    chances = class_weights(task.levels, classes)[task.levels]
    return step_generator(stream, "oversample", step).choice(len(task.rows), size=size, p=chances / chances.sum())


def train(
    task: Task,
    model: ResNet,
    settings: config.Classifier,
    classes: int,
    read: Reader,
    validation: tuple[np.ndarray, np.ndarray],
    spacing: Sequence[float] | None,
    mirror: bool,
    root: str,
    device: str,
) -> Trained:
    """Train one classifier for the configured number of steps, whatever the size of its training set.

    The weights that are kept are running averages: those of the step with the smallest log loss on the validation
    subjects, or the last ones where there are none.

    Parameters
    ----------
    model
        Starting point; it is changed.
    validation
        Rows and levels of the val split.
    spacing
        Voxel size in mm along each axis; None of pictures.
    mirror
        Whether `classical` arms mirror images left-right.
    """
    schedule = settings.optimiser
    spatial_dims = model.conv1.weight.ndim - 2
    to_channels_last(model.to(device).train(), spatial_dims)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=settings.weight_decay)
    weights = (
        torch.tensor(class_weights(task.levels, classes), dtype=torch.float32, device=device)
        if task.arm.balance == "weights"
        else None
    )
    curve: list[tuple[int, float, float]] = []
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for step in range(schedule.steps):
        generator = step_generator(f"{root}/augment/{task.number}", "batch", step)
        chosen = draw_batch(task, root, step, schedule.batch_size, classes)
        images = torch.from_numpy(read(task.rows[chosen]))
        if task.arm.classical:
            images = perturb(images, generator, spacing, mirror)
        targets = functional.one_hot(torch.from_numpy(task.levels[chosen]), classes).float()
        if task.arm.mixup:
            share, order = (
                float(generator.beta(task.arm.mixup, task.arm.mixup)),
                torch.from_numpy(generator.permutation(len(images))),
            )
            images, targets = (
                share * images + (1 - share) * images[order],
                share * targets + (1 - share) * targets[order],
            )
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate * learning_rate_scale(step, schedule)
        images = images.to(device).contiguous(memory_format=channels_last(spatial_dims))
        loss = functional.cross_entropy(model(images), targets.to(device), weight=weights)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
        optimiser.step()
        update_average(average, model, schedule.averaging, step)
        done = step + 1
        if done % schedule.validate_every == 0 or done == schedule.steps:
            probability = predict(average, read, validation[0], device)
            log_loss = _log_loss(probability, validation[1])
            curve.append((done, log_loss, macro_auc(validation[1], probability)))
            # Without validation subjects the loss is nan, and every later average replaces the one before.
            if best is None or not log_loss >= best[0]:
                best = (
                    log_loss,
                    done,
                    {
                        name: value.cpu().clone(memory_format=torch.contiguous_format)
                        for name, value in average.state_dict().items()
                    },
                )
    assert best is not None
    return Trained(task, best[2], pd.DataFrame(curve, columns=["step", "log_loss", "auc"]), best[1])


def train_all(
    tasks: Sequence[Task],
    settings: config.Classifier,
    image_shape: Sequence[int],
    classes: int,
    read: Reader,
    validation: tuple[np.ndarray, np.ndarray],
    spacing: Sequence[float] | None,
    mirror: bool,
    root: str,
    device: str,
    workers: int,
) -> list[Trained]:
    """Train all of `tasks`, `workers` at a time with one thread each: the number of workers changes no bit of the
    result.
    """
    torch.set_num_threads(1)
    workers = workers if device == "cpu" else 1

    def run(task: Task, model: ResNet) -> Trained:
        return train(task, model, settings, classes, read, validation, spacing, mirror, root, device)

    done: list[Trained] = []
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(tasks), desc="classifiers", unit="classifier", mininterval=5, file=sys.stderr) as progress,
    ):
        for start in range(0, len(tasks), workers):
            # Weights are drawn from torch's global generator, so never in two threads at once.
            batch = [
                (task, initial(settings, image_shape, classes, root, task.number))
                for task in tasks[start : start + workers]
            ]
            for result in pool.map(lambda pair: run(*pair), batch):
                done.append(result)
                progress.update()
    return done


@torch.no_grad()
def predict(model: nn.Module, read: Reader, rows: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Probabilities of every class, float64 (rows, classes)."""
    model.eval()
    parts = [
        functional.softmax(model(torch.from_numpy(read(rows[i : i + PREDICT_BATCH])).to(device)).double(), 1)
        .cpu()
        .numpy()
        for i in range(0, len(rows), PREDICT_BATCH)
    ]
    return np.concatenate(parts) if parts else np.empty((0, 0))


def _log_loss(probability: np.ndarray, levels: np.ndarray) -> float:
    return (
        float(-np.log(np.maximum(probability[np.arange(len(levels)), levels], 1e-12)).mean())
        if len(levels)
        else math.nan
    )


def macro_auc(levels: np.ndarray, probability: np.ndarray) -> float:
    """AUC of the last class of two, or the mean of one-versus-rest AUCs of more; nan where a class is missing."""
    classes = probability.shape[1]
    if len(np.unique(levels)) < max(2, classes):
        return math.nan
    return float(
        roc_auc_score(levels, probability[:, 1])
        if classes == 2
        else roc_auc_score(levels, probability, multi_class="ovr", labels=range(classes))
    )
