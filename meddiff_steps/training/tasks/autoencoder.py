"""Training of the first stage."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import Tensor, nn
from torch.optim import Optimizer

from meddiff_steps import config
from meddiff_steps.compute.device import adamw, channels_last, to_channels_last, to_device
from meddiff_steps.compute.micro_batch import Losses, MicroBatch
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.imaging.signed_distances import DISTANCES
from meddiff_steps.imaging.variants import draw_variant
from meddiff_steps.models.first_stage.base import FirstStage, Posterior, build, halved, latent_shape, reconstruct
from meddiff_steps.models.first_stage.quantiser import (
    CANDIDATES,
    RESTART_EVERY,
    RESTART_UNTIL,
    perplexity,
    use_counts,
    used_share,
)
from meddiff_steps.models.torchscript import load_torchscript
from meddiff_steps.models.weights import start_from
from meddiff_steps.training.adapting import Anchor
from meddiff_steps.training.loop import batch_rows, clip_gradients, rank_share
from meddiff_steps.training.optimisers import set_up

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule

#: Held-out scans that a validation looks at; enough for a stable mean, few enough to be quick.
VALIDATION_SCANS = 32


def spectral_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean absolute difference of Fourier magnitudes (orthonormal transform), which penalises lost fine detail."""
    axes = tuple(range(2, image.ndim))
    return (
        (
            torch.fft.rfftn(reconstruction, dim=axes, norm="ortho").abs()
            - torch.fft.rfftn(image, dim=axes, norm="ortho").abs()
        )
        .abs()
        .mean()
    )


def perceptual_loss(features: nn.Module, reconstruction: Tensor, image: Tensor) -> Tensor:
    """Squared distance between feature maps (b, c, ...) of unit length at every place, averaged over places (Zhang et
    al. 2018, equation 1, unweighted).

    monai.losses.PerceptualLoss fetches code and weights from the internet, whatever path it is given in 3D.
    """
    made, real = (nn.functional.normalize(features(x), dim=1, eps=1e-6) for x in (reconstruction, image))
    return (made - real).square().sum(1).mean()


