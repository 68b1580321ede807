"""Training of a network that draws an image from other images of the same scan, with noise or without."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.compute.device import to_channels_last, to_device
from meddiff_steps.compute.micro_batch import MicroBatch
from meddiff_steps.compute.recompute import kept_for_gradients
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.variants import draw_variant
from meddiff_steps.models.image_to_image import ImageToImage, build, card_of
from meddiff_steps.models.latent_statistics import measure_standardisation
from meddiff_steps.models.slices import Slices
from meddiff_steps.training.loop import batch_rows, clip_gradients, rank_share
from meddiff_steps.training.optimisers import set_up

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Held-out scans that a validation looks at, and training scans that the mean and the spread of targets are taken of.
VALIDATION_SCANS, MEASURED_SCANS = 64, 256

#: With noise: a diffusion.  Without: a regression, of contrasts by their squared error, of masks by cross-entropy and
#: Dice.
Way = Literal["diffusion", "regression"]


class ImageToImageTask:
    """Denoising of targets given sources (Saharia et al. 2022), or, of the same network, regression of targets.

    Where several readers marked a scan, each look at it has the marks of one of them, at random: what is learnt is how
    readers mark.  Where sources may be missing, each look leaves some out, evenly over what may be left
    (`Pairs.patterns`); all targets that a scan has are learnt, also those that are given.

    Parameters
    ----------
    settings, variants
        The study's section, and `variants`: mirrored and shifted scans; grey values stay, masks have none.
    pairs
        Of the cohort.
    train_rows, val_rows
        Rows of `pairs.shards`.
    root
        The study's seed, and what the network is for.
    labelled
        Rows whose targets it may learn from; all training rows where there are none.  Given, what is trained is a
        network that takes the sources in place of a state (`ImageToImage`, marks).
    base
        A network whose weights it starts from (`ImageToImage.start`): of one that marks, the diffusion of sources.
    slices
        As of `ImageToImage`.
    mean
        A trained regression of the same pairs, and its card: a diffusion learns what targets have beyond it.
    """

    def __init__(
        self,
        way: Way,
        settings: config.ImageToImage,
        variants: config.Variants,
        pairs: Pairs,
        train_rows: Sequence[int] | np.ndarray,
        val_rows: Sequence[int] | np.ndarray,
        root: str,
        fabric: Fabric,
        labelled: np.ndarray | None = None,
        base: ImageToImage | None = None,
        slices: Slices | None = None,
        mean: tuple[ImageToImage, Mapping[str, Any]] | None = None,
    ) -> None:
        self.way, self.settings, self.pairs, self.fabric = way, settings, pairs, fabric
        self.variants = variants.model_copy(update={"max_contrast": 0.0})
        self.micro, self.root = MicroBatch(fabric), root
        self.train_rows, self.val_rows = np.asarray(train_rows), np.asarray(val_rows)[:VALIDATION_SCANS]
        shape = pairs.shards.shape("image")[1:]
        torch.manual_seed(int(step_generator(root, "weights", 0).integers(2**31)))
        network, card = mean or (None, None)
        more: dict[str, Any] = {"missing": pairs.missing, "slices": slices, "mean": card}
        self.card = card_of(settings, shape, len(pairs.source), pairs.channels, **more)
        drawn = pairs
        if labelled is not None:
            drawn = pairs.of_sources()
            self.card |= {"sources": 0, "targets": drawn.channels, "marks": pairs.channels}
        self.model = model = build(self.card)
        if model.mean is not None and network is not None:
            model.mean.load_state_dict(network.state_dict())
            self._measure_spread()
        else:
            self._standardise(drawn)
        if labelled is not None:
            self.train_rows = labelled
        if base is not None:
            model.start(base, "segmentation_ensemble")
        to_channels_last(model, len(shape))
        average = copy.deepcopy(model).requires_grad_(False).eval()
        self.net, self.optimisers = set_up(model, settings.optimiser, fabric)
        self.modules: dict[str, nn.Module] = {"model": model, "average": fabric.to_device(average)}
        #: What `compilation.speed_up` may compile.
        self.costly = list(model.costly)

    def _standardise(self, pairs: Pairs) -> None:
        """Mean of what is drawn at every place, and one spread about it, as the network keeps them; the mean of all
        places where it is not told which is which.
        """

        def blocks() -> Iterator[np.ndarray]:
            for row in self._measured_rows():
                truths = pairs.truths([row])
                each = np.swapaxes(truths, 0, 1) if pairs.readers > 1 else truths
                yield self.model.in_blocks(torch.from_numpy(pairs.encoded(each))).mean(0).numpy()

        found = measure_standardisation(blocks())
        mean, square = found.offset, float(found.scale) ** 2
        if not self.settings.coordinates:
            mean = np.broadcast_to(mean.mean(axis=tuple(range(2, mean.ndim)), keepdims=True), mean.shape)
            square += float(np.square(found.offset - mean).mean())  # spread is about the mean that is kept
        self.model.offset.copy_(torch.from_numpy(mean.copy()))
        self.model.scale.fill_(square**0.5)

    @torch.no_grad()
    def _measure_spread(self) -> None:
        """The spread of targets about the guess of `mean`, as the network keeps it: root mean square over voxels, which
        is that over blocks.
        """
        self.fabric.to_device(self.model)
        mean = self.model.mean
        assert mean is not None
        total, count = 0.0, 0
        for row in self._measured_rows():
            drawn = self._batch(np.array([row]), step_generator(self.root, "spread", int(row)), varied=False)
            sources, targets, weights = (to_device(drawn[i], self.fabric) for i in (0, 1, 4))
            known = weights > 0
            with self.fabric.autocast():
                errors = (mean.guess(sources) - targets).square().flatten(2).mean(2)
            total, count = total + float((errors * known).sum()), count + int(known.sum())
        self.model.scale.fill_(max(1e-6, (total / max(1, count)) ** 0.5))

    def _measured_rows(self) -> np.ndarray:
        return self.train_rows[:: max(1, len(self.train_rows) // MEASURED_SCANS)][:MEASURED_SCANS]

    def _batch(self, rows: np.ndarray, generator: np.random.Generator, *, varied: bool) -> tuple[np.ndarray, ...]:
        """Sources (b, s, *spatial), targets (b, c, *spatial), noise (b, ., *blocks), timesteps (b,), and weights of
        targets (b, c), 0 of those that are not there and of mean 1, of rows; varied, of a patch of each where the study
        trains on patches, and the blocks (b, d) where these begin.
        """
        truths = self.pairs.truths(rows)
        reader = generator.integers(self.pairs.readers, size=len(rows))
        if self.pairs.readers > 1:
            truths = truths[np.arange(len(rows)), reader][:, None]
        sources, spatial_dims = self.pairs.sources(rows), truths.ndim - 2
        changes = [draw_variant(self.variants, spatial_dims, generator) for _ in rows]
        if varied:
            sources = np.stack([change(image) for change, image in zip(changes, sources, strict=True)])
            truths = np.stack([change(image) for change, image in zip(changes, truths, strict=True)])
        uniform = (generator.permutation(len(rows)) + generator.random(len(rows))) / len(rows)
        levels = self.settings.levels
        timesteps = self.model.process.training_timesteps(uniform, levels.mean, levels.deviation)
        patch, (channels, *grid) = self.settings.patch if varied else None, self.model.blocks_shape
        cut = [n // self.settings.block for n in patch] if patch else grid
        noise = generator.standard_normal((len(rows), channels, *cut), dtype=np.float32)
        given, known = self.pairs.there(rows)
        weights = (known / max(known.mean(), 1 / known.size)).astype(np.float32)
        sources = self.pairs.hidden(sources, self._left(given, known, generator))
        if not patch:
            return sources, self.pairs.encoded(truths), noise, timesteps, weights
        room = [n - size for n, size in zip(grid, cut, strict=True)]
        corners = np.stack([generator.integers(0, most + 1, len(rows)) for most in room], axis=1)
        sources, truths = (cropped(images, corners * self.settings.block, patch) for images in (sources, truths))
        return sources, self.pairs.encoded(truths), noise, timesteps, weights, corners

    def _left(self, given: np.ndarray, known: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Which of the sources that scans have, bool (b, s), are left to the network, so that a known target is not."""
        if not self.pairs.missing:
            return given
        left, patterns = given.copy(), self.pairs.patterns()
        asked = np.stack([self.pairs.asked(one) for one in patterns])
        for i in range(len(given)):
            possible = patterns[~(patterns & ~given[i]).any(1) & (asked & known[i]).any(1)]
            if len(possible):
                left[i] = possible[generator.integers(len(possible))]
        return left

    def train_step(self, step: int) -> dict[str, Tensor]:
        size, fabric = self.settings.optimiser.batch_size, self.fabric
        rows = self.train_rows[batch_rows(self.root, step, size, len(self.train_rows))]
        drawn = self._batch(rows, step_generator(self.root, "batch/0", step), varied=True)
        mine = [to_device(rank_share(one, fabric), fabric) for one in drawn]
        count = len(mine[0])

        @functools.cache
        def whole() -> Tensor | None:
            parts = self.micro.parts(count, size)
            found = self._overlap(self.modules["model"], ([given[part] for given in mine] for part in parts))
            if found is not None:
                found = fabric.all_reduce(found, reduce_op="mean")  # type: ignore[assignment]
            return found

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            in_parts = part.stop - part.start < size
            loss = self._loss(self.net, *(given[part] for given in mine), whole=whole() if in_parts else None)
            return loss, {"train/loss": loss}

        found = self.micro.gradients(self.net, count, losses)
        clip_gradients(self.net, self.settings.optimiser, step, fabric)
        for optimiser in self.optimisers.values():
            optimiser.step()
        return found

    def kept(self) -> int:
        """Bytes that a look at one image more, or patch, keeps for the gradients: what of a training's memory grows
        with the batch.  Weights, their gradients and the optimiser's moments do not.
        """
        drawn = self._batch(np.resize(self.train_rows, 2), step_generator(self.root, "kept", 0), varied=True)
        model, given = self.modules["model"], [to_device(one, self.fabric) for one in drawn]

        def of(images: int) -> int:
            return kept_for_gradients(lambda: self._loss(model, *(each[:images] for each in given)))

        with self.fabric.autocast():
            return of(2) - of(1)

    def _loss(
        self,
        net: nn.Module,
        sources: Tensor,
        targets: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        weights: Tensor,
        corners: Tensor | None = None,
        *,
        whole: Tensor | None = None,
    ) -> Tensor:
        """Of a batch as of `_batch`, or of a part of one whose overlap is `whole`."""
        model = self.model
        with self.fabric.autocast():
            told = model.told(sources, corners)
        if self.way == "regression":
            guess = net(told, corners=corners)
            if self.pairs.kind == "contrast":
                return self._mean((guess - targets).square(), weights)
            shares = (targets + 1.0) / 2.0
            if self.pairs.kind == "mask":
                entropy = functional.binary_cross_entropy_with_logits(guess, shares)
            else:
                entropy = functional.cross_entropy(guess, shares.argmax(1))
            return entropy + dice_loss(overlap(guess, shares), whole)
        clean = model.standardisation_of(told, corners)(model.in_blocks(targets))
        noisy = model.process.add_noise(clean, noise, timesteps)
        error = net(told, noisy, timesteps, corners) - model.process.target(clean, noise, timesteps)
        # In units of what the network gives: every level weighs the same at the start (Karras et al. 2022, table 1)
        error = error / model.gain(timesteps, error.ndim)
        return self._mean((model.in_voxels(error) if self.pairs.missing else error).square(), weights)

    @torch.no_grad()
    def _overlap(self, net: nn.Module, parts: Iterable[Sequence[Tensor]]) -> Tensor | None:
        """`overlap` over all parts of a batch, each as of `_batch`, which Dice of a part needs; None of all else."""
        if self.way != "regression" or self.pairs.kind == "contrast":
            return None
        found, count = torch.zeros((), device=self.fabric.device), 0
        for sources, targets, _, _, _, *corners in parts:
            with self.fabric.autocast():
                guess = net(self.model.told(sources, *corners), None, None, *corners)
            found, count = found + len(guess) * overlap(guess, (targets + 1.0) / 2.0), count + len(guess)
        return found / count

    def _mean(self, errors: Tensor, weights: Tensor) -> Tensor:
        """Of errors (b, c, *spatial); where targets may be missing, with the weights (b, c) of the whole batch, so that
        its parts add up.
        """
        return (errors.flatten(2).mean(2) * weights).mean() if self.pairs.missing else errors.mean()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the averaged weights on held-out scans as they are, always with the same noise."""
        losses, size, patch, batch_size = [], 16, self.settings.patch, self.settings.optimiser.batch_size
        share = math.prod(patch) / math.prod(self.model.image_shape[1:]) if patch else 1.0
        for start in range(0, len(self.val_rows), size):
            rows = self.val_rows[start : start + size]
            drawn = self._batch(rows, step_generator(self.root, "validation", start), varied=False)
            parts, average = self.micro.parts(len(rows), batch_size, share), self.modules["average"]

            def given(part: slice, drawn: tuple[np.ndarray, ...] = drawn) -> list[Tensor]:
                return [to_device(one[part], self.fabric) for one in drawn]

            whole = self._overlap(average, map(given, parts)) if len(parts) > 1 else None
            for part in parts:
                with self.fabric.autocast():
                    loss = self._loss(average, *given(part), whole=whole)
                losses.append((float(loss), part.stop - part.start))
        return {"val/loss": sum(loss * n for loss, n in losses) / len(self.val_rows)} if losses else {}


def overlap(logits: Tensor, shares: Tensor) -> Tensor:
    """Of logits and what is marked, 0 or 1, (b, c, *spatial) each: twice what both have in common, and the sum of both,
    in voxels, means over images; (2, c).  One channel is a mask, several exclude each other.
    """
    found = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
    axes = (0, *range(2, logits.ndim))
    return torch.stack([2.0 * (found * shares).sum(axes), (found + shares).sum(axes)]) / len(logits)


def dice_loss(found: Tensor, whole: Tensor | None = None) -> Tensor:
    """1 - Dice over a batch (Milletari et al. 2016), mean over channels, of its `overlap`.

    Dice is no mean over images.  Given that of the `whole` batch, the loss is that of the batch, and its gradients by
    the overlaps of parts have that of the batch as their mean.
    """
    common, both = found if whole is None else whole + found - found.detach()
    return 1.0 - ((common + 1e-5) / (both + 1e-5)).mean()


def cropped(images: np.ndarray, corners: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Of each of (n, c, *spatial) the part of a shape that begins at its corner (n, d), in voxels."""
    return np.stack(
        [
            image[(slice(None), *(slice(first, first + size) for first, size in zip(corner, shape, strict=True)))]
            for image, corner in zip(images, corners, strict=True)
        ]
    )
