"""Vector quantisation: every cell's latents become the nearest entry of a codebook (van den Oord et al. 2017).

MONAI's EMAQuantizer holds the codebooks and finds the nearest entries.  Its own update is not used: it runs in every
forward pass, so a batch in parts would take several, and it divides entries that a batch does not use by a count near
zero, so that all of these are thrown far away in the first step and never come back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer
from torch import Tensor, nn

from meddiff_steps import config

#: Cells that are compared with a codebook at a time; bounds the memory of their distances.
CELLS = 8192
#: An entry is dead that is used less than this share of what it would be if all were used alike.
DEAD_BELOW = 0.05
#: Steps between two looks for dead entries, and share of a training after which there are none: the averaged weights
#: and the decoder need time to follow.
RESTART_EVERY, RESTART_UNTIL = 20, 0.8
#: Latents that are drawn for one entry to be put in the place of dead ones.
CANDIDATES = 4


class Codebooks(nn.Module):
    """Codebooks for latents of `channels` numbers a cell: one for each of as many parts as the settings say (product
    quantisation, Jégou et al. 2011).

    Entries are running means of the latents nearest to them (van den Oord et al. 2017, appendix A.1), so they belong to
    the state of the module and not to what an optimiser steps.

    Parameters
    ----------
    channels
        Numbers of a cell; a multiple of `settings.parts`.
    settings
        The study's `autoencoder.codebook` section.
    """

    def __init__(self, channels: int, settings: config.Codebook) -> None:
        super().__init__()
        self.entries, self.decay = settings.entries, settings.decay
        width = channels // settings.parts
        # Cells are given as images of one pixel, so one kind serves images of any dimension.
        self.parts = nn.ModuleList(EMAQuantizer(2, settings.entries, width) for _ in range(settings.parts))

    def forward(self, latents: Tensor) -> Tensor:
        """The entries nearest to latents (b, c, *spatial), float32; gradients pass as if nothing had happened (straight
        through; Bengio et al. 2013).
        """
        entries = self.embed(self.codes(latents))
        if not (torch.is_grad_enabled() and latents.requires_grad):
            return entries  # to the bit: what is decoded depends on the codes alone
        latents = latents.float()
        return latents + (entries - latents).detach()

    @torch.no_grad()
    def codes(self, latents: Tensor) -> Tensor:
        """Numbers of the nearest entries, int64 (b, parts, *spatial), of latents (b, c, *spatial)."""
        found = [
            torch.cat([_quantise(part, cells)[2].flatten() for cells in of_part.split(CELLS)])
            for part, of_part in self._by_part(latents)
        ]
        return torch.stack([each.reshape(len(latents), *latents.shape[2:]) for each in found], 1)

    def embed(self, codes: Tensor) -> Tensor:
        """The entries (b, c, *spatial) that have these numbers, int64 (b, parts, *spatial)."""
        found = [part.embedding.weight[codes[:, i]] for i, part in enumerate(self._quantizers())]
        return torch.cat(found, -1).movedim(-1, 1).contiguous()

    def commitment(self, latents: Tensor) -> Tensor:
        """Mean squared distance of latents (b, c, *spatial) from their entries, which stay where they are; a scalar
        (van den Oord et al. 2017, equation 3, third term).
        """
        return nn.functional.mse_loss(latents.float(), self.embed(self.codes(latents)).detach())

    # ---------------------------------------------------------------------------------------------- learning

    @torch.no_grad()
    def follow(self, latents: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Move entries towards the mean of the latents (b, c, *spatial) of one batch that are nearest to them.

        `total` adds up what every process has found.
        """
        for quantizer, cells in self._by_part(latents):
            counts, sums = torch.zeros_like(quantizer.ema_cluster_size), torch.zeros_like(quantizer.ema_w)
            for some in cells.split(CELLS):
                flat, encodings, _ = _quantise(quantizer, some)
                counts += encodings.sum(0)
                sums += encodings.T @ flat
            counts, sums = total(counts), total(sums)
            quantizer.ema_cluster_size.lerp_(counts, 1 - self.decay)
            quantizer.ema_w.lerp_(sums, 1 - self.decay)
            # Where nothing came, mean and count have shrunk alike, and in the end to 0 / 0.
            mean = quantizer.ema_w / quantizer.ema_cluster_size[:, None]
            quantizer.embedding.weight.copy_(torch.where(counts[:, None] > 0, mean, quantizer.embedding.weight))

    @torch.no_grad()
    def restart(self, candidates: Tensor, cells: int, rng: np.random.Generator) -> list[tuple[Tensor, Tensor]]:
        """Put dead entries where latents are that have none near them (Dhariwal et al. 2020, section 3.1).

        Candidates are chosen with probabilities as their squared distances from the entry nearest to them (k-means++,
        Arthur and Vassilvitskii 2007): most cells of an image are background, which needs no second entry.

        Parameters
        ----------
        candidates
            Latents (n, c) of single cells, n at least `entries`; the same in every process.
        cells
            Of the batch.
        rng
            Decides between candidates; the same in every process.

        Returns
        -------
        list
            Per part: which entries were dead, bool (entries,), and what was put there, (entries, c / parts); for
            `place` of the averaged weights.
        """
        found, fair = [], cells / self.entries
        for quantizer, values in self._by_part(candidates):
            distance = torch.cat([_distance(quantizer, some) for some in values.split(CELLS)])
            luck = torch.from_numpy(rng.gumbel(size=len(values)).astype(np.float32)).to(distance)
            chosen = torch.topk(distance.clamp_min(1e-12).log() + luck, self.entries).indices
            dead = quantizer.ema_cluster_size < DEAD_BELOW * fair
            quantizer.ema_cluster_size.masked_fill_(dead, fair)
            found.append((dead, values[chosen]))
        self.place(found)
        for (dead, values), quantizer in zip(found, self._quantizers(), strict=True):
            quantizer.ema_w.copy_(torch.where(dead[:, None], values * fair, quantizer.ema_w))
        return found

    @torch.no_grad()
    def place(self, restarted: list[tuple[Tensor, Tensor]]) -> None:
        """Set the entries that `restart` has set in another module."""
        for (dead, values), quantizer in zip(restarted, self._quantizers(), strict=True):
            weight = quantizer.embedding.weight
            weight.copy_(torch.where(dead[:, None], values, weight))

    # --------------------------------------------------------------------------------------------- the parts

    def _quantizers(self) -> list[EMAQuantizer]:
        return [part for part in self.parts if isinstance(part, EMAQuantizer)]

    def _by_part(self, latents: Tensor) -> list[tuple[EMAQuantizer, Tensor]]:
        """Each part with its numbers of all cells, float32 (cells, c / parts)."""
        cells = latents.detach().float().movedim(1, -1).flatten(0, -2)
        return list(zip(self._quantizers(), cells.chunk(len(self.parts), 1), strict=True))


