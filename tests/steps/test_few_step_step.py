"""The step `few_step`, and what is done with a student: grey levels, images, a comparison, another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_model_steps import OPTIMISER, Files

from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Compute, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.core.weights_digest import safetensors_digest
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.release.regeneration import find_models
from meddiff_steps.steps import few_step, scale, tone
from meddiff_steps.synthesis.generate import CohortGenerator

EXACT = Compute(device="cpu", precision="32-true")


class Distilled(Files):
    """A folder with a student of each method, in folders named by it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.shards = self.latents()
        files = [self.manifest, [self.shards], [self.images], folder / "autoencoder"]
        scale.run(self.frozen("scale"), *files, folder / "scale.safetensors", folder / "scale.json")
        for method in ("progressive", "consistency"):
            self.distil(method)

    def ask(self, method: str, **generate: Any) -> None:
        raw = self.study.model_dump(mode="json")
        raw["few_step"] = {"method": method, "num_inference_steps": 2, "teacher_steps": 4, "optimiser": OPTIMISER}
        raw["generate"] |= {"sampler": method, "num_inference_steps": None, "guidance_scale": 1.5} | generate
        self.study = parse_study(raw, "test")

    def distil(self, method: str, out: str | None = None, teacher: str = "diffusion") -> Path:
        self.ask(method)
        made = self.folder / (out or method)
        few_step.run(
            *(self.frozen("few_step"), self.manifest, [self.shards], self.folder / "scale.safetensors"),
            *(self.folder / teacher, made, self.folder / f"state-{out or method}"),
        )
        return made

    def model(self, folder: str, toned: bool = False) -> TrainedModel:
        f = self.folder
        return TrainedModel.load(f / "autoencoder", f / folder, make_fabric(EXACT, 1), toned=toned)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    return Distilled(tmp_path_factory.mktemp("few-step"))


def subjects(count: int = 7) -> pd.DataFrame:
    ages, index = np.linspace(30, 70, count), np.arange(count)
    table = pd.DataFrame({"sample_id": [f"syn{i}" for i in index], "index": index, "noise_index": index, "age": ages})
    keys = [seed_key("x/syn", i, 0, "noise") for i in range(count)]
    return table.assign(cohort_root="x/syn", attempt=0, seed_key=keys)


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_a_student_says_whose_it_is_and_comes_out_again(files: Distilled, method: str) -> None:
    folder = files.folder / method
    card = json.loads((folder / "card.json").read_text())
    assert card["teacher"] == json.loads((files.folder / "diffusion/card.json").read_text())["weights_sha256"]
    assert card["few_step"] == {
        "method": method,
        "num_inference_steps": 2,
        "guidance": "classifier_free",
        "guidance_scale": 1.5,
        "guidance_interval": None,
    }
    curve = pd.read_parquet(folder / "history.parquet")
    assert set(curve["metric"]) == {"train/loss", "val/loss"} and np.isfinite(curve["value"]).all()
    assert card["validation_loss"] == curve[curve["metric"] == "val/loss"]["value"].iloc[-1]
    again = files.distil(method, f"{method}-again")
    for name in ("model.safetensors", "card.json", "history.parquet"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_who_is_drawn_with_whom_changes_no_bit_of_a_students_images(files: Distilled, method: str) -> None:
    files.ask(method)
    generator = CohortGenerator(files.model(method), files.study.generate.model_copy(update={"num_inference_steps": 2}))
    whole = {name: image.tobytes() for name, image in generator.images(subjects(), "whole")}
    assert len(set(whole.values())) == 7
    parts: dict[str, bytes] = {}
    for rows in ([5, 1, 6], [0, 2], [4, 3]):
        parts |= {name: image.tobytes() for name, image in generator.images(subjects().iloc[rows], "part")}
    assert parts == whole


def test_a_consistency_student_takes_fresh_noise_between_steps(files: Distilled) -> None:
    files.ask("consistency")
    model, settings = files.model("consistency"), files.study.generate
    drawn = {}
    for steps in (1, 2):
        generator = CohortGenerator(model, settings.model_copy(update={"num_inference_steps": steps}))
        drawn[steps] = dict(generator.images(subjects(), "steps"))
    assert not np.allclose(drawn[1]["syn0"], drawn[2]["syn0"], atol=1e-3)


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_grey_levels_are_those_of_what_the_student_draws(files: Distilled, method: str) -> None:
    files.ask(method)
    folder = files.folder / method
    arguments = {"autoencoder": files.folder / "autoencoder", "diffusion": folder, "out": folder}
    tone.run(files.frozen("tone"), files.manifest, [files.images], **arguments)
    model = files.model(method, toned=True)
    assert model.digests["tone"] == json.loads((folder / "tone.json").read_text())["weights_sha256"]
    with pytest.raises(UserError, match="this model is none"):
        tone.run(
            files.frozen("tone"), files.manifest, [files.images], **arguments | {"diffusion": folder / "../diffusion"}
        )


def test_a_student_cannot_be_inverted_nor_distilled(files: Distilled) -> None:
    model = files.model("progressive")
    with pytest.raises(UserError, match="cannot be inverted"):
        model.invert(None, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is a student itself"):
        files.distil("progressive", "of-a-student", teacher="progressive")


def test_regeneration_finds_the_student_of_a_study(files: Distilled, tmp_path: Path) -> None:
    (tmp_path / "few_step").symlink_to(files.folder / "progressive")
    for name in ("autoencoder", "diffusion"):
        (tmp_path / name).symlink_to(files.folder / name)
    recipe = {
        "autoencoder": safetensors_digest(files.folder / "autoencoder/model.safetensors"),
        "diffusion": safetensors_digest(files.folder / "progressive/model.safetensors"),
    }
    assert find_models(tmp_path, recipe)["diffusion"] == tmp_path / "few_step"


def test_the_study_says_who_draws(files: Distilled) -> None:
    files.ask("consistency", num_inference_steps=1)
    study = files.study
    assert study.student_draws and study.drawn_by_student() is study
    assert study.drawn_by_teacher().generate.sampler == "dpmpp" and not study.drawn_by_teacher().student_draws
    files.ask("progressive", sampler="unipc", num_inference_steps=9)
    study = files.study
    assert study.drawn_by_teacher() is study
    frozen = json.loads(freeze(study.drawn_by_student(), "tone", files.folder / "frozen").read_text())["generate"]
    assert (frozen["sampler"], frozen["num_inference_steps"], frozen["guidance_scale"]) == ("progressive", 2, 1.5)
