"""A model release as a MONAI bundle: MONAI alone makes the images that the model makes."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Compute
from meddiff_steps.core.folders import BUNDLE
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.imaging.encoding import Grid
from meddiff_steps.models.drawing.base import build as build_drawing
from meddiff_steps.models.first_stage.base import build, latent_shape
from meddiff_steps.models.tone import ToneCurve
from meddiff_steps.models.trained import DenoiserCard, TrainedModel
from meddiff_steps.release import bundle

IMAGE = (1, 8, 16, 8)
ENCODING = CovariateEncoding(
    {
        "age": config.ContinuousCovariate(unit="year", range=(40, 90)),
        "sex": config.CategoricalCovariate(levels=["F", "M"]),
    },
    {"age": 60.0},
    {"age": 10.0},
)
SMALL = {"channels": [8, 16], "norm_num_groups": 4, "num_head_channels": 8, "num_res_blocks": 1, "covariate_dim": 8}
#: First stage, denoiser, what it predicts, guidance, and whether there is a drawing decoder.
KINDS = {
    "light": ("resnet", "resnet", "v_prediction", {"guidance_scale": 2.0, "guidance_interval": [0.1, 5.0]}, True),
    "monai": ("kl", "unet", "epsilon", {"guidance_scale": 1.5}, False),
    "flow": ("resnet", "unet", "flow", {}, False),
    "published": ("kl", "published", "v_prediction", {}, False),
}
STEPS = 5
#: Voxels with thick slices, in mm.
SPACING = (2.0, 2.0, 6.0)
#: As the README of a model release says, in a Python that has never heard of this package.
RUN = """
import sys, torch
from monai.bundle import ConfigParser
from safetensors.torch import save_file
for folder in sys.argv[1:]:
    bundle = ConfigParser()
    bundle.read_config(folder + "/configs/inference.json")
    bundle["bundle_root"] = folder
    bundle["covariates"] = {"age": 75.0, "sex": None}
    bundle["num_inference_steps"] = STEPS
    found = {name: bundle.get_parsed_content(name) for name in ("noise", "drawing_noise", "latents", "image")}
    bundle.get_parsed_content("run")
    save_file({name: value.contiguous() for name, value in found.items()}, folder + "/made.safetensors")
assert not [name for name in sys.modules if name.startswith("meddiff")]
"""


def model_of(kind, decoder):
    first, network, prediction, _, _ = KINDS[kind]
    torch.manual_seed(len(kind))
    stage = config.Autoencoder(network=first, channels=[8, 16], norm_num_groups=4, latent_channels=4)
    told = {"inputs": [{"covariate": "sex", "levels": [0, 1]}, {"covariate": "age", "range": [40, 90]}]}
    settings = config.Diffusion(network=network, prediction_type=prediction, published=told, **SMALL)
    made = DenoiserCard(settings, latent_shape(stage, IMAGE), ENCODING, 0)
    drawing = build_drawing(config.Decoder(channels=8, num_res_blocks=1), IMAGE) if decoder else None
    networks = [build(stage, 3), made.build(), *([drawing] if drawing else [])]
    for each in networks:
        for parameter in each.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    fabric = make_fabric(Compute(device="cpu", precision="32-true"), 1)
    frozen = [each.requires_grad_(False).eval() for each in networks]
    return TrainedModel(frozen[0], frozen[1], made, fabric, decoder=drawing, tone=ToneCurve())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each kind the model, its settings, and what MONAI made of its bundle; all by one Python."""
    root, models = tmp_path_factory.mktemp("bundles"), {}
    for kind, (_, _, prediction, guidance, decoder) in KINDS.items():
        sampler = "flow" if prediction == "flow" else "ddim_even"
        settings = config.Generate(sampler=sampler, num_inference_steps=STEPS, drawing_steps=3, **guidance)
        models[kind] = model_of(kind, decoder), settings
        bundle.write(models[kind][0], settings, root / kind, {"license": "A licence"}, SPACING)
    script = root / "run.py"
    script.write_text(RUN.replace("STEPS", str(STEPS)))
    # -I: neither the folder nor PYTHONPATH, so that this package is not even there where it is not installed
    done = subprocess.run(
        [sys.executable, "-I", str(script), *(str(root / kind) for kind in KINDS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, models


@pytest.mark.parametrize("kind", KINDS)
def test_monai_alone_makes_the_same_image(made, kind):
    root, models = made
    model, settings = models[kind]
    found = load_file(root / kind / "made.safetensors")
    told = torch.tensor([[1.5, float("nan")]])
    latents = model.sample(found["noise"], Condition(told), settings)
    image = model.decode(latents, found["drawing_noise"], drawing_steps=settings.drawing_steps)
    assert found["latents"].std() > 0.1 and found["image"].shape == (1, *IMAGE)
    assert float((found["latents"] - latents).abs().max()) < 2e-4 * float(latents.abs().max())
    assert float((found["image"] - image).abs().max()) < 2e-4


def test_monai_alone_saves_voxels_of_their_size(made):
    root, _ = made
    (path,) = (root / "light/output").glob("*.nii.gz")
    saved = nib.load(path)
    assert saved.header.get_zooms() == SPACING and saved.shape == IMAGE[1:]
    np.testing.assert_allclose(saved.affine, Grid(IMAGE[1:], SPACING).affine)
    np.testing.assert_allclose(saved.get_fdata(), load_file(root / "light/made.safetensors")["image"][0, 0], atol=1e-6)


@pytest.mark.parametrize("name", [bundle.DECODER, bundle.DENOISER])
def test_a_network_tells_nothing_of_where_it_was_written(made, name):
    """Neither the name of a temporary file, which holds the host's, nor the paths of sources: its bytes are the same
    everywhere.
    """
    root, _ = made
    with zipfile.ZipFile(root / "light" / name) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    assert {member.split("/")[0] for member in members} == {"archive"}
    assert not any(member.endswith("serialization_id") for member in members), "a digest of what was left out"
    told = b"".join(members.values())
    assert str(Path(torch.__file__).parent).encode() not in told and b"/meddiff_steps/" not in told


def test_a_bundle_says_what_it_is(made):
    root, _ = made
    assert all((root / "light" / name).is_file() for name in BUNDLE)
    metadata = json.loads((root / "light/configs/metadata.json").read_text())
    data = metadata["network_data_format"]
    assert metadata["license"] == "A licence"
    assert data["inputs"]["covariates"]["channel_def"] == {"0": "age, in its unit", "1": "sex: 0 F, 1 M"}
    assert data["outputs"]["pred"]["spatial_shape"] == list(IMAGE[1:])
    assert metadata["spacing_mm"] == list(SPACING)
    assert {"version", "monai_version", "pytorch_version", "numpy_version", "task"} <= metadata.keys()