def _quantise(quantizer: EMAQuantizer, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `EMAQuantizer.quantize` finds for (n, c) cells; in float32, which on a processor it does not see to: in half
    precision, distances between near entries are all alike.

    It multiplies squares out, so entries nearer to each other than some 5e-4 of their length are not told apart.
    """
    device = cells.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return quantizer.quantize(cells[..., None, None])


def _distance(quantizer: EMAQuantizer, cells: Tensor) -> Tensor:
    """Squared distances (n,) of cells (n, c) from their nearest entries."""
    codes = _quantise(quantizer, cells)[2].flatten()
    return (cells - quantizer.embedding.weight[codes]).square().sum(1)


def use_counts(codes: Tensor, entries: int) -> np.ndarray:
    """How often each entry stands in an image's codes, int64 (b, parts, entries), of codes (b, parts, *spatial)."""
    flat = codes.flatten(2).cpu().numpy()
    return np.stack([[np.bincount(part, minlength=entries) for part in image] for image in flat])


def used_share(counts: np.ndarray) -> np.ndarray:
    """Share of all entries that occur, in [0, 1], (...), of counts (..., parts, entries)."""
    return np.mean(counts > 0, (-2, -1))


def perplexity(counts: np.ndarray) -> np.ndarray:
    """As how many entries used equally often, the mean over parts, (...), of counts (..., parts, entries).

    exp of the entropy of their shares (van den Oord et al. 2017): 1 where one is always used, `entries` at most.
    """
    shares = counts / np.maximum(counts.sum(-1, keepdims=True), 1e-12)
    entropy = -np.sum(shares * np.log(np.maximum(shares, 1e-12)), -1)
    return np.exp(entropy).mean(-1)
