"""Training of the learned copy detector.

Contrastive learning without labels (SimCLR: Chen et al. 2020), trained on the train split only, as Dar et al. 2025 do to
find copies.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from monai.losses import ContrastiveLoss
from tqdm import tqdm

from meddiff_steps import config
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.embedder import Embedder
from meddiff_steps.privacy.perturbations import augment
from meddiff_steps.training.loop import batch_rows, learning_rate_scale, step_generator


def train_embedder(settings: config.Embedder, shards: Shards, rows: np.ndarray, root: str) -> tuple[Embedder, list[float]]:
    """Train on `rows`; every batch is two changed copies of the same images (NT-Xent).

    Parameters
    ----------
    shards
        Preprocessed images.
    rows
        Of the train split, at least two.
    root
        The study's seed.

    Returns
    -------
    embedder, losses
        In evaluation mode; the loss of every step.
    """
    torch.manual_seed(int(step_generator(root, "embedder/weights", 0).integers(2**31)))
    schedule = settings.optimiser
    model = Embedder(shards.shape("image")[1:])
    optimiser = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=1e-4)
    criterion = ContrastiveLoss(temperature=settings.temperature)
    size, losses = min(schedule.batch_size, len(rows)), []
    for step in tqdm(range(schedule.steps), desc="embedder", mininterval=5, file=sys.stderr):
        generator = step_generator(root, "embedder/batch", step)
        # Where two epochs meet, an image may be drawn twice; it would be pushed away from itself.
        chosen = np.unique(batch_rows(f"{root}/embedder", step, size, len(rows)))
        images = model.reduce(torch.from_numpy(shards.tensors("image", rows[chosen])))
        for group in optimiser.param_groups:
            group["lr"] = schedule.learning_rate * learning_rate_scale(step, schedule)
        loss = criterion(model.embed(augment(images, generator)), model.embed(augment(images, generator)))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.gradient_clip)
        optimiser.step()
        losses.append(float(loss.detach()))
    return model.requires_grad_(False).eval(), losses
