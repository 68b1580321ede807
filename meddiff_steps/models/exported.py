"""A trained model as two TorchScript files, which run without this package: prediction and decoding of one subject.

They are traced and not compiled from source, so every network that there is can be written, drawing included, and what
they compute is what the model computes.  One subject at a time: traced shapes are fixed.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.core.files import atomic_path
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import predict
from meddiff_steps.models.trained import TrainedModel


class Prediction(nn.Module):
    """The denoiser as MONAI calls a UNet: latents (1, c, *spatial), timesteps (1,), context (1, 1, k).

    The context holds the covariates in the order of the encoding: numbers in their own units, levels by their place,
    NaN where not known.  Guidance is inside.  A flow has MONAI's sign: from noise to data (`RFlowScheduler`).
    """

    means: Tensor
    stds: Tensor

    def __init__(self, model: TrainedModel, settings: config.Generate) -> None:
        super().__init__()
        encoding = model.encoding
        self.denoiser, self.process, self.settings = model.denoiser, model.process, settings
        self.register_buffer("means", torch.tensor([encoding.means.get(name, 0.0) for name in encoding.names]))
        self.register_buffer("stds", torch.tensor([encoding.stds.get(name, 1.0) for name in encoding.names]))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        condition = Condition((context[:, 0] - self.means) / self.stds)
        settings, denoiser = self.settings, self.denoiser

        def guide(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
            return denoiser(x, timesteps, condition, True)

        known = guide if settings.guidance == "autoguidance" else None
        predicted = predict(denoiser, x, timesteps, condition, settings.guidance_scale, known)
        if settings.guidance_interval is not None and settings.guidance_scale != 1.0:
            low, high = settings.guidance_interval
            alpha, sigma = self.process.alpha_sigma(timesteps)
            inside = (sigma / alpha > low) & (sigma / alpha <= high)
            plain = denoiser(x, timesteps, condition)
            predicted = torch.where(inside.reshape(-1, *[1] * (x.ndim - 1)), predicted, plain)
        return -predicted if self.process.is_flow else predicted


class Decoding(nn.Module):
    """Final images (1, 1, *spatial) in [0, 1] of latents as the prediction has them, and noise shaped as the image.

    A model without a drawing decoder ignores the noise.
    """

    def __init__(self, model: TrainedModel, settings: config.Generate) -> None:
        super().__init__()
        self.denoiser, self.first_stage = model.denoiser, model.first_stage
        self.decoder, self.tone, self.steps = model.decoder, model.tone, settings.drawing_steps

    def forward(self, latents: Tensor, noise: Tensor) -> Tensor:
        images = self.first_stage.decode(self.denoiser.latents(latents)).clamp(0.0, 1.0)
        if self.decoder is not None:
            images = self.decoder.draw(images, noise, self.steps)
        return self.tone(images)


@torch.no_grad()
def export(model: TrainedModel, settings: config.Generate, prediction: Path, decoding: Path) -> None:
    """Write both files, of a model on the processor.

    Parameters
    ----------
    model
        In float32.
    settings
        Guidance and steps of the drawing decoder, which are fixed in the files.
    """
    latents, image = torch.zeros(1, *model.latent_shape), torch.zeros(1, *model.image_shape)
    context = torch.zeros(1, 1, len(model.encoding.names))
    timesteps = torch.tensor([model.process.last_timestep / 2])
    for network, inputs, path in (
        (Prediction(model, settings), (latents, timesteps, context), prediction),
        (Decoding(model, settings), (latents, image), decoding),
    ):
        with warnings.catch_warnings():
            # That shapes and levels become constants is what is wanted; and TorchScript, which torch no longer
            # develops, is what MONAI bundles hold.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(network.eval(), inputs, check_trace=False)
            _save(traced, path)


def _save(traced: torch.jit.ScriptModule, path: Path) -> None:
    """The same bytes on every machine: torch names the archive's folder after the file it writes, and keeps the paths
    of the sources, which are those of whoever exported, and a digest that knows these.
    """
    whole = io.BytesIO()
    torch.jit.save(traced, whole)
    with atomic_path(path) as place, zipfile.ZipFile(whole) as source, zipfile.ZipFile(place, "w") as target:
        for name in source.namelist():
            if not name.endswith((".debug_pkl", "/serialization_id")):
                target.writestr(zipfile.ZipInfo(name), source.read(name))
