"""A bundle in the layout of `brain_image_synthesis_latent_diffusion_model`, small, with random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor

#: As published, but for the sizes of the networks, of the images, and the code that a bundle would bring along.
INFERENCE: dict[str, Any] = {
    "imports": ["$import torch", "$from pathlib import Path"],
    "bundle_root": ".",
    "load_old": 1,
    "model_dir": "$@bundle_root + '/models'",
    "gender": 0.0,
    "device": "$torch.device('cpu')",
    "autoencoder_def": {
        "_target_": "monai.networks.nets.AutoencoderKL",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 3,
        "channels": [8, 16, 16],
        "num_res_blocks": 2,
        "norm_num_groups": 8,
        "norm_eps": 1e-06,
        "attention_levels": [False, False, False],
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
    },
    "network_def": "@autoencoder_def",
    "load_autoencoder_path": "$@model_dir + '/autoencoder.pt'",
    "load_autoencoder_func": "$@autoencoder_def.load_old_state_dict if bool(@load_old) else"
    " @autoencoder_def.load_state_dict",
    "load_autoencoder": "$@load_autoencoder_func(torch.load(@load_autoencoder_path))",
    "autoencoder": "$@autoencoder_def.to(@device)",
    "diffusion_def": {
        "_target_": "monai.networks.nets.DiffusionModelUNet",
        "spatial_dims": 3,
        "in_channels": 7,
        "out_channels": 3,
        "channels": [8, 16, 24],
        "num_res_blocks": 1,
        "attention_levels": [False, True, True],
        "norm_num_groups": 8,
        "norm_eps": 1e-06,
        "resblock_updown": True,
        "num_head_channels": [0, 16, 24],
        "with_conditioning": True,
        "transformer_num_layers": 1,
        "cross_attention_dim": 4,
        "upcast_attention": True,
        "use_flash_attention": False,
    },
    "load_diffusion_path": "$@model_dir + '/model.pt'",
    "load_diffusion_func": "$@diffusion_def.load_old_state_dict if bool(@load_old) else @diffusion_def.load_state_dict",
    "load_diffusion": "$@load_diffusion_func(torch.load(@load_diffusion_path))",
    "diffusion": "$@diffusion_def.to(@device)",
    "scheduler": {
        "_target_": "monai.networks.schedulers.DDIMScheduler",
        "_requires_": ["@load_diffusion", "@load_autoencoder"],
        "beta_start": 0.0015,
        "beta_end": 0.0205,
        "num_train_timesteps": 1000,
        "schedule": "scaled_linear_beta",
        "clip_sample": False,
    },
}
METADATA: dict[str, Any] = {
    "version": "1.0.0",
    "monai_version": "1.4.0",
    "task": "Brain image synthesis",
    "authors": "A Tester",
    "copyright": "Copyright (c) Testers",
    "license": "A licence of the weights",
    "network_data_format": {
        "inputs": {
            "image": {
                "type": "tabular",
                "channel_def": {"0": "Gender", "1": "Age", "2": "Ventricular volume", "3": "Brain volume"},
            }
        },
        "outputs": {"pred": {"type": "image", "spatial_shape": [32, 32, 16]}},
    },
}


def as_generative(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of monai-generative, in which the published weights are.

    Its self-attention has a `proj_attn` that is never applied: here `attn.out_proj` stands for its random values.
    """

    def old(name: str) -> str:
        name = re.sub(r"\.postconv\.conv\.(weight|bias)$", r".conv.conv.\1", name)
        if "transformer_blocks" in name:
            return re.sub(r"\.out_proj\.(weight|bias)$", r".to_out.0.\1", name)
        name = re.sub(r"\.attn\.to_(q|k|v)\.", r".to_\1.", name)
        return re.sub(r"\.attn\.out_proj\.", ".proj_attn.", name)

    return {old(name): value for name, value in tensors.items()}


def network(definition: Mapping[str, Any], seed: int) -> torch.nn.Module:
    """MONAI's, of a definition, with random weights everywhere: also where MONAI begins with zeros."""
    torch.manual_seed(seed)
    made: torch.nn.Module = ConfigParser({"it": dict(definition)}).get_parsed_content("it")
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval()


def write_bundle(
    folder: Path,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    old: bool = True,
) -> Path:
    """Write a bundle; `changes` to its definitions, and whether its weights have the names of monai-generative."""
    content = json.loads(json.dumps(INFERENCE)) | {"load_old": int(old)}
    for name, values in (changes or {}).items():
        content[name] |= values
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs/inference.json").write_text(json.dumps(content))
    (folder / "configs/metadata.json").write_text(json.dumps(METADATA | dict(metadata or {})))
    for seed, (definition, name) in enumerate((("autoencoder_def", "autoencoder.pt"), ("diffusion_def", "model.pt"))):
        tensors = network(content[definition], seed).state_dict()
        torch.save(as_generative(tensors) if old else dict(tensors), folder / "models" / name)
    return folder


def run_by_monai(folder: Path, **changes: Any) -> tuple[Any, Any, Any]:
    """Autoencoder, UNet and scheduler, as MONAI makes and loads them from the bundle's own configuration; `changes` to
    the definition of the UNet."""
    parser = ConfigParser()
    parser.read_config(folder / "configs/inference.json")
    parser["diffusion_def"] = parser["diffusion_def"] | changes
    parser["bundle_root"] = str(folder)
    scheduler = parser.get_parsed_content("scheduler")  # which requires the weights of both
    autoencoder, unet = (parser.get_parsed_content(name).eval() for name in ("autoencoder", "diffusion"))
    return autoencoder, unet, scheduler
