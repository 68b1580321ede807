"""Models as a MONAI bundle: what runs where MONAI is installed and this package is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch

from meddiff_steps import __version__, config
from meddiff_steps.config.base import Spacing, per_axis
from meddiff_steps.core.files import write_json
from meddiff_steps.core.folders import BUNDLE
from meddiff_steps.imaging.encoding import Grid
from meddiff_steps.models.exported import export
from meddiff_steps.models.trained import TrainedModel

METADATA, INFERENCE, DENOISER, DECODER = BUNDLE
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
#: MONAI's names of our schedules.
SCHEDULES = {"scaled_linear": "scaled_linear_beta", "linear": "linear_beta", "cosine": "cosine"}
STEPS = 50
USE = """\
from monai.bundle import ConfigParser

bundle = ConfigParser()
bundle.read_config("configs/inference.json")
bundle["bundle_root"] = "."
bundle["covariates"] = {covariates}  # None: not known
image = bundle.get_parsed_content("image")  # (1, 1, ...) in [0, 1]
"""


def write(
    model: TrainedModel,
    settings: config.Generate,
    folder: Path,
    facts: Mapping[str, Any],
    spacing_mm: Spacing | None,
) -> None:
    """Write the bundle; `facts` are said in metadata.json beside what follows from the model.

    Parameters
    ----------
    spacing_mm
        Voxel size of the model's 3D grid, in mm: images are saved with it.  None for 2D images.
    """
    grid = Grid(tuple(model.image_shape[1:]), spacing_mm)
    export(model, settings, folder / DENOISER, folder / DECODER)
    write_json(folder / INFERENCE, _inference(model, grid))
    write_json(folder / METADATA, _metadata(model, grid) | dict(facts))


def usage(covariates: Sequence[str]) -> str:
    """Lines of Python that make an image with MONAI alone."""
    return USE.replace("{covariates}", str(dict.fromkeys(covariates)))


def _inference(model: TrainedModel, grid: Grid) -> dict[str, Any]:
    settings = model.card.settings
    scheduler: dict[str, Any]
    if model.process.is_flow:
        scheduler = {
            "_target_": "monai.networks.schedulers.RFlowScheduler",
            "num_train_timesteps": settings.num_train_timesteps,
            "use_discrete_timesteps": True,
        }
        timesteps = "$@scheduler.set_timesteps(@num_inference_steps)"
    else:
        betas = {"beta_start": settings.beta_start, "beta_end": settings.beta_end}
        scheduler = {
            "_target_": "monai.networks.schedulers.DDIMScheduler",
            "num_train_timesteps": settings.num_train_timesteps,
            "schedule": SCHEDULES[settings.schedule],
            **(betas if settings.schedule != "cosine" else {}),
            "prediction_type": settings.prediction_type,
            "clip_sample": False,
        }
        # MONAI 1.6 spaces timesteps otherwise than its own steps lead: every n-th one is what a step of it goes to.
        timesteps = (
            "$(@scheduler.set_timesteps(@num_inference_steps), setattr(@scheduler, 'timesteps',"
            " torch.arange(0, @scheduler.num_train_timesteps, @scheduler.num_train_timesteps //"
            " @num_inference_steps)[:@num_inference_steps].flip(0)))"
        )
    shape = list(model.image_shape)
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "device": "$torch.device('cpu')",
        "seed": 0,
        "num_inference_steps": min(STEPS, settings.num_train_timesteps),
        "covariates": dict.fromkeys(model.encoding.names),
        "context": "$torch.tensor([[[float('nan') if value is None else float(value) for value in"
        " @covariates.values()]]]).to(@device)",
        "generator": "$torch.Generator().manual_seed(@seed)",
        "noise": f"$torch.randn(1, *{list(model.latent_shape)}, generator=@generator).to(@device)",
        "drawing_noise": f"$torch.randn(1, *{shape}, generator=@generator).to(@device)",
        "denoiser": f"$torch.jit.load(@bundle_root + '/{DENOISER}', map_location=@device).eval()",
        "decoder": f"$torch.jit.load(@bundle_root + '/{DECODER}', map_location=@device).eval()",
        "network_def": "@denoiser",
        "scheduler": scheduler,
        "timesteps": timesteps,
        "inferer": {"_target_": "monai.inferers.DiffusionInferer", "scheduler": "@scheduler"},
        "latents": "$(@timesteps, @inferer.sample(input_noise=@noise, diffusion_model=@denoiser,"
        " scheduler=@scheduler, conditioning=@context, verbose=False))[1]",
        "image": "$@decoder(@latents, @drawing_noise)",
        "saver": {
            "_target_": "SaveImage",
            "output_dir": "$@bundle_root + '/output'",
            "output_postfix": "$'sample_' + str(@seed)",
            "separate_folder": False,
        },
        "affine": None if grid.affine is None else grid.affine.tolist(),
        "run": ["$@saver(@image[0], @affine and {'affine': torch.tensor(@affine, dtype=torch.float64)})"],
    }


def _metadata(model: TrainedModel, grid: Grid) -> dict[str, Any]:
    encoding = model.encoding
    meanings = {
        str(place): name
        + (
            f": {', '.join(f'{i} {level}' for i, level in enumerate(encoding.levels[name]))}"
            if count
            else ", in its unit"
        )
        for place, (name, count) in enumerate(zip(encoding.names, encoding.level_counts, strict=True))
    }
    return {
        "schema": SCHEMA,
        "version": __version__,
        "changelog": {__version__: f"written by meddiff_steps {__version__}"},
        "monai_version": monai.__version__,
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {},
        "task": "Synthesis of medical images, one subject at a time",
        "intended_use": "Research. Not for diagnosis.",
        **({} if grid.spacing_mm is None else {"spacing_mm": list(per_axis(grid.spacing_mm))}),
        "network_data_format": {
            "inputs": {
                "covariates": {
                    "type": "tabular",
                    "format": "numbers; null where not known",
                    "num_channels": len(encoding.names),
                    "spatial_shape": [1],
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": False,
                    "channel_def": meanings,
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "magnitude",
                    "num_channels": 1,
                    "spatial_shape": list(grid.shape),
                    "dtype": "float32",
                    "value_range": [0, 1],
                    "is_patch_data": False,
                    "channel_def": {"0": "image"},
                }
            },
        },
    }
