"""What is known of latents before any network is trained: effects of the covariates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meddiff_steps.compute.device import full_float32
from meddiff_steps.models.latent_statistics import READERS

#: Where the second feature of a continuous covariate turns from a parabola to straight tails, in standard deviations.
BEND = 2.0

#: Variance of a covariate feature that is known, beside its own variance of about 1: as good as none.
KNOWN = 1e-6


@dataclass(frozen=True)
class Estimate:
    """What x = alpha * x0 + sigma * noise says by itself; each float32 (b, c, *spatial).

    Attributes
    ----------
    clean, noise
        Posterior means of x0 and of the noise.
    surprise
        x less alpha times the prior mean, of unit variance: what a network is to look at.
    """

    clean: Tensor
    noise: Tensor
    surprise: Tensor


class CovariateEffects(nn.Module):
    """Best estimates of clean latents and noise if x0 = (features - their mean) @ effects + rest.

    The rest is white, of one deviation, but for the directions along which covariates are read from latents best
    (`readout`).  Along these it has the deviations that held-out scans have, uncorrelated, and no network adds anything
    (`outside_readout`): however little it has learnt, it cannot draw another covariate than was asked for.  On the
    demo, a network of 1,500 steps that was free to had drawn brains with r = 0.94 where scans have 0.98.

    Covariates that are missing are not taken to be typical: given those that are known, their features are Gaussian
    with a mean and a covariance of their own, and x0 varies as much more along their effects.  So the prediction
    without covariates is that of the whole cohort, and guidance is as strong as it says.

    Parameters
    ----------
    latent_shape
        (c, *spatial), D numbers in all.
    levels
        Per covariate: the number of levels, or 0 for a continuous one; F features in all (`feature_count`).
    """

    effects: Tensor
    feature_mean: Tensor
    feature_covariance: Tensor
    deviation: Tensor
    readout: Tensor
    readout_deviations: Tensor

    def __init__(self, latent_shape: Sequence[int], levels: list[int]) -> None:
        super().__init__()
        self.levels, self.shape = levels, tuple(latent_shape)
        features = feature_count(levels)
        self.register_buffer("effects", torch.zeros(features, *latent_shape))
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_covariance", torch.eye(features))
        self.register_buffer("deviation", torch.ones(()))
        # Orthonormal rows, or zeros, which change nothing.
        self.register_buffer("readout", torch.zeros(READERS * features, *latent_shape))
        self.register_buffer("readout_deviations", torch.ones(READERS * features))

    @full_float32()
    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, covariates: Tensor) -> Estimate:
        """Posterior means under x0 ~ N(m, R + effects^T C effects), R the covariance of the rest.

        E[x0 | x] = m + alpha S q and E[noise | x] = sigma q with q = (alpha^2 S + sigma^2)^-1 (x - alpha m), by
        Woodbury's identity.

        Parameters
        ----------
        x
            (b, c, *spatial).
        alpha, sigma
            (b,).
        covariates
            Encoded, (b, k), NaN where missing.
        """
        alpha, sigma = alpha.float()[:, None], sigma.float()[:, None]
        effects = self.effects.flatten(1)
        mean, covariance = self.features_given(covariates)
        prior = mean @ effects
        centred = x.float().flatten(1) - alpha * prior
        # Variances of alpha * rest + sigma * noise: of all numbers, and along the readout
        power = alpha.square() * self.deviation.square() + sigma.square()
        along = alpha.square() * self.readout_deviations.square() + sigma.square()
        # The F x F system; what is known has (nearly) no covariance, so that nothing is left of it there.
        root = torch.linalg.cholesky(covariance)
        crossed = effects @ self.readout.flatten(1).T
        products = (effects @ effects.T) / power[..., None]
        products = products + (crossed * (1.0 / along - 1.0 / power)[:, None]) @ crossed.T
        system = torch.eye(len(effects), device=x.device) + alpha.square()[..., None] * (root.mT @ products @ root)
        weighted = self._scaled(centred, 1.0 / power, 1.0 / along)
        inner = torch.linalg.solve(system, root.mT @ (weighted @ effects.T)[..., None])
        spread_back = (root @ inner)[..., 0] @ effects
        q = weighted - alpha.square() * self._scaled(spread_back, 1.0 / power, 1.0 / along)
        rest = self._scaled(q, self.deviation.square().expand_as(power), self.readout_deviations.square())
        spread = rest + (covariance @ (q @ effects.T)[..., None])[..., 0] @ effects
        return Estimate(
            clean=(prior + alpha * spread).reshape(x.shape),
            noise=(sigma * q).reshape(x.shape),
            surprise=self._scaled(centred, power.rsqrt(), along.rsqrt()).reshape(x.shape),
        )

    @full_float32()
    def outside_readout(self, learnt: Tensor) -> Tensor:
        """What a network adds, (b, c, *spatial), without its part along the readout."""
        flat = learnt.flatten(1)
        return self._scaled(flat, flat.new_ones(1, 1), flat.new_zeros(1, 1)).reshape(learnt.shape)

    @full_float32()
    def path(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor, covariates: Tensor
    ) -> Tensor:
        """The x0, (b, c, *spatial), by which one step of DDIM from x is exact under the prior of `forward`.

        Along a direction of variance v, the probability flow keeps (x - alpha m) / sqrt(alpha^2 v + sigma^2) (Song et
        al. 2021b, equation 13, solved for a Gaussian).  So the state at the next level, and with it the x0 on the
        straight way there, is known; at (1, 0), clean latents, it is m + sqrt(v) times what is kept.

        Parameters
        ----------
        x
            (b, c, *spatial).
        alpha, sigma, alpha_next, sigma_next
            Amplitudes here and at the next level, float64 (b,).
        covariates
            As of `forward`.
        """
        here, noise, there, rest = (a.double()[:, None] for a in (alpha, sigma, alpha_next, sigma_next))
        shrink = rest / noise

        def gain(variance: Tensor) -> Tensor:
            """Of x0 - m, by x - alpha m."""
            kept = ((there.square() * variance + rest.square()) / (here.square() * variance + noise.square())).sqrt()
            return (kept - shrink) / (there - shrink * here)

        effects, rows = self.effects.flatten(1), self.readout.flatten(1)
        # All directions in which the variance is not that of the rest, and the covariance there
        basis = torch.linalg.qr(torch.cat([rows, effects]).T)[0].T
        square = self.deviation.double().square()
        mean, covariance = self.features_given(covariates)
        along, spread = (basis @ rows.T).double(), (basis @ effects.T).double()
        extra = (along * (self.readout_deviations.double().square() - square)) @ along.T
        inside = square * torch.eye(len(basis), device=x.device, dtype=torch.float64) + extra
        variances, axes = torch.linalg.eigh(inside + spread @ covariance.double() @ spread.T)
        prior = mean @ effects
        centred = x.float().flatten(1) - here.float() * prior
        seen = centred @ basis.T
        gains = gain(variances.clamp_min(0.0)) - gain(square.expand(1, 1))
        moved = (axes @ (gains * (axes.mT @ seen.double()[..., None])[..., 0])[..., None])[..., 0]
        clean = prior + gain(square.expand(1, 1)).float() * centred + moved.float() @ basis
        return clean.reshape(x.shape)

    def _scaled(self, x: Tensor, everywhere: Tensor, along: Tensor) -> Tensor:
        """x (b, D), multiplied by `everywhere` (b, 1), along the readout by `along` (b, F or 1) instead."""
        rows = self.readout.flatten(1)
        return x * everywhere + ((along - everywhere) * (x @ rows.T)) @ rows

    def features_given(self, covariates: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (b, F), less `feature_mean`, and covariance (b, F, F) of features, given the known covariates."""
        values, known = covariate_features(covariates, self.levels)
        precision = torch.linalg.inv(self.feature_covariance.double())
        weights = known.double() / KNOWN
        covariance = torch.linalg.inv(precision + torch.diag_embed(weights))
        mean = covariance @ (weights * (values.double() - self.feature_mean))[..., None]
        return mean[..., 0].float(), covariance.float()


def feature_count(levels: Sequence[int]) -> int:
    """How many features `covariate_features` gives."""
    return sum(n or 2 for n in levels)


def covariate_features(covariates: Tensor, levels: list[int]) -> tuple[Tensor, Tensor]:
    """Features of encoded covariates (b, k) on which latents depend linearly.

    Of a continuous covariate v, in standard deviations: v and sqrt(BEND^2 + v^2), so that an effect may rise faster at
    one end than at the other, as that of the ventricles does, whose largest are seven deviations from the mean; beyond
    what was learnt it goes on straight.  Of levels: columns of 0 and 1.

    Returns
    -------
    values, known
        (b, F) each; values are 0 where the covariate is missing (NaN).
    """
    columns, known = [], []
    for value, count in zip(covariates.T, levels, strict=True):
        there = torch.isfinite(value)
        found = [(value == level).float() for level in range(count)] or [value, (BEND**2 + value.square()).sqrt()]
        columns += [torch.where(there, column, 0.0) for column in found]
        known += [there] * len(found)
    return torch.stack(columns, 1).float(), torch.stack(known, 1)
