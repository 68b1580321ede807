"""One image size: a study, images, latents and a model on disk, and how many operations its networks take."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from lightning_fabric import Fabric
from torch.utils.flop_counter import FlopCounterMode

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.registries import default_steps, evaluations
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.drawing.base import DrawingDecoder
from meddiff_steps.models.drawing.base import build as build_drawing
from meddiff_steps.models.first_stage.base import FirstStage, latent_shape
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.trained import DenoiserCard, save_denoiser, save_image_network

ROOT = Path(__file__).parents[2]
#: Images on disk that trainings read.
IMAGES = 16

#: A study that a processor runs in seconds, for `--quick`.
QUICK = {
    "study": "quick",
    "cohort": {"source": "simulated"},
    "covariates": {"age": {"unit": "year", "range": [40, 90]}, "sex": {"levels": ["F", "M"]}},
    "preprocess": {"shape": [16, 16, 16]},
    "autoencoder": {
        "channels": [8, 16],
        "norm_num_groups": 4,
        "latent_channels": 4,
        "optimiser": {"steps": 9, "batch_size": 2, "learning_rate": 0.001},
    },
    "diffusion": {
        "network": "unet",
        "channels": [8, 16],
        "norm_num_groups": 4,
        "num_head_channels": 8,
        "num_res_blocks": 1,
        "optimiser": {"steps": 9, "batch_size": 4, "learning_rate": 0.001},
    },
    "decoder": {"channels": 8, "num_res_blocks": 1, "crop": 8, "optimiser": {"steps": 9, "batch_size": 2}},
    "plan": [{"name": "syn", "subjects": 4}],
    "generate": {"batch_size": 2, "num_inference_steps": 2, "drawing_steps": 2, "decode_batch_size": 1},
}


class Case:
    """One image size.

    Parameters
    ----------
    study
        Its networks, batch sizes and sampler.
    folder
        For its shards and its model.
    """

    def __init__(self, study: config.Study, folder: Path, device: str, images: int) -> None:
        self.study, self.folder = study, folder
        # Neither discriminator nor perceptual loss: the other side has none, and the published one begins after a tenth
        # of the steps.
        self.first = study.autoencoder.model_copy(
            update={"adversarial": config.Adversarial(), "perceptual": config.Perceptual()}
        )
        self.shape = tuple(study.preprocess.shape)
        self.name = "x".join(map(str, self.shape))
        self.latent_shape = latent_shape(self.first, (1, *self.shape))
        self.device = torch.device(device)
        rng = np.random.default_rng(0)
        count = max(images, 4)
        with ShardWriter(
            folder / "images.arrow", {"scan_id": pa.string(), "image": TensorColumn("float16", (1, *self.shape))}
        ) as shard:
            for i in range(count):
                shard.append(scan_id=str(i), image=self._smooth(rng))
        numbers = np.zeros(len(self.latent_shape) + 1, np.float32)
        columns = {
            "mean": TensorColumn("float16", self.latent_shape),
            "numbers": TensorColumn("float32", numbers.shape),
        }
        with ShardWriter(folder / "latents.arrow", columns) as shard:
            for _ in range(4 * count):
                shard.append(mean=rng.standard_normal(self.latent_shape, dtype=np.float32), numbers=numbers)
        self.images, self.count = Shards([folder / "images.arrow"]), count
        table = pd.DataFrame({name: self._values(covariate, rng, 64) for name, covariate in study.covariates.items()})
        self.encoding = CovariateEncoding.fit(table, study.covariates)
        self.table = table
        self.operations = self._operations()

    def _smooth(self, rng: np.random.Generator) -> np.ndarray:
        coarse = torch.from_numpy(rng.random((1, 1, *(max(2, n // 8) for n in self.shape)), dtype=np.float32))
        return torch.nn.functional.interpolate(coarse, size=self.shape, mode="trilinear")[0].numpy()

    @staticmethod
    def _values(
        covariate: config.ContinuousCovariate | config.CategoricalCovariate, rng: np.random.Generator, count: int
    ) -> np.ndarray:
        if isinstance(covariate, config.CategoricalCovariate):
            return rng.choice(covariate.levels, count)
        return rng.uniform(*covariate.range, count)

    def _operations(self) -> dict[str, float]:
        """Floating-point operations per image, recomputed blocks counted once; counted on tensors without values."""
        plain = {"gradient_checkpointing": False}
        # The products with covariates' effects are a few megaflops beside teraflops: counting leaves them out.
        with torch.device("meta"):
            settings = self.study.diffusion.model_copy(update=plain)
            network = DenoiserCard(settings, self.latent_shape, self.encoding, variants=0).build().network
            first = build_first_stage(self.first.model_copy(update=plain), 3)
            condition = Condition(torch.zeros(1, len(self.encoding.level_counts)))
            timesteps, amplitude = torch.zeros(1), torch.zeros(1, 1, 1, 1, 1)
        drawing = build_drawing(self.study.decoder, (1, *self.shape)).to("meta") if self.draws else None
        image, z = torch.zeros(1, 1, *self.shape, device="meta"), torch.zeros(1, *self.latent_shape, device="meta")

        def counted(call: Callable[[], Any], backward: bool) -> float:
            with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
                result = call()
                if backward:
                    parts = result if isinstance(result, tuple) else (result,)
                    sum(part.sum() for part in parts if part is not None).backward()
            return float(counter.get_total_flops())

        def denoise() -> Any:
            return network(z, timesteps, condition)

        def draw() -> Any:
            assert drawing is not None
            return drawing.step(image)

        return {
            "denoise": counted(denoise, False),
            "train_diffusion": counted(denoise, True),
            "encode": counted(lambda: first.encode(image), False),
            "decode": counted(lambda: first.decode(z), False),
            "train_autoencoder": counted(lambda: first(image, z, amplitude), True),
            "draw": counted(draw, False) if drawing is not None else 0.0,
        }

    @property
    def draws(self) -> bool:
        """Whether the study has a drawing decoder."""
        return self.study.decoder.network is not None

    @property
    def sampler_steps(self) -> int:
        generate, diffusion = self.study.generate, self.study.diffusion
        return generate.num_inference_steps or default_steps(generate.sampler, diffusion.num_train_timesteps)

    @property
    def guidance(self) -> float | None:
        """The study's guidance scale where it takes two passes; None where one does."""
        scale = self.study.generate.guidance_scale
        return None if scale in (0.0, 1.0) else scale

    def sampling_operations(self, drawn: bool) -> float:
        """Of one volume as the study generates it."""
        passes = evaluations(self.study.generate.sampler, self.sampler_steps) * (1 if self.guidance is None else 2)
        drawing = self.study.generate.drawing_steps * self.operations["draw"] if drawn else 0.0
        return passes * self.operations["denoise"] + self.operations["decode"] + drawing

    def fabric(self, precision: str = "auto") -> Fabric:
        return make_fabric(
            config.Compute(device=self.device.type, precision=precision), threads=torch.get_num_threads()
        )

    def compute(self, compiled: bool, **changes: Any) -> config.Compute:
        return config.Compute(device=self.device.type, compile=compiled, **changes)

    def batch(self, size: int) -> torch.Tensor:
        """Images on the host (size, 1, *shape), as CacheDataset would hand them out."""
        return torch.from_numpy(self.images.tensors("image", np.arange(size) % self.count))

    def prior(self) -> dict[str, torch.Tensor]:
        """Latents that need no standardisation, and do not depend on covariates."""
        return {"offset": torch.zeros(1, *self.latent_shape), "scale": torch.ones(())}

    def networks(self) -> tuple[FirstStage, Denoiser, DenoiserCard, DrawingDecoder | None]:
        """Networks as after some training: layers that begin at zero would hide what comes before them."""
        torch.manual_seed(0)
        card = DenoiserCard(self.study.diffusion, self.latent_shape, self.encoding, variants=len(self.latent_shape) + 1)
        denoiser = card.build()
        denoiser.load_state_dict(self.prior(), strict=False)
        first = build_first_stage(self.first, 3)
        decoder = build_drawing(self.study.decoder, (1, *self.shape)) if self.draws else None
        if decoder is not None:
            decoder.deviation.fill_(0.02)
        for network in (denoiser, first, *([decoder] if decoder is not None else [])):
            network.requires_grad_(False).eval()
            for weight in network.parameters():
                if weight.ndim > 1 and not weight.any():
                    torch.nn.init.normal_(weight, std=0.05)
        return first, denoiser, card, decoder

    @cached_property
    def model(self) -> Path:
        """Folder with autoencoder/, diffusion/ and, where the study has one, decoder/, as a job of `generate` loads
        them.
        """
        first, denoiser, card, decoder = self.networks()
        facts = {"settings": self.first.model_dump(mode="json"), "latent_shape": list(self.latent_shape)}
        save_image_network(first, self.folder / "autoencoder", (1, *self.shape), facts)
        save_denoiser(denoiser, card, self.folder / "diffusion", {})
        if decoder is not None:
            facts = {"settings": self.study.decoder.model_dump(mode="json")}
            save_image_network(decoder, self.folder / "decoder", (1, *self.shape), facts)
        return self.folder


def study_of(name: str) -> config.Study:
    """A study by its name in config/studies, or `quick`."""
    if name == "quick":
        return config.parse_study(QUICK, "quick")
    return config.load_study(ROOT / f"config/studies/{name}.yaml")


def case_of(name: str, folder: Path, device: str) -> Case:
    """A size by the name of its study, or `quick`."""
    folder = folder / name
    folder.mkdir()
    return Case(study_of(name), folder, device, 4 if name == "quick" else IMAGES)
