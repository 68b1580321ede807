"""Training of the second stage on cached latents."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import adamw, channels_last, to_channels_last, to_device
from meddiff_steps.compute.micro_batch import MicroBatch
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.core.registries import REHEARSAL
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.blocks import silence
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.trained import DenoiserCard
from meddiff_steps.models.weights import start_from
from meddiff_steps.training.adapting import Anchor, add_adapters, merged_state
from meddiff_steps.training.latent_data import LatentData, drop, drop_tokens
from meddiff_steps.training.loop import batch_rows, clip_gradients, rank_share
from meddiff_steps.training.optimisers import set_up

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from meddiff_steps.training.rehearsal import Rehearsal

#: Held-out latents that a validation looks at.
VALIDATION_LATENTS = 64


#: Features of a noise level from which the size of its loss is learnt, and the learning rate of that.
LEVEL_FEATURES, LEVEL_LOSS_RATE = 16, 1e-2


class LevelLosses(nn.Module):
    """ln of the loss at each noise level, learnt beside a network (Karras et al. 2024a, section 3); 0 at first.

    Dividing by it gives every level the same weight however hard it is.
    """

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1.0, LEVEL_FEATURES + 1) / 8.0, persistent=False)
        self.last = nn.Linear(2 * LEVEL_FEATURES, 1)
        silence(self.last)

    def forward(self, log_ratio: Tensor) -> Tensor:
        """ln(sigma / alpha) (b,) -> (b,)."""
        phase = log_ratio.clamp(-8.0, 8.0)[:, None] * self.frequencies
        return self.last(torch.cat([phase.cos(), phase.sin()], 1))[:, 0]


def _with_guide(base: Denoiser, settings: config.Diffusion) -> dict[str, Tensor]:
    """Weights of a base for a study that keeps a guide or none: where the base has none, it is the network itself."""
    state = {name: value for name, value in base.state_dict().items() if not name.startswith("guide.")}
    if not settings.guide_share:
        return state
    guide = base.network if base.guide is None else base.guide
    return state | {f"guide.{name}": value for name, value in guide.state_dict().items()}


class DiffusionTask:
    """Denoising score matching with covariate dropout (classifier-free guidance, Ho and Salimans 2022).

    Noise levels are drawn where there is something to learn: ln(sigma / alpha) is normal (Karras et al. 2022).

    Parameters
    ----------
    settings
        The study's `diffusion` section.
    encoding
        How covariates became the numbers in `data`.
    root
        The study's seed.
    base
        Trained, to start from; `data.prior` is then its own.
    text
        The study's `text` section: how tokens of texts are dropped, where `data` has such.
    """

    def __init__(
        self,
        settings: config.Diffusion,
        data: LatentData,
        encoding: CovariateEncoding,
        root: str,
        fabric: Fabric,
        base: Denoiser | None = None,
        text: config.FreeText | None = None,
    ) -> None:
        self.text = text or config.FreeText()
        self.settings, self.data, self.fabric, self.micro = settings, data, fabric, MicroBatch(fabric)
        self.root = f"{root}/diffusion"
        self.process = NoiseProcess.of(settings)
        self.val_rows = data.val_rows[:VALIDATION_LATENTS]
        shape = data.shards.shape("mean")
        self.spatial_dims = len(shape) - 1
        torch.manual_seed(int(step_generator(self.root, "weights", 0).integers(2**31)))
        #: How the denoiser is made, for its card.
        widths = {name: cached.width for name, cached in data.tokens.items()}
        channels = {name: cached.channels for name, cached in data.maps.items()}
        self.card = DenoiserCard(settings, shape, encoding, data.variant_numbers, maps=channels, tokens=widths)
        model = self.card.build()
        model.load_state_dict(data.prior, strict=False)
        if base is not None:
            start_from(model, base, "diffusion", _with_guide(base, settings))
        if settings.trains == "adapters":
            add_adapters(model, settings.adapter_rank)
        to_channels_last(model, self.spatial_dims)
        average = copy.deepcopy(model).requires_grad_(False).eval()
        self.net, self.optimisers = set_up(model, settings.optimiser, fabric)
        self.anchor = Anchor(model.parameters(), settings.towards_base)
        self.modules: dict[str, nn.Module] = {"model": model, "average": fabric.to_device(average)}
        self.rehearsal: Rehearsal | None = None
        if settings.rare is not None:
            self.rehearsal = REHEARSAL.load().Rehearsal(settings.rare, data, encoding, average, self.root, fabric)
        #: What `compilation.speed_up` may compile.
        self.costly = list(model.costly)
        self.level_losses: nn.Module | None = None
        if settings.loss_weights == "learnt":
            losses = LevelLosses()
            self.level_losses, wrapped = fabric.setup(losses, adamw(losses.parameters(), LEVEL_LOSS_RATE, fabric))
            self.modules["level_losses"], self.optimisers["level_losses"] = losses, wrapped

    @property
    def released(self) -> Denoiser:
        """The averaged network as it is kept: adapters, where it was trained by them, are part of its weights."""
        average = self.modules["average"]
        assert isinstance(average, Denoiser)
        if self.settings.trains == "all":
            return average
        plain = self.card.build().requires_grad_(False).eval()
        plain.load_state_dict(merged_state(average))
        return plain

    @property
    def _token_names(self) -> list[str]:
        return sorted(self.data.tokens)

    def _maps(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self.data.maps[name](rows) for name in sorted(self.data.maps)]

    def train_step(self, step: int) -> dict[str, Tensor]:
        settings, fabric, size = self.settings, self.fabric, self.settings.optimiser.batch_size
        generator = step_generator(self.root, "batch/0", step)
        self._train_in_parts(step)
        if self.rehearsal is None:
            rows = self.data.train_rows[batch_rows(self.root, step, size, len(self.data.train_rows))]
            batch = self.data.batch(rows, generator)
        else:  # of which neither texts nor label maps are known
            rows, batch = np.empty(0, np.int64), self.rehearsal.batch(step, size, generator)
        x0 = batch.latents
        # Stratified times: one per equal slice of [0, 1), which lowers the variance of the loss (Kingma et al. 2021).
        uniform = (generator.permutation(size) + generator.random(size)) / size
        covariates, gone = drop(batch.covariates, settings.covariate_dropout, settings.condition_dropout, generator)
        noise = generator.standard_normal(x0.shape, dtype=np.float32)
        tokens = []
        for name in self._token_names:
            without = gone | (generator.random(len(rows)) < self.text.dropout)
            tokens.append(drop_tokens(self.data.tokens[name](rows), without, self.text.token_dropout, generator))
        told = (covariates, batch.variants, *tokens, *self._maps(rows))
        mine = [rank_share(drawn, fabric) for drawn in (x0, uniform, noise, *told)]

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            if self.level_losses is not None and part.start == 0:  # also where parts begin anew, as memory is short
                self.level_losses.zero_grad(set_to_none=True)
            errors, log_ratio = self._errors(self.net, *(drawn[part] for drawn in mine))
            if self.level_losses is None:
                return errors.mean(), {"train/loss": errors.mean()}
            expected = self.level_losses(log_ratio)  # ln of the error at this level; Karras et al. 2024a, equation 21
            return (errors / expected.exp() + expected).mean(), {"train/loss": errors.mean()}

        found = self.micro.gradients(self.net, len(mine[0]), losses)
        clip_gradients(self.net, settings.optimiser, step, fabric)
        for optimiser in self.optimisers.values():
            optimiser.step()
        self.anchor.pull(self.optimisers["others"])
        if settings.guide_share and step + 1 == max(1, round(settings.guide_share * settings.optimiser.steps)):
            self._keep_guide()
        return found

    def _train_in_parts(self, step: int) -> None:
        """Of a ControlNet: first all else, then its branch alone, which begins as a copy."""
        if self.settings.network != "conditioned" or self.settings.conditioning.maps != "controlnet":
            return
        last = max(1, round(self.settings.conditioning.base_share * self.settings.optimiser.steps))
        model, average = self.modules["model"], self.modules["average"]
        assert isinstance(model, Denoiser) and isinstance(average, Denoiser)
        if step == last:
            for denoiser in (model, average):
                denoiser.network.begin_control()
        model.network.train_base(alone=step < last)

    def _keep_guide(self) -> None:
        """Keep the averaged network of this step as the guide of autoguidance."""
        model, average = self.modules["model"], self.modules["average"]
        assert isinstance(model, Denoiser) and isinstance(average, Denoiser)
        for denoiser in (model, average):
            assert denoiser.guide is not None
            denoiser.guide.load_state_dict(average.network.state_dict())

    def _errors(
        self,
        net: nn.Module,
        x0: np.ndarray,
        uniform: np.ndarray,
        noise: np.ndarray,
        covariates: np.ndarray,
        variants: np.ndarray,
        *more: np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of each row, in units of what the network gives, and its ln(sigma / alpha); (b,) each.

        `more` are tokens, then maps, in the order of their names.
        """
        clean, eps, given, seen = (to_device(drawn, self.fabric) for drawn in (x0, noise, covariates, variants))
        levels = self.settings.levels
        timesteps = to_device(self.process.training_timesteps(uniform, levels.mean, levels.deviation), self.fabric)
        noisy = self.process.add_noise(clean, eps, timesteps).contiguous(memory_format=channels_last(self.spatial_dims))
        names = [*self._token_names, *sorted(self.data.maps)]
        told = {name: to_device(drawn, self.fabric) for name, drawn in zip(names, more, strict=True)}
        maps = {name: told.pop(name) for name in self.data.maps}
        predicted = net(noisy, timesteps, Condition(given, maps, told, seen))
        error = predicted - self.process.target(clean, eps, timesteps)
        # In units of what the network gives: every level weighs the same at the start (Karras et al. 2022, table 1)
        average = self.modules["average"]
        assert isinstance(average, Denoiser)
        errors = (error / average.gain(timesteps, error.ndim)).square().flatten(1).mean(1)
        alpha, sigma = self.process.alpha_sigma(timesteps)
        return errors, (sigma.log() - alpha.log()).float()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss of the averaged weights on held-out latents at fixed times and noise."""
        losses: list[float] = []
        for start in range(0, len(self.val_rows), 16):
            rows = self.val_rows[start : start + 16]
            generator = step_generator(self.root, "validation", start)
            x0 = self.data.draw(rows, generator)
            uniform = (np.arange(start, start + len(rows)) + 0.5) / len(self.val_rows)
            noise = generator.standard_normal(x0.shape, dtype=np.float32)
            covariates, variants = self.data.covariates[rows], self.data.shards.tensors("numbers", rows)
            tokens = [self.data.tokens[name](rows) for name in self._token_names]
            drawn = (x0, uniform, noise, covariates, variants, *tokens, *self._maps(rows))
            for part in self.micro.parts(len(rows), self.settings.optimiser.batch_size):
                with self.fabric.autocast():
                    errors, _ = self._errors(self.modules["average"], *(one[part] for one in drawn))
                losses += errors.tolist()
        return {"val/loss": float(np.mean(losses))} if losses else {}