class AutoencoderTask:
    """L1 + KL, and where configured perceptual, spectral and adversarial terms (Pinaya et al. 2022, appendix).

    Images are decoded from latents with noise, of an amplitude that is drawn for each image up to `latent_noise`: a
    decoder that has seen none makes specks and blocks of a sampler's errors.  Latents at half the resolution have to
    decode to the image at half the resolution, which keeps what is fine in the image out of what is coarse in its
    latents, and makes these easier to draw (Skorokhodov et al. 2025, section 4).

    Entries of codebooks, where the first stage has them, follow the latents of each batch after its step.

    Parameters
    ----------
    settings, variants
        The study's `autoencoder` and `variants` sections.
    shards
        Preprocessed images in [0, 1], or label maps as signed distances, whose texture is not judged.
    train_rows, val_rows
        Rows of `shards`.
    root
        The study's seed.
    features
        Network of the perceptual term, a TorchScript file.
    base
        Trained, to start from.

    Raises
    ------
    UserError
        There is no such network, and the term has a weight.
    """

    def __init__(
        self,
        settings: config.Autoencoder,
        variants: config.Variants,
        shards: Shards,
        train_rows: Sequence[int],
        val_rows: Sequence[int],
        root: str,
        fabric: Fabric,
        features: Path | None = None,
        base: FirstStage | None = None,
    ) -> None:
        distances = shards.kind("image") == DISTANCES
        if distances:  # they have no texture that could be judged, and no contrast that could be changed
            plain = {
                name: getattr(settings, name).model_copy(update={"weight": 0.0})
                for name in ("perceptual", "adversarial")
            }
            settings = settings.model_copy(update=plain)
            variants = variants.model_copy(update={"max_contrast": 0.0})
        self.settings, self.variants, self.shards, self.fabric = settings, variants, shards, fabric
        self.micro = MicroBatch(fabric)
        self.root = f"{root}/autoencoder"
        self.train_rows, self.val_rows = np.asarray(train_rows), np.asarray(val_rows)[:VALIDATION_SCANS]
        self.shape = shards.shape("image")
        self.spatial_dims = len(self.shape) - 1
        torch.manual_seed(int(step_generator(self.root, "weights", 0).integers(2**31)))
        model = build(settings, self.spatial_dims, self.shape[0])
        if base is not None:
            start_from(model, base, "autoencoder")
        if settings.trains == "decoder":
            for part in model.reading:
                part.requires_grad_(False)
        to_channels_last(model, self.spatial_dims)
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        fabric.to_device(self.average)
        self.net, self.optimisers = set_up(model, settings.optimiser, fabric)
        self.anchor = Anchor(model.parameters(), settings.towards_base)
        self.quantiser = model.quantiser
        self.modules: dict[str, nn.Module] = {"model": model, "average": self.average}
        self.steppers = list(self.optimisers.values())
        #: What `compilation.speed_up` may compile.
        self.costly = list(model.costly.values())
        if settings.perceptual.weight > 0:
            if features is None:
                raise UserError(
                    "autoencoder.perceptual.weight is above 0, but no network was given: add --features, as the"
                    " workflow does."
                )
            self.features = fabric.to_device(load_torchscript(features, "autoencoder.perceptual.weights"))
        if settings.adversarial.weight > 0:
            adversarial = settings.adversarial
            discriminator = PatchDiscriminator(
                self.spatial_dims, adversarial.channels, in_channels=1, num_layers_d=adversarial.layers, norm="INSTANCE"
            )
            to_channels_last(discriminator, self.spatial_dims)
            critic = adamw(discriminator.parameters(), adversarial.learning_rate, fabric)
            self.discriminator, wrapped = fabric.setup(discriminator, critic)
            self.modules["discriminator"], self.optimisers["discriminator"] = discriminator, wrapped
            self.costly.append(discriminator)
            self.adversarial_loss = PatchAdversarialLoss(criterion="least_squares")

    def _images(self, rows: np.ndarray) -> Tensor:
        return to_device(self.shards.tensors("image", rows), self.fabric).contiguous(
            memory_format=channels_last(self.spatial_dims)
        )

    def train_step(self, step: int) -> dict[str, Tensor]:
        settings, fabric = self.settings, self.fabric
        batch = batch_rows(self.root, step, settings.optimiser.batch_size, len(self.train_rows))
        mine = rank_share(np.arange(len(batch)), fabric)
        generator = step_generator(self.root, "batch/0", step)
        images = self.shards.tensors("image", self.train_rows[batch[mine]])
        if self.variants.count > 1:
            variants = [draw_variant(self.variants, self.spatial_dims, generator) for _ in batch]
            images = np.stack([variants[place](image) for place, image in zip(mine, images, strict=True)])
        x = to_device(images, fabric).contiguous(memory_format=channels_last(self.spatial_dims))
        drawn = generator.standard_normal((len(batch), *latent_shape(settings, self.shape)), dtype=np.float32)
        noise = to_device(drawn[mine], fabric)
        drawn = settings.latent_noise * generator.random((len(batch), *[1] * (self.spatial_dims + 1)), dtype=np.float32)
        amplitude = to_device(drawn[mine], fabric)

        adversarial = settings.adversarial.weight > 0 and step >= settings.adversarial.start_step
        made = torch.empty_like(x)
        seen = torch.empty_like(noise)

        def losses(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            coarse = settings.equivariance_weight > 0
            reconstruction, small, mean, log_variance = self.net(x[part], noise[part], amplitude[part], coarse)
            named = {
                "train/l1": (reconstruction - x[part]).abs().mean(),
                "train/kl": Posterior(mean, log_variance).kl_divergence().mean(),
            }
            loss = named["train/l1"] + settings.kl_weight * named["train/kl"]
            if self.quantiser is not None:
                seen[part] = mean.detach()
                named["train/commitment"] = self.quantiser.commitment(mean)
                loss = loss + settings.codebook.commitment_weight * named["train/commitment"]
            if settings.spectral_weight > 0:
                named["train/spectral"] = spectral_loss(reconstruction, x[part])
                loss = loss + settings.spectral_weight * named["train/spectral"]
            if small is not None:
                expected = halved(x[part], small.shape[2:])
                named["train/coarse"] = (small - expected).abs().mean()
                if settings.spectral_weight > 0:
                    spectral = spectral_loss(small, expected)
                    named["train/coarse"] = named["train/coarse"] + settings.spectral_weight * spectral
                loss = loss + settings.equivariance_weight * named["train/coarse"]
            if settings.perceptual.weight > 0:
                named["train/perceptual"] = perceptual_loss(self.features, reconstruction, x[part])
                loss = loss + settings.perceptual.weight * named["train/perceptual"]
            if adversarial:
                made[part] = reconstruction.detach()
                judged = self.discriminator(reconstruction.contiguous())[-1]
                named["train/fooling"] = self.adversarial_loss(judged, target_is_real=True, for_discriminator=False)
                loss = loss + settings.adversarial.weight * named["train/fooling"]
            return loss, named

        def judgement(part: slice) -> tuple[Tensor, dict[str, Tensor]]:
            fake = self.adversarial_loss(
                self.discriminator(made[part].contiguous())[-1], target_is_real=False, for_discriminator=True
            )
            real = self.adversarial_loss(
                self.discriminator(x[part].contiguous())[-1], target_is_real=True, for_discriminator=True
            )
            loss = 0.5 * (fake + real)
            return loss, {"train/discriminator": loss}

        if adversarial:
            self.discriminator.requires_grad_(False)
        found = self._update(self.steppers, self.net, losses, len(x), step)
        self.anchor.pull(self.steppers[0])
        self._follow(seen, step)
        if adversarial:
            self.discriminator.requires_grad_(True)
            found |= self._update([self.optimisers["discriminator"]], self.discriminator, judgement, len(x), step)
        return found

    def _update(
        self, steppers: list[Optimizer], module: _FabricModule, losses: Losses, count: int, step: int
    ) -> dict[str, Tensor]:
        found = self.micro.gradients(module, count, losses)
        clip_gradients(module, self.settings.optimiser, step, self.fabric)
        for stepper in steppers:
            stepper.step()
        return found

    def _follow(self, latents: Tensor, step: int) -> None:
        """Let codebooks follow this process's latents (b, c, *spatial) of a batch, and put dead entries elsewhere; all
        processes do the same.
        """
        if self.quantiser is None:
            return

        def total(values: Tensor) -> Tensor:
            return values if self.fabric.world_size == 1 else torch.as_tensor(self.fabric.all_gather(values)).sum(0)

        self.quantiser.follow(latents, total)
        if step % RESTART_EVERY or step >= RESTART_UNTIL * self.settings.optimiser.steps:
            return
        generator = step_generator(self.root, "restart", step)
        each, processes = latents[0, 0].numel(), self.fabric.world_size
        cells = len(latents) * processes * each
        places = generator.integers(cells, size=CANDIDATES * self.settings.codebook.entries)
        images, places = np.divmod(places, each)
        mine = images % processes == self.fabric.global_rank  # as `rank_share` deals images
        rows, columns = to_device(images[mine] // processes, self.fabric), to_device(places[mine], self.fabric)
        candidates = latents.new_zeros(len(mine), latents.shape[1])
        candidates[to_device(mine, self.fabric)] = latents.flatten(2)[rows, :, columns]
        restarted = self.quantiser.restart(total(candidates), cells, generator)
        average = self.average.quantiser
        assert average is not None
        average.place(restarted)

    @torch.no_grad()
    def codebook_counts(self, rows: Sequence[int] | np.ndarray) -> np.ndarray | None:
        """How often the averaged weights give each entry to scans, (rows, parts, entries); None without codebooks."""
        quantiser, found = self.average.quantiser, []
        if quantiser is None:
            return None
        for row in rows:
            with self.fabric.autocast():
                latents = self.average.encode(self._images(np.array([row]))).mode()
            found.append(use_counts(quantiser.codes(latents), quantiser.entries))
        return np.concatenate(found) if found else None

    @torch.no_grad()
    def reconstruct(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """A scan and its reconstruction by the averaged weights, float32 (1, *spatial) in [0, 1] each."""
        image = self._images(np.array([row]))
        with self.fabric.autocast():
            made = reconstruct(self.average, image)
        return image[0].cpu().numpy(), made[0].cpu().numpy()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean absolute error and PSNR (dB) of the averaged weights on held-out scans, posterior mean decoded, and how
        they use codebooks; nothing if there are none.
        """
        l1, psnr = [], []
        for row in self.val_rows:
            x = self._images(np.array([row]))
            with self.fabric.autocast():
                reconstruction = reconstruct(self.average, x)
            l1.append(float((reconstruction - x).abs().mean()))
            psnr.append(-10.0 * float((reconstruction - x).square().mean().clamp_min(1e-12).log10()))
        found = {"val/l1": float(np.mean(l1)), "val/psnr": float(np.mean(psnr))} if l1 else {}
        counts = self.codebook_counts(self.val_rows)
        if counts is not None:
            sums = counts.sum(0)
            found |= {"val/codebook_used": float(used_share(sums)), "val/codebook_perplexity": float(perplexity(sums))}
        return found
