"""From planned subjects to images: noise by key, sampling and decoding in fixed, padded batches."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from meddiff_steps.compute.device import to_device
from meddiff_steps.config import Generate
from meddiff_steps.core.random_streams import batch_noise, seed_key
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.masks import MaskModel
from meddiff_steps.models.trained import TrainedModel

#: Who a subject is to the random streams: cohort_root, index, attempt.
Subject = tuple[str, int, int]
#: sample_id, image (1, *spatial), and the label map that it was drawn from (*spatial), if there is one.
Pair = tuple[str, np.ndarray, np.ndarray | None]


def batch_slots(index: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of rows, int (size,) each: row i stands at place `index[i]` modulo `size`, and a free place holds some
    row again.

    Consecutive indices fill every batch but the last.

    >>> [batch.tolist() for batch in batch_slots(np.array([2, 3, 4, 6]), 4)]
    [[2, 0, 0, 1], [3, 3, 3, 3]]
    """
    place = index % size
    turn = pd.Series(place).groupby(place).cumcount().to_numpy()
    for number in range(turn.max() + 1 if len(turn) else 0):
        rows = np.flatnonzero(turn == number)
        batch = np.full(size, rows[0])
        batch[place[rows]] = rows
        yield batch


class CohortGenerator:
    """Draws subjects from a trained model.

    A batch always has `settings.batch_size` rows, and a subject always the same slot among them, because both change
    the last bits of results; what stands in the other slots does not, so that free ones are filled with repeats.

    Parameters
    ----------
    model
        Trained, on its device.
    settings
        The study's `generate` section.
    masks
        The model of label maps, where images are drawn from such.
    """

    def __init__(self, model: TrainedModel, settings: Generate, masks: MaskModel | None = None) -> None:
        self.model, self.settings, self.masks = model, settings, masks
        device = model.fabric.device
        self.transfers = torch.cuda.Stream(device) if device.type == "cuda" else None
        #: Batches that are begun before the images of an earlier one are handed out: a GPU works on its own meanwhile.
        self.ahead = 0 if self.transfers is None else 1

    def images(self, subjects: pd.DataFrame, label: str) -> Iterator[tuple[str, np.ndarray]]:
        """(sample_id, image float32 (1, *spatial) in [0, 1]) for every row of a plan, batch by batch
        (`batch_slots`).
        """
        for sample_id, image, _ in self.pairs(subjects, label):
            yield sample_id, image

    def pairs(self, subjects: pd.DataFrame, label: str) -> Iterator[Pair]:
        """As `images`, and the label map that each image was drawn from, uint8 (*spatial); None where there is none."""
        condition = self.model.condition(subjects)
        of_masks = None if self.masks is None else self.masks.condition(subjects)
        roots = zip(subjects["cohort_root"], subjects["noise_index"], subjects["attempt"], strict=True)
        subjects_of = [(str(root), int(index), int(attempt)) for root, index, attempt in roots]
        keys, ids, index = list(subjects["seed_key"]), list(subjects["sample_id"]), subjects["index"].to_numpy()
        begun: deque[tuple[np.ndarray, np.ndarray | None, Callable[[], np.ndarray]]] = deque()
        with tqdm(total=len(ids), desc=label, unit="image", mininterval=5, file=sys.stderr) as bar:

            def finished() -> Iterator[Pair]:
                batch, labels, wait = begun.popleft()
                images = wait()
                for i in np.unique(batch):
                    slot = index[i] % len(batch)
                    yield ids[i], images[slot], None if labels is None else labels[slot]
                    bar.update()

            for batch in batch_slots(index, self.settings.batch_size):
                noise = batch_noise([keys[i] for i in batch], self.model.latent_shape)
                who = [subjects_of[i] for i in batch]
                told, labels = self.with_labels(condition[batch], None if of_masks is None else of_masks[batch], who)
                latents = self.latents(noise, told, who)
                begun.append((batch, labels, self.begin_decoding(latents, who)))
                if len(begun) > self.ahead:
                    yield from finished()
            while begun:
                yield from finished()

    def with_labels(
        self, condition: Condition, of_masks: Condition | None, subjects: Sequence[Subject]
    ) -> tuple[Condition, np.ndarray | None]:
        """The condition with label maps that were drawn for `subjects`, and these, uint8 (b, *spatial).

        A label map has noise of its own, so that it does not depend on what is drawn from it.  `of_masks` is the
        condition as the model of label maps takes it; None where there is no such model.
        """
        masks = self.masks
        if masks is None or of_masks is None:
            return condition, None
        shape = masks.model.latent_shape
        noise = batch_noise([seed_key(*subject, "labels") for subject in subjects], shape)

        def step_noise(step: int) -> Tensor:
            return self._noise(subjects, f"labels/steps/{step}", shape)

        labels = masks.draw(noise, of_masks, self.settings, step_noise)
        return replace(condition, maps=masks.maps(labels)), labels

    @torch.no_grad()
    def latents(self, noise: np.ndarray, condition: Condition, subjects: Sequence[Subject]) -> Tensor:
        """Standardised latents (b, c, *spatial) from noise of that shape, drawn for `subjects`."""

        def step_noise(step: int) -> Tensor:
            return self._noise(subjects, f"steps/{step}", self.model.latent_shape)

        return self.model.sample(noise, condition, self.settings, step_noise=step_noise)

    def decode(self, latents: Tensor, subjects: Sequence[Subject]) -> np.ndarray:
        """Images float32 (b, 1, *spatial), in [0, 1], from standardised latents."""
        return self.begin_decoding(latents, subjects)()

    @torch.no_grad()
    def begin_decoding(self, latents: Tensor, subjects: Sequence[Subject]) -> Callable[[], np.ndarray]:
        """Start what `decode` does, `decode_batch_size` images at a time; the function returned waits for the images.

        A GPU copies images into pinned memory of the host while it decodes the next ones, and without anybody waiting
        for it.
        """
        size = self.settings.decode_batch_size or len(latents)
        host = torch.empty((len(latents), *self.model.image_shape), pin_memory=self.transfers is not None)
        for start in range(0, len(latents), size):
            part = slice(start, start + size)
            noise = self._noise(subjects[part], "decoder", self.model.image_shape) if self.model.draws else None
            steps, slab = self.settings.drawing_steps, self.settings.decode_slab
            self._copy(self.model.decode(latents[part], noise, drawing_steps=steps, slab=slab), host[part])
        if self.transfers is None:
            return host.numpy
        copied = self.transfers.record_event()

        def wait() -> np.ndarray:
            copied.synchronize()
            return host.numpy()

        return wait

    def _noise(self, subjects: Sequence[Subject], stream: str, shape: Sequence[int]) -> Tensor:
        return to_device(batch_noise([seed_key(*subject, stream) for subject in subjects], shape), self.model.fabric)

    def _copy(self, images: Tensor, target: Tensor) -> None:
        """Copy images to the host; from a GPU beside what it computes next, so that `target` is complete only later."""
        if self.transfers is None:
            target.copy_(images)
            return
        self.transfers.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(self.transfers):
            target.copy_(images, non_blocking=True)
        images.record_stream(self.transfers)  # its memory may be used again only when the copy is done
