"""Models that come with the package, and studies that start from them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning_fabric import Fabric
from safetensors.torch import load_file
from test_bundle import model_of

from meddiff_steps import config
from meddiff_steps.cohort.covariates import RESERVED
from meddiff_steps.command import init
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import CHECKSUMS, read_json, sha256_file
from meddiff_steps.imaging.encoding import Grid, decode, read_mark
from meddiff_steps.models.first_stage.base import latent_shape
from meddiff_steps.models.pretrained.convert import Sections, convert
from meddiff_steps.models.tone import ToneCurve
from meddiff_steps.models.trained import TrainedModel, save_denoiser, save_image_network, save_tone
from meddiff_steps.release import card, shipping
from meddiff_steps.release.facts import with_base
from meddiff_steps.release.starting import examples, spread, study_text
from meddiff_steps.report.sections import given_weights
from meddiff_steps.steps import init_weights

IMAGE = (1, 8, 16, 8)
LICENCE = "A licence of the models"
#: Of the model that `model_of` makes.
STAGE = config.Autoencoder(network="resnet", channels=[8, 16], norm_num_groups=4, latent_channels=4)


def released(folder):
    """A model release of networks with random weights."""
    model = model_of("light", True)
    said = {"settings": STAGE.model_dump(mode="json"), "scans": {"train": 7}}
    stage = said | {"latent_shape": list(latent_shape(STAGE, IMAGE))}
    save_image_network(model.first_stage, folder / "autoencoder", IMAGE, stage)
    decoder = config.Decoder(channels=8, num_res_blocks=1)
    save_image_network(model.decoder, folder / "decoder", IMAGE, said | {"settings": decoder.model_dump(mode="json")})
    save_denoiser(model.denoiser, model.card, folder / "diffusion", {"scans": {"train": 7}})
    save_tone(ToneCurve(), folder / "diffusion", {})
    made = {
        "study": "given",
        "seed": "given",
        "title": "",
        "cohort": {"source": "simulated"},
        "covariates": {
            "age": {"unit": "year", "range": [40, 90], "column": None, "description": "Age"},
            "sex": {"levels": ["F", "M"], "column": None, "description": ""},
        },
        "preprocess": {"shape": list(IMAGE[1:]), "spacing_mm": 20.0, "registration": None, "center": "image"},
        "variants": {"count": 2, "flip": True},
        "generate": {"sampler": "dpmpp", "guidance_scale": 1.5, "num_inference_steps": 3, "drawing_steps": 2},
        "release": {"suffix": "T1w"},
    }
    (folder / "config.json").write_text(json.dumps(made))
    (folder / "README.md").write_text("# Models\n\n## In MONAI\n\nA bundle.\n\n## Licence\n\nOne.\n")
    (folder / "configs").mkdir()
    (folder / "configs/metadata.json").write_text(json.dumps({"name": "Given", "version": "1", "license": LICENCE}))
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return released(tmp_path_factory.mktemp("shipping") / "given")


@pytest.fixture(scope="module")
def shipped(release, tmp_path_factory):
    out = tmp_path_factory.mktemp("shipped") / "small"
    out.mkdir()
    (out / "LICENSE").write_text("Terms")
    shipping.ship(release, out)
    return out


def test_shipped_models_are_half_as_large_and_say_what_they_were(release, shipped):
    for model in ("autoencoder", "decoder", "diffusion"):
        card, whole = read_json(shipped / model / "card.json"), read_json(release / model / "card.json")
        assert card["full_precision_sha256"] == whole["weights_sha256"] != card["weights_sha256"]
    small, large = (load_file(each / "autoencoder/model.safetensors") for each in (shipped, release))
    assert {value.dtype for value in small.values()} == {torch.float16} and small.keys() == large.keys()
    # what is no weight is not rounded
    small, large = (load_file(each / "diffusion/model.safetensors") for each in (shipped, release))
    assert torch.equal(small["effects.effects"], large["effects.effects"])
    readme = (shipped / "README.md").read_text()
    assert "## As shipped" in readme and "## In MONAI" not in readme and "## Licence" in readme
    listed = dict(reversed(line.split()) for line in (shipped / CHECKSUMS).read_text().splitlines())
    assert listed["LICENSE"] == sha256_file(shipped / "LICENSE") and "diffusion/model.safetensors" in listed


def test_shipped_models_draw_what_the_whole_ones_draw(release, shipped, tmp_path):
    images = []
    for models in (release, shipped):
        picture = examples(models, 2, tmp_path / models.name)
        assert read_mark(picture)
        names = sorted((tmp_path / models.name).glob("*.nii.gz"))
        assert [name.name for name in names] == ["sub-00001_T1w.nii.gz", "sub-00002_T1w.nii.gz"]
        images.append([decode(name, Grid(IMAGE[1:], 20.0)).stored for name in names])
        table = pd.read_csv(tmp_path / models.name / "participants.tsv", sep="\t")
        assert list(table["sex"]) == ["F", "M"] and table["age"].between(40, 90).all()
    assert not np.array_equal(images[0][0], images[0][1]), "subjects differ"
    assert np.abs(np.array(images[0]) - np.array(images[1])).mean() < 5  # of 1000; another precision
    more = examples(shipped, 3, tmp_path / "more").parent
    again = decode(more / "sub-00002_T1w.nii.gz", Grid(IMAGE[1:], 20.0)).stored
    np.testing.assert_array_equal(again, images[1][1])  # the same subject, however many are drawn


def test_what_cannot_be_shipped_is_refused(release, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="LICENSE: not there"):
        shipping.ship(release, tmp_path)
    (tmp_path / "LICENSE").touch()
    monkeypatch.setattr(shipping, "LARGEST", 1000)
    with pytest.raises(UserError, match="MB, at most"):
        shipping.ship(release, tmp_path)
    unlike = shutil.copytree(release, tmp_path / "unlike-monai")
    shutil.rmtree(unlike / "configs")
    (out := tmp_path / "out").mkdir()
    (out / "LICENSE").touch()
    with pytest.raises(UserError, match=r"configs/metadata.json not there.*MONAI bundle.*student.*cannot be shipped"):
        shipping.ship(unlike, out)
    assert [path.name for path in out.iterdir()] == ["LICENSE"]
    network = torch.nn.Linear(2, 2)
    network.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match="float16"):
        shipping.halved(network)


def test_models_are_found_by_name_or_folder(shipped):
    assert shipping.models_named(str(shipped)) == shipped
    with pytest.raises(UserError, match="With this package come: .*model-release"):
        shipping.models_named("no-such-models")


def test_a_study_that_starts_from_models_can_be_converted_and_names_them(shipped, tmp_path):
    text = study_text(shipped, shipped, "mine.yaml", "mine")
    (tmp_path / "mine.yaml").write_text(text)
    study = config.load_study(tmp_path / "mine.yaml")
    assert study.init_from is not None and study.init_from.licence == LICENCE and study.study == "mine"
    assert study.covariates["age"].unit == "year" and "<--" in text
    given = convert(study.init_from, Sections.of_study(study), tmp_path / "init")
    assert given.keys() == {"autoencoder", "decoder", "diffusion"}
    base = read_json(tmp_path / "init/diffusion/card.json")["base"]
    assert base["weights_sha256"] == read_json(shipped / "diffusion/card.json")["weights_sha256"]
    assert base["license"] == LICENCE and base["name"] == "Given"
    (lacking := tmp_path / "lacking").mkdir()
    with pytest.raises(UserError, match="config.json: not there"):
        study_text(lacking, lacking, "x.yaml", "x")


def test_whom_given_weights_learnt_from_must_not_be_held_out(release, tmp_path, caplog):
    models = shutil.copytree(release, tmp_path / "base/model-release")
    (tmp_path / "mine.yaml").write_text(study_text(models, models, "mine.yaml", "mine"))
    frozen = config.freeze(config.load_study(tmp_path / "mine.yaml"), "init_weights", tmp_path)
    rows = pd.DataFrame({name: [f"{name}{i}" for i in range(3)] for name in RESERVED})
    ours, theirs = tmp_path / "manifest.parquet", tmp_path / "base/cohort/manifest.parquet"
    theirs.parent.mkdir()
    rows.assign(split=["train", "calibration", "test"]).to_parquet(ours)
    init_weights.run(frozen, ours, tmp_path / "init")
    assert "nothing here says whom the given weights learnt from" in caplog.text
    rows.assign(split=["train", "train", "test"]).to_parquet(theirs)
    with pytest.raises(UserError, match=r"learnt from scans of 1 subject\(s\).*\(subject_id1\)"):
        init_weights.run(frozen, ours, tmp_path / "second")
    assert not (tmp_path / "second").exists()


def with_settings(release, folder, metadata=None, **sections):
    """The same models of a study with other settings; None: without a MONAI bundle."""
    shutil.copytree(release, folder)
    made = read_json(folder / "config.json")
    made |= {name: made.get(name, {}) | section for name, section in sections.items()}
    (folder / "config.json").write_text(json.dumps(made))
    if metadata is not None:
        (folder / "configs/metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"foreground": "ct", "window": [0, 80], "interpolation": "linear", "spacing_mm": [10.0, 10.0, 20.0]},
        {"percentiles": [1.0, 99.0], "bias_field": "n4", "brain_extraction": "deepbet", "center": "foreground"},
        {"depth": 8, "colour": "green"},
        {"brain_mask": "(path)", "registration": {"template": "(path)", "transform": "affine"}},
    ],
)
def test_a_study_that_starts_from_models_preprocesses_as_they_did(release, tmp_path, settings):
    others = {"exclude": "(path)", "shards": 7, "max_failed_share": 0.5, "channels": {"t2": {"path": "(path)"}}}
    models = with_settings(release, tmp_path / "models", preprocess=settings | others)
    text = study_text(models, models, "mine.yaml", "mine")
    (tmp_path / "mine.yaml").write_text(text)
    study = config.load_study(tmp_path / "mine.yaml")
    found = study.preprocess.model_dump(mode="json")
    for key in settings.keys() - {"brain_mask", "registration"}:
        assert found[key] == settings[key], key
    assert found["exclude"] is None and not found["channels"] and found["shards"] == 2
    simulated = not settings.keys() & {"foreground", "depth", "brain_mask"}
    assert study.cohort.source == ("simulated" if simulated else "bids")
    if "brain_mask" in settings:
        assert "(path)" not in text and "# <-- PATH: where yours lie" in text
        assert found["brain_mask"].startswith("PATH/") and found["registration"]["transform"] == "affine"


def test_a_study_that_starts_from_models_of_pictures(release, tmp_path):
    models = with_settings(release, tmp_path / "models", preprocess={"shape": [16, 16], "spacing_mm": None})
    card = models / "autoencoder/card.json"
    card.write_text(json.dumps(read_json(card) | {"image_shape": [1, 16, 16]}))
    (tmp_path / "mine.yaml").write_text(study_text(models, models, "mine.yaml", "mine"))
    study = config.load_study(tmp_path / "mine.yaml")
    assert study.preprocess.spacing_mm is None and study.cohort.source == "table"


def test_models_that_no_training_goes_on_from_start_no_study(release, tmp_path):
    student = with_settings(release, tmp_path / "student", generate={"sampler": "consistency"})
    with pytest.raises(UserError, match="generate.sampler is consistency, .* student of few steps.*without few_step"):
        study_text(student, student, "mine.yaml", "mine")
    told = with_settings(release, tmp_path / "told", text={"column": "report"})
    with pytest.raises(UserError, match="text.column is report, .*told texts"):
        study_text(told, told, "mine.yaml", "mine")


def test_terms_of_models_are_told_whole_and_not_made_up(release, tmp_path):
    for place, metadata in enumerate(({}, {"license": "not stated"})):
        models = with_settings(release, tmp_path / str(place), metadata)
        text = study_text(models, models, "mine.yaml", "mine")
        said = yaml.safe_load(text)
        assert said["release"]["licence"] == "to be decided" and "# <-- NOT STATED by these models" in text
        assert said["init_from"]["licence"] == ""
    terms = "CC-BY-SA-4.0; started from weights under: 'their own'\n # terms"
    models = with_settings(release, tmp_path / "several", {"license": terms})
    said = yaml.safe_load(study_text(models, models, "mine.yaml", "mine"))
    assert said["release"]["licence"] == said["init_from"]["licence"] == " ".join(terms.split())


def test_example_subjects_are_spread(shipped):
    encoding = model_of("light", True).encoding
    found = spread(encoding, 40)
    assert found["age"].between(40, 72.1).all() and found["age"].nunique() > 30
    assert (found["sex"] == "F").sum() == 20
    pd.testing.assert_frame_equal(spread(encoding, 3), found.head(3))


def meddiff(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(shipping.shipped_folder().parents[1])}
    command = [sys.executable, "-m", "meddiff_steps.command.app", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", shipping.shipped())
def test_models_that_come_with_the_package_are_whole_and_load(name):
    folder = shipping.shipped_folder() / name
    listed = dict(reversed(line.split()) for line in (folder / CHECKSUMS).read_text().splitlines())
    assert all(sha256_file(folder / file) == digest for file, digest in listed.items())
    assert {"LICENSE", "README.md", "autoencoder/model.safetensors"} <= listed.keys()
    model = TrainedModel.of_study(folder, Fabric(accelerator="cpu", devices=1))
    assert model.digests["diffusion"] == read_json(folder / "configs/metadata.json")["weights_sha256"]["diffusion"]
    yaml.safe_load(study_text(folder, folder, "x.yaml", "x"))


def test_init_from_models_writes_a_study_that_check_accepts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = shipping.shipped()[0]
    init.run(Path("mine.yaml"), name, images=1)
    assert (tmp_path / name / "LICENSE").is_file() and (tmp_path / name / "examples/preview.png").is_file()
    assert "meddiff check mine.yaml" in capsys.readouterr().out
    init.run(Path("second.yaml"), name, images=0)
    assert (tmp_path / "second.yaml").is_file(), "which goes on from the same copy"
    (tmp_path / name / "LICENSE").write_text("other terms")
    with pytest.raises(UserError, match="is there already"):
        init.run(Path("other.yaml"), name, images=0)
    assert not (tmp_path / "other.yaml").exists() and (tmp_path / name / "LICENSE").read_text() == "other terms"
    shutil.copy(shipping.models_named(name) / "LICENSE", tmp_path / name)
    checked = meddiff("check", "mine.yaml", "--elsewhere", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_what_was_trained_of_given_weights_is_told_with_their_licence():
    optimiser = {"steps": 5}
    base = {"kind": "model release", "weights_sha256": "b" * 64, "source_sha256": "a" * 64, "license": LICENCE}
    kinds = {
        "adapters of rank 4 alone were trained": {"trains": "adapters", "adapter_rank": 4},
        "the decoder alone was trained": {"trains": "decoder"},
        "pulled back to them by 2": {"trains": "all", "towards_base": 2.0},
    }
    for words, settings in kinds.items():
        made = {"parameters": 1, "weights_sha256": "c" * 64, "scans": {"train": 3}, "base": base}
        told = with_base(made | {"settings": settings | {"optimiser": optimiser}}, config.InitFrom(path="x"))
        text = card.model({"diffusion model": told})
        assert f"{'a' * 64} ({words}); licence: {LICENCE}" in text and card.GIVEN in text
        (sentence, warning) = given_weights({"diffusion model": told, "autoencoder": {"weights_sha256": "d"}})
        assert sentence.startswith("Diffusion model: Its weights started from") and warning == card.GIVEN
    plain = {"trains": "all", "towards_base": 0.0, "optimiser": optimiser}
    assert "trained" not in with_base(made | {"settings": plain}, config.InitFrom(path="x"))["base"]
    assert given_weights({"autoencoder": {"weights_sha256": "d"}}) == []
