"""Cached latents as the second stage trains on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from meddiff_steps.cohort.texts import text_digest
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.latent_statistics import Standardisation


class CachedTokens:
    """Vectors of texts that were encoded once.

    Parameters
    ----------
    shards
        Columns `text_sha256` and `tokens`, float16 (n, width), NaN where a text has fewer.
    texts
        Of each row of the latents, its text, or None.

    Raises
    ------
    UserError
        A text is not among them.
    """

    def __init__(self, shards: Shards, texts: Sequence[str | None]) -> None:
        places = {digest: place for place, digest in enumerate(shards.column("text_sha256"))}
        digests = [None if text is None else text_digest(text) for text in texts]
        if absent := [digest for digest in digests if digest is not None and digest not in places]:
            raise UserError(
                f"{shards.origin}: has no tokens of {len(absent)} text(s), such as {absent[0][:12]}. The cohort was"
                " changed; run the step `text` again."
            )
        self.shards, self.places = shards, [None if digest is None else places[digest] for digest in digests]

    @property
    def width(self) -> int:
        """Of a vector."""
        return self.shards.shape("tokens")[1]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of `rows` of the latents, float32 (len(rows), n, width), NaN where there are none."""
        found = np.full((len(rows), *self.shards.shape("tokens")), np.nan, np.float32)
        for i, row in enumerate(rows):
            place = self.places[row]
            if place is not None:
                found[i] = self.shards.tensor("tokens", place)
        return found


class CachedMaps:
    """What a label map tells the network: its own latents, of the same variant of the same scan.

    Parameters
    ----------
    shards
        Latents of label maps, as of scans.
    prior
        As of `LatentData`, but of the label maps.
    scans, variants
        Of each row of the scans' latents.

    Raises
    ------
    UserError
        A variant of a scan is not among them.
    """

    def __init__(
        self, shards: Shards, prior: Mapping[str, Tensor], scans: Sequence[str], variants: Sequence[int] | np.ndarray
    ) -> None:
        keys = zip(shards.column("scan_id"), shards.column("variant"), strict=True)
        places = {key: place for place, key in enumerate(keys)}
        wanted = list(zip(scans, [int(variant) for variant in variants], strict=True))
        if absent := [key for key in wanted if key not in places]:
            raise UserError(
                f"{shards.origin}: no latents of the label map of {absent[0][0]}, and of {len(absent)} variants in all."
                " Label maps and scans are of different runs; run the workflow again."
            )
        self.shards, self.places = shards, np.array([places[key] for key in wanted])
        self.standardise = Standardisation(prior["offset"].numpy(), prior["scale"].numpy())

    @property
    def channels(self) -> int:
        """Of a map."""
        return self.shards.shape("mean")[0]

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Maps of `rows` of the scans' latents, standardised, float32 (len(rows), c, *spatial)."""
        return self.standardise(self.shards.tensors("mean", self.places[rows]))


@dataclass(frozen=True)
class Batch:
    """Latents to learn from: standardised, float32 (b, c, *spatial); their covariates (b, k) and variants (b, v)."""

    latents: np.ndarray
    covariates: np.ndarray
    variants: np.ndarray


@dataclass(frozen=True)
class LatentData:
    """Cached posteriors and who they belong to.

    Attributes
    ----------
    shards
        Columns `mean` and, where the first stage has one, `log_variance`, float16 (c, *spatial); `numbers`, float32
        (v,), which describe the variant.
    prior
        `offset` (1, c, *spatial) and `scale` (), float32: the network sees (z - offset) / scale; and `effects.*`, the
        state of `models.denoiser.effects.CovariateEffects`.
    covariates
        Encoded covariates per row of `shards`, float32 (rows, k), NaN where missing.
    train_rows, val_rows
        Rows of `shards`; validation uses unaugmented ones.
    tokens, maps
        By name, what gives the tokens and the maps of rows.
    """

    shards: Shards
    prior: dict[str, Tensor]
    covariates: np.ndarray
    train_rows: np.ndarray
    val_rows: np.ndarray
    tokens: Mapping[str, CachedTokens] = field(default_factory=dict)
    maps: Mapping[str, CachedMaps] = field(default_factory=dict)

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Samples of the posteriors of `rows`, standardised, float32 (len(rows), c, *spatial)."""
        z = self.shards.tensors("mean", rows)
        if "log_variance" in self.shards.schema.names:
            deviation = np.exp(0.5 * self.shards.tensors("log_variance", rows))
            z = z + deviation * generator.standard_normal(z.shape, dtype=np.float32)
        return self.standardise(z)

    def batch(self, rows: np.ndarray, generator: np.random.Generator) -> Batch:
        """Samples of `rows`, and what is told of them."""
        return Batch(self.draw(rows, generator), self.covariates[rows], self.shards.tensors("numbers", rows))

    @property
    def variant_numbers(self) -> int:
        """How many numbers describe a variant."""
        return self.shards.shape("numbers")[0]

    @property
    def standardise(self) -> Standardisation[np.ndarray]:
        return Standardisation(self.prior["offset"].numpy(), self.prior["scale"].numpy())


def drop(
    covariates: np.ndarray, each: float, together: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Replace covariates by NaN (the learnt null): each on its own with one probability, all of a row with another.

    Returns
    -------
    covariates, rows
        What is left, and the rows of which all was dropped, bool (rows,).
    """
    one, row = generator.random(covariates.shape) < each, generator.random((len(covariates), 1)) < together
    return np.where(one | row, np.float32("nan"), covariates), row[:, 0]


def drop_tokens(tokens: np.ndarray, gone: np.ndarray, each: float, generator: np.random.Generator) -> np.ndarray:
    """Replace tokens (b, n, width) by NaN: those of the rows `gone`, and others one by one."""
    lost = gone[:, None] | (generator.random(tokens.shape[:2]) < each)
    return np.where(lost[..., None], np.float32("nan"), tokens)
