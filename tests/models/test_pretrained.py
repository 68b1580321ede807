"""Weights of a MONAI bundle in our networks: the outputs are MONAI's own."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from monai_bundles import INFERENCE, network, run_by_monai, write_bundle

from meddiff_steps import config
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.pretrained.bundle import read_bundle
from meddiff_steps.models.pretrained.checkpoint import read_checkpoint
from meddiff_steps.models.pretrained.convert import Sections, convert
from meddiff_steps.models.pretrained.names import renamed
from meddiff_steps.models.pretrained.study import sections_of as study_of
from meddiff_steps.models.trained import TrainedModel, load_denoiser, load_first_stage, save_image_network

COVARIATES = {
    "age": config.ContinuousCovariate(unit="year", range=(40, 90)),
    "brain_ml": config.ContinuousCovariate(unit="mL", range=(900, 2000)),
    "sex": config.CategoricalCovariate(levels=["M", "F"]),
    "ventricles_ml": config.ContinuousCovariate(unit="mL", range=(0, 150)),
}
INPUTS = [
    {"covariate": "sex", "levels": [1.0, 0.0]},
    {"covariate": "age", "range": [44, 82]},
    {"covariate": "ventricles_ml", "range": [5, 105]},
    {"covariate": "brain_ml", "range": [900, 1900]},
]
SUBJECTS = pd.DataFrame(
    {"age": [44.0, 63.0], "brain_ml": [1300.0, 1900.0], "sex": ["F", "M"], "ventricles_ml": [25.0, 55.0]}
)
#: The same in the bundle's order and scale.
TOLD = torch.tensor([[0.0, 0.0, 0.2, 0.4], [1.0, 0.5, 0.5, 1.0]])
SHAPE = (32, 32, 16)
STUDY = {
    "study": "a",
    "cohort": {"source": "simulated"},
    "covariates": {"age": {"unit": "year", "range": [0, 99]}},
    "plan": [{"name": "syn", "subjects": 1}],
}
LATENT = (3, 8, 8, 4)


def sections_of(bundle, inputs=INPUTS, **changes):
    """What a study has that follows `read_bundle`, with what only its user knows: its covariates."""
    said = read_bundle(bundle)
    diffusion = json.loads(json.dumps(said.diffusion))
    diffusion["published"]["inputs"] = inputs
    return Sections(
        config.Autoencoder.model_validate(said.autoencoder | changes.get("autoencoder", {})),
        config.Decoder(network=None),
        config.Diffusion.model_validate(diffusion | changes.get("diffusion", {})),
        changes.get("covariates", COVARIATES),
        changes.get("shape", SHAPE),
    )


def model_of(bundle, out, inputs=INPUTS, **changes):
    convert(config.InitFrom(path=str(bundle)), sections_of(bundle, inputs, **changes), out)
    fabric = make_fabric(config.Compute(device="cpu", precision="32-true"), 1)
    return TrainedModel.load(out / "autoencoder", out / "diffusion", fabric, toned=False)


def close(found, expected):
    """Equal but for the order of float32 sums: our networks hold images channels-last."""
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle") / "brain")


@pytest.fixture(scope="module")
def model(bundle, tmp_path_factory):
    return model_of(bundle, tmp_path_factory.mktemp("init"))


@torch.no_grad()
def test_the_autoencoder_is_monais(bundle, model):
    theirs, _, _ = run_by_monai(bundle)
    x = torch.rand(2, 1, *SHAPE)
    mean, deviation = theirs.encode(x)
    posterior = model.first_stage.encode(x)
    close(posterior.mean, mean)
    close((0.5 * posterior.log_variance).exp(), deviation)
    z = torch.randn(2, *LATENT)
    close(model.first_stage.decode(z), theirs.decode_stage_2_outputs(z))
    assert theirs.decode_stage_2_outputs(z).std() > 0.01  # of networks that do something


#: Both ways of that bundle, each way alone, and none; blocks and heads of other published models.
KINDS = {
    "both": {},
    "concatenation": {"with_conditioning": False, "cross_attention_dim": None},
    "cross_attention": {"in_channels": 3},
    "unconditional": {"with_conditioning": False, "cross_attention_dim": None, "in_channels": 3},
    "plain blocks": {"resblock_updown": False, "upcast_attention": False, "num_head_channels": 8},
    "many heads": {"num_head_channels": [8, 8, 12], "transformer_num_layers": 2, "num_res_blocks": 2},
}
#: Without projections after attention; MONAI cannot load the old names of these where blocks are transformers.
NO_PROJECTION = {
    "no projection": {"include_fc": False},
    "concatenation": KINDS["concatenation"] | {"include_fc": False},
}


@pytest.mark.parametrize(
    ("kind", "changes", "old"),
    [
        *((kind, changes, old) for kind, changes in KINDS.items() for old in (True, False)),
        *((kind, changes, False) for kind, changes in NO_PROJECTION.items()),
    ],
)
@torch.no_grad()
def test_the_unet_is_monais(tmp_path, kind, changes, old):
    folder = write_bundle(tmp_path / "bundle", {"diffusion_def": changes}, old=old)
    model = model_of(folder, tmp_path / "init", [] if kind == "unconditional" else INPUTS)
    # What monai-generative computes: its self-attention has no projection, whatever its weights hold
    plain = old and not changes.get("with_conditioning", True)
    _, unet, _ = run_by_monai(folder, **({"include_fc": False} if plain else {}))
    x, timesteps = torch.randn(2, *LATENT), torch.tensor([3.0, 977.0])
    maps = TOLD[:, :, None, None, None].expand(-1, -1, *LATENT[1:])
    concatenated = kind not in ("cross_attention", "unconditional")
    expected = unet(
        torch.cat([x, maps], 1) if concatenated else x,
        timesteps=timesteps.long(),
        context=None if "concat" in kind or "uncond" in kind else TOLD[:, None],
    )
    close(model.denoise(x, timesteps, model.condition(SUBJECTS)), expected)
    assert expected.std() > 0.01


@torch.no_grad()
def ddim(bundle, noise, told, steps):
    """The loop of the bundle's own scripts/sampler.py, on the timesteps of MONAI 1.4, for which it was written."""
    autoencoder, unet, scheduler = run_by_monai(bundle)
    scheduler.set_timesteps(steps)
    # MONAI 1.6 has other timesteps, which its step does not follow: t - 1000 // steps is none of them.
    scheduler.timesteps = torch.arange(0, 1000, 1000 // steps).flip(0)
    maps = told[:, :, None, None, None].expand(-1, -1, *noise.shape[2:])
    x = noise
    for t in scheduler.timesteps:
        made = unet(torch.cat([x, maps], 1), timesteps=t[None].expand(len(x)), context=told[:, None])
        x, _ = scheduler.step(made, t, x)
    return x, autoencoder.decode_stage_2_outputs(x)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_whole_sample_is_that_of_monais_ddim(tmp_path, prediction):
    folder = write_bundle(tmp_path / "bundle", {"scheduler": {"prediction_type": prediction}})
    model = model_of(folder, tmp_path / "init")
    noise = torch.randn(2, *LATENT)
    latents, images = ddim(folder, noise, TOLD, 50)
    settings = config.Generate(sampler="ddim_even", num_inference_steps=50, guidance_scale=1.0)
    found = model.sample(noise, model.condition(SUBJECTS), settings)
    scale = float(latents.abs().max())
    assert float((found - latents).abs().max()) < 1e-4 * scale
    assert float((model.first_stage.decode(found) - images).abs().max()) < 1e-4 * float(images.abs().max())


# -------------------------------------------------------------------------- files, MAISI, models of our own


@torch.no_grad()
def test_files_without_a_bundle_are_the_studys_networks(bundle, tmp_path):
    """As BrLP publishes: .pth files alone, in a trainer's dictionary and behind wrappers' names."""
    tensors = torch.load(bundle / "models/model.pt", weights_only=True)
    wrapped = {f"_orig_mod.module.{name}": value for name, value in tensors.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "unet.pth")
    base = config.InitFrom(
        autoencoder=str(bundle / "models/autoencoder.pt"), diffusion=str(tmp_path / "unet.pth"), scale_factor=0.5
    )
    convert(base, sections_of(bundle), tmp_path / "init")
    denoiser, made, card = load_denoiser(tmp_path / "init/diffusion")
    _, unet, _ = run_by_monai(bundle)
    expected = renamed(tensors, unet, "test")
    assert all(torch.equal(denoiser.network.unet.state_dict()[name], value) for name, value in expected.items())
    assert float(denoiser.scale) == 2.0 and card["scale_factor"] == 0.5 and card["base"]["kind"] == "file"
    assert torch.equal(torch.from_numpy(made.encoding.encode(SUBJECTS)[:, 0]), torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize(
    ("said", "scale"),
    [
        ({"s": 0.5, "scale_factor": "@s"}, 0.5),
        ({"inferer": {"_target_": "monai.inferers.LatentDiffusionInferer", "scale_factor": 0.25}}, 0.25),
        ({"inferer": {"_target_": "monai.inferers.LatentDiffusionInferer"}}, 1.0),
        ({"s": "$1.0 / 5.0", "scale_factor": "@s"}, None),
    ],
)
def test_the_scale_factor_is_the_bundles(tmp_path, said, scale):
    bundle = write_bundle(tmp_path / "bundle")
    path = bundle / "configs/inference.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    base = config.InitFrom(path=str(bundle))
    if scale is None:
        with pytest.raises(UserError, match=r"'\$1\.0 / 5\.0'.*init_from\.scale_factor"):
            convert(base, sections_of(bundle), tmp_path / "init")
        assert "`init_from.scale_factor`, which is '$1.0 / 5.0' here" in study_of(bundle)
        base, scale = config.InitFrom(path=str(bundle), scale_factor=0.2), 0.2
    convert(base, sections_of(bundle), tmp_path / "init")
    assert read_json(tmp_path / "init/diffusion/card.json")["scale_factor"] == scale


@torch.no_grad()
def test_what_is_not_known_is_told_as_the_inputs_value(bundle, tmp_path):
    inputs = [{"covariate": "age", "range": [40, 90], "value": 0.25}, {"value": 0.125}, {"value": 0.7}, {"value": 0.5}]
    convert(config.InitFrom(path=str(bundle)), sections_of(bundle, inputs), tmp_path)
    denoiser, made, _ = load_denoiser(tmp_path / "diffusion")
    covariates = torch.from_numpy(made.encoding.encode(SUBJECTS.assign(age=[65.0, np.nan])))
    told = denoiser.network.numbers(covariates)
    assert torch.allclose(told, torch.tensor([[0.5, 0.125, 0.7, 0.5], [0.25, 0.125, 0.7, 0.5]]))


#: As NV-Generate-CTMR publishes, but for the sizes of the networks.
MAISI = {
    "spatial_dims": 3,
    "latent_channels": 4,
    "autoencoder_def": {
        "_target_": "monai.apps.generation.maisi.networks.autoencoderkl_maisi.AutoencoderKlMaisi",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 1,
        "latent_channels": 4,
        "num_channels": [8, 8, 16],
        "num_res_blocks": [1, 1, 1],
        "norm_num_groups": 4,
        "norm_eps": 1e-6,
        "attention_levels": [False, False, False],
        "with_encoder_nonlocal_attn": False,
        "with_decoder_nonlocal_attn": False,
        "use_checkpointing": False,
        "use_convtranspose": False,
        "norm_float16": False,
        "num_splits": 1,
        "dim_split": 1,
    },
    "diffusion_unet_def": {
        "_target_": "monai.apps.generation.maisi.networks.diffusion_model_unet_maisi.DiffusionModelUNetMaisi",
        "spatial_dims": 3,
        "in_channels": 4,
        "out_channels": 4,
        "num_channels": [8, 16],
        "attention_levels": [False, True],
        "norm_num_groups": 8,
        "num_head_channels": [0, 8],
        "num_res_blocks": 1,
        "include_spacing_input": True,
        "num_class_embeds": 5,
        "resblock_updown": True,
        "include_fc": True,
    },
    "noise_scheduler": {
        "_target_": "monai.networks.schedulers.rectified_flow.RFlowScheduler",
        "num_train_timesteps": 1000,
        "use_timestep_transform": True,
    },
}


def write_maisi(folder):
    """Its configuration, which defines more networks and refers to numbers by name."""
    published = MAISI | {
        "autoencoder_def": MAISI["autoencoder_def"] | {"spatial_dims": "@spatial_dims"},
        "diffusion_unet_def": MAISI["diffusion_unet_def"] | {"in_channels": "@latent_channels"},
        "mask_generation_autoencoder_def": MAISI["autoencoder_def"] | {"out_channels": 125},
    }
    (folder / "config_network_rflow.json").write_text(json.dumps(published))
    return folder / "config_network_rflow.json"


@torch.no_grad()
def test_a_maisi_network_is_nvidias(tmp_path):
    """As NV-Generate-CTMR publishes: a configuration, and files beside it; the scale factor lies with the weights."""
    path = write_maisi(tmp_path)
    autoencoder, unet = (network(MAISI[name], 3) for name in ("autoencoder_def", "diffusion_unet_def"))
    torch.save(autoencoder.state_dict(), tmp_path / "autoencoder_v1.pt")
    torch.save(
        {"unet_state_dict": unet.state_dict(), "scale_factor": torch.tensor(0.8), "epoch": 2}, tmp_path / "unet.pt"
    )
    sections = sections_of(path, [], diffusion={})
    published = sections.diffusion.published
    maisi = published.maisi.model_copy(update={"class_label": 3, "spacing_mm": (1.0, 1.5, 2.0)})
    told = published.model_copy(update={"maisi": maisi})
    sections = replace(sections, diffusion=sections.diffusion.model_copy(update={"published": told}))
    files = {"autoencoder": str(tmp_path / "autoencoder_v1.pt"), "diffusion": str(tmp_path / "unet.pt")}
    convert(config.InitFrom(path=str(path), **files), sections, tmp_path / "init")
    stage, _ = load_first_stage(tmp_path / "init/autoencoder")
    denoiser, made, _ = load_denoiser(tmp_path / "init/diffusion")
    x, z, timesteps = torch.rand(1, 1, *SHAPE), torch.randn(2, 4, 8, 8, 4), torch.tensor([1000.0, 17.5])
    close(stage.encode(x).mean, autoencoder.encode(x)[0])
    close(stage.decode(z), autoencoder.decode_stage_2_outputs(z))
    expected = unet(
        z,
        timesteps,
        class_labels=torch.tensor([3, 3]),
        spacing_tensor=100.0 * torch.tensor([[1.0, 1.5, 2.0]]).expand(2, 3),
    )
    close(-denoiser(z, timesteps, Condition(torch.zeros(2, len(COVARIATES)))), expected)
    assert float(denoiser.scale) == pytest.approx(1 / 0.8) and made.settings.prediction_type == "flow"


def test_models_of_our_own_are_taken_over(bundle, model, tmp_path):
    """A model release, here of what came from a bundle: the same weights, their source named."""
    folder = tmp_path / "released"
    convert(config.InitFrom(path=str(bundle)), sections_of(bundle), folder)
    sections = sections_of(bundle)
    digests = convert(config.InitFrom(path=str(folder)), sections, tmp_path / "init")
    card = read_json(tmp_path / "init/diffusion/card.json")
    assert digests == {name: read_json(folder / name / "card.json")["weights_sha256"] for name in digests}
    assert card["base"]["kind"] == "model release" and card["base"]["weights_sha256"] == digests["diffusion"]

    def refused(pattern, **changes):
        with pytest.raises(UserError, match=pattern):
            convert(config.InitFrom(path=str(folder)), replace(sections, **changes), tmp_path / "no")

    refused(
        r"channels is \[16, 16, 16\], expected \[8, 16, 16\]",
        autoencoder=changed(sections.autoencoder, "channels", [16, 16, 16]),
    )
    refused(
        r"prediction_type is v_prediction, expected epsilon",
        diffusion=changed(sections.diffusion, "prediction_type", "v_prediction"),
    )
    refused(r"Set preprocess\.shape to .*\[32, 32, 16\]", image_shape=(32, 32, 32))
    sex = config.CategoricalCovariate(levels=["F", "M"])
    refused("levels in the same order", covariates=COVARIATES | {"sex": sex})
    with pytest.raises(UserError, match="there is no decoder among these models"):
        convert(config.InitFrom(path=str(folder), models=["decoder"]), sections, tmp_path / "no")


def test_codebooks_of_our_own_are_taken_over(tmp_path):
    """Their size belongs to the network, how they are trained does not."""
    settings = config.Autoencoder(
        network="vq", channels=[8, 16], latent_channels=4, codebook={"entries": 8, "parts": 2, "decay": 0.9}
    )
    stage, released = build_first_stage(settings, 3), tmp_path / "released/autoencoder"
    save_image_network(
        stage, released, (1, *SHAPE), {"settings": settings.model_dump(mode="json"), "latent_shape": [4, 8, 8, 4]}
    )
    said = yaml.safe_load(study_of(released.parent))["autoencoder"]
    assert said["codebook"] == {"entries": 8, "parts": 2}

    def taken(codebook):
        given = {"path": str(released.parent), "models": ["autoencoder"]}
        study = config.parse_study(STUDY | {"init_from": given, "autoencoder": said | {"codebook": codebook}}, "test")
        frozen = config.load_stage(config.freeze(study, "init_weights", tmp_path), "init_weights")
        convert(study.init_from, replace(Sections.of_study(frozen), image_shape=SHAPE), tmp_path / "init")

    taken({"entries": 8, "parts": 2, "commitment_weight": 0.5})
    found, _ = load_first_stage(tmp_path / "init/autoencoder")
    assert all(torch.equal(value, stage.state_dict()[name]) for name, value in found.state_dict().items())
    with pytest.raises(UserError, match=r"codebook\.parts is 4, expected 2"):
        taken({"entries": 8, "parts": 4})


def changed(section, key, value):
    return section.model_copy(update={key: value})


# --------------------------------------------------------------------------------------- what is refused


class Stranger:
    """What a foreign pickle may run when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_foreign_pickle_is_refused_and_not_run(bundle, tmp_path):
    for name, content in (
        ("all.pt", {"state_dict": {"a": torch.zeros(1)}, "hook": Stranger(tmp_path / "run")}),
        ("network.pt", network(INFERENCE["autoencoder_def"], 0)),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=r"not a file of tensors alone .*torch\.save\(network\.state_dict"):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "run").exists()
    (tmp_path / "half.pt").write_bytes((bundle / "models/model.pt").read_bytes()[:3000])
    with pytest.raises(UserError, match="not a file of tensors alone"):
        read_checkpoint(tmp_path / "half.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"no weights were found in it; it holds \['epoch'\]"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(UserError, match="there is no such file.*published without their weights"):
        read_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("conv_in.conv.weight"), r"1 missing, such as conv_in\.conv\.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), r"1 unexpected, such as extra"),
        (
            lambda tensors: tensors.update({"conv_in.conv.bias": torch.zeros(9)}),
            r"1 tensors have another shape \(conv_in\.conv\.bias is \[9\], expected \[8\]",
        ),
    ],
)
def test_incomplete_weights_are_refused_by_name(bundle, tmp_path, change, said):
    tensors = torch.load(bundle / "models/model.pt", weights_only=True)
    change(tensors)
    torch.save(tensors, tmp_path / "model.pt")
    base = config.InitFrom(path=str(bundle), diffusion=str(tmp_path / "model.pt"))
    with pytest.raises(UserError, match=f"{said}.*read_bundle"):
        convert(base, sections_of(bundle), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"autoencoder_def": {"_target_": "scripts.own.Network"}, "diffusion_def": {"_target_": "a.B"}},
            "no network that",
        ),
        ({"autoencoder_def": {"attention_levels": [False, False, True]}}, "attention_levels.*cannot be used"),
        ({"autoencoder_def": {"num_res_blocks": [1, 2, 2]}}, "one number for all levels"),
        ({"diffusion_def": {"norm_eps": 1e-5}}, "norm_eps"),
        ({"diffusion_def": {"channels": "$[8] * 3"}}, "nothing of a bundle is run here"),
        ({"diffusion_def": {"cross_attention_dim": 5}}, "Expected the same numbers in both"),
        ({"scheduler": {"schedule": "sigmoid_beta"}}, "schedule sigmoid_beta"),
        ({"scheduler": {"beta_schedule": "scaled_linear"}}, r"the scheduler has \['beta_schedule'\].*known are"),
        (
            {"scheduler": {"_target_": "scripts.own.EdmScheduler"}},
            r"found: \['scripts\.own\.EdmScheduler'\].*noise_sch",
        ),
    ],
)
def test_networks_that_are_not_known_are_refused(tmp_path, changes, said):
    content = json.loads(json.dumps(INFERENCE))
    for name, values in changes.items():
        content[name] |= values
    (tmp_path / "inference.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_bundle(tmp_path)


def test_another_size_and_another_study_are_refused_with_what_to_set(bundle, tmp_path):
    def refused(pattern, base=None, **changes):
        with pytest.raises(UserError, match=pattern):
            convert(base or config.InitFrom(path=str(bundle)), replace(sections_of(bundle), **changes), tmp_path)

    sections = sections_of(bundle)
    refused(r"Set preprocess\.shape: \[32, 32, 16\].*other_shape", image_shape=(32, 32, 32))
    refused(r"stem is haar, expected none", autoencoder=changed(sections.autoencoder, "stem", "haar"))
    refused(r"beta_end is 0\.02, expected 0\.0205", diffusion=changed(sections.diffusion, "beta_end", 0.02))
    fewer = changed(sections.diffusion.published, "inputs", sections.diffusion.published.inputs[:3])
    refused(r"published\.inputs is", diffusion=changed(sections.diffusion, "published", fewer))
    refused("hold no drawing decoder", config.InitFrom(path=str(bundle), models=["autoencoder", "decoder"]))
    (tmp_path / "empty").mkdir()
    refused("no MONAI bundle and no model release", config.InitFrom(path=str(tmp_path / "empty")))
    other = config.InitFrom(path=str(bundle), other_shape=True)
    convert(other, replace(sections, image_shape=(32, 32, 32)), tmp_path / "out")
    assert read_json(tmp_path / "out/diffusion/card.json")["latent_shape"] == [3, 8, 8, 8]


def test_what_read_bundle_prints_is_the_study_that_is_accepted(bundle, tmp_path):
    text = study_of(bundle)
    assert "Inputs, by the bundle's words: Gender, Age, Ventricular volume, Brain volume" in text
    said = yaml.safe_load(text)
    assert said["init_from"]["licence"] == "A licence of the weights" and said["preprocess"]["shape"] == [*SHAPE]
    inputs = {"published": said["diffusion"]["published"] | {"inputs": INPUTS}}
    whole = said | {
        "study": "printed",
        "cohort": {"source": "simulated"},
        "covariates": {name: each.model_dump(mode="json") for name, each in COVARIATES.items()},
        "plan": [{"name": "syn", "subjects": 1}],
        "diffusion": said["diffusion"] | inputs,
    }
    study = config.parse_study(whole, "test")
    frozen = config.load_stage(config.freeze(study, "init_weights", tmp_path), "init_weights")
    assert convert(study.init_from, Sections.of_study(frozen), tmp_path).keys() == {"autoencoder", "diffusion"}


def test_a_maisi_study_says_its_modality_and_its_voxels(tmp_path):
    text = study_of(write_maisi(tmp_path))
    assert "To be completed: `published.maisi`" in text and "# use_timestep_transform: true" in text
    said = yaml.safe_load(text)
    files = {"autoencoder": "a.pt", "diffusion": "b.pt"}
    grid = {"preprocess": {"shape": [32, 32, 32], "spacing_mm": [1.0, 1.0, 2.0]}}

    def parsed(maisi, **generate):
        published = said["diffusion"]["published"] | {"maisi": said["diffusion"]["published"]["maisi"] | maisi}
        changes = {
            "init_from": said["init_from"] | files,
            "diffusion": said["diffusion"] | {"published": published},
            "generate": said["generate"] | generate,
        }
        return config.parse_study(STUDY | said | grid | changes, "test")

    told = {"class_label": 3, "spacing_mm": [1.0, 1.0, 2.0]}
    parsed(told)
    for maisi, generate, pattern in (
        ({"spacing_mm": [1.0, 1.0, 2.0]}, {}, "class_label: 0 is images of unknown modality"),
        ({"class_label": 3}, {}, r"spacing_mm: \[1\.0, 1\.0, 1\.0\], but voxels are \[1\.0, 1\.0, 2\.0\]"),
        (told, {"guidance_scale": 2.0}, "a MAISI network is told none; set 1"),
    ):
        with pytest.raises(UserError, match=pattern):
            parsed(maisi, **generate)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"autoencoder": {"optimiser": {"steps": 0}}},
            r"autoencoder\.optimiser\.steps: 0 leaves",
        ),
        ({"init_from": {"path": "x"}}, "knows the latents of its own autoencoder alone"),
        ({"init_from": {"licence": "x"}}, "no weights are named for"),
        ({"autoencoder": {"trains": "decoder"}}, "keeps the encoder as it is"),
        ({"init_from": {"path": "x", "models": ["autoencoder"]}, "second_model": {"subjects": 9}}, "fresh weights"),
    ],
)
def test_a_study_that_cannot_be_is_refused_when_it_is_read(changes, said):
    with pytest.raises(UserError, match=said):
        config.parse_study(STUDY | changes, "test")
