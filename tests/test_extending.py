"""The files of docs/extending.md, written into a copy of the package, are variants that work; docs/architecture.md says
what runs again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/extending.md"
HOUSE = ROOT / "docs/architecture.md"
PACKAGE = ROOT / "meddiff_steps"
#: A row of the tables of what runs again: a definition ("a.b:c") or a key ("a.b"), and stages.
RERUN = re.compile(r"^\| `([\w.]+(?::\w+)?)` \| ([\w, ]+) \|$", re.M)
#: A file of the page: its path in a line, then its text.
FILE = re.compile(r"^`(meddiff_steps/[\w/]+\.py)`\n\n```python\n(.*?)^```$", re.M | re.S)
#: A table of the page: what there is of one kind.
TABLE = re.compile(r"<!-- (\w+) -->\n(.*?)<!-- end -->", re.S)
#: Every kind by its registry: the key that names one, and the value that it takes.
KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "SAMPLERS": ("generate.sampler", str),
    "FIRST_STAGES": ("autoencoder.network", str),
    "DRAWING_DECODERS": ("decoder.network", str),
    "DENOISERS": ("diffusion.network", str),
    "DETECTORS": ("privacy.detectors", lambda name: [name]),
    "METRICS": ("evaluate.metrics", lambda name: [name]),
    "FEATURE_SPACES": ("evaluate.spaces", lambda name: [name]),
    "ANOMALY_MAPS": ("anomaly.methods", lambda name: [name]),
    "OPERATORS": ("reconstruction.operators", lambda name: [name]),
}
STUDY: dict[str, Any] = {
    "study": "tiny",
    "cohort": {"source": "simulated"},
    "covariates": {"age": {"unit": "year", "range": [0, 120]}, "sex": {"levels": ["F", "M"]}},
    "plan": [{"name": "syn", "subjects": 3}],
}


def files() -> dict[str, str]:
    """Path below the repository, and text, of every file of the page."""
    return dict(FILE.findall(PAGE.read_text(encoding="utf-8")))


def copied(folder: Path) -> Path:
    """A copy of the package in a folder."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / PACKAGE.name


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and all files of the page."""
    folder = tmp_path_factory.mktemp("extended")
    copied(folder)
    for name, text in files().items():
        assert not (folder / name).exists(), f"{name} is there already: another example is needed"
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def found(extended: Path) -> dict[str, str]:
    """What the checks below said in a process that sees the copy alone; "" where nothing is wrong."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *files()],
        cwd=extended,
        env=os.environ | {"PYTHONPATH": str(extended)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.parametrize("check", ["names", *KEYS, "APPLICATIONS"])
def test_a_file_is_a_variant_that_works(found: dict[str, str], check: str) -> None:
    assert found[check] == ""


def test_a_new_sampler_reruns_nothing_of_a_study_that_uses_another(tmp_path: Path) -> None:
    from meddiff_steps.__main__ import STEPS
    from meddiff_steps.config import STAGES, parse_study, part_of, resolved
    from meddiff_steps.core.code_digest import Code

    study = parse_study(STUDY | {"sampler_study": {"samplers": ["dpmpp", "unipc"]}}, "test")
    content = resolved(study.model_dump(mode="json"))
    parts = {step: part_of(content, STAGES[step]) if step in STAGES else None for step in STEPS}
    package = copied(tmp_path)
    before, name = Code(package, package.name), file_of("SAMPLERS")
    (tmp_path / name).write_text(files()[name], encoding="utf-8")
    after = Code(package, package.name)
    assert [step for step, part in parts.items() if before.digest(step, part) != after.digest(step, part)] == []
    # Nothing was compared with itself: the sampler counts for whom it is chosen.
    chosen = {"generate": {"sampler": Path(name).stem}}
    assert f"meddiff_steps.diffusion.samplers.{Path(name).stem}:solver" in after.reached("generate", chosen)


def test_the_tables_of_what_runs_again_are_right() -> None:
    from meddiff_steps.config import STAGES, parse_study, part_of, resolved
    from meddiff_steps.core.code_digest import Code

    content = resolved(parse_study(STUDY, "test").model_dump(mode="json"))
    parts = {stage: part_of(content, STAGES[stage]) for stage in STAGES}
    code = Code(PACKAGE, PACKAGE.name)
    text = HOUSE.read_text(encoding="utf-8")
    said = dict(RERUN.findall(text[text.index("## What runs again") :]))
    assert sum(":" in what for what in said) > 9 and sum(":" not in what for what in said) > 9
    for what in said:
        if ":" in what:
            module, name = what.split(":")
            assert name in code.module(f"{PACKAGE.name}.{module}").definitions, what  # type: ignore[union-attr]
            found = [s for s, part in parts.items() if f"{PACKAGE.name}.{what}" in code.reached(s, part)]
        else:
            edited = json.loads(json.dumps(content))
            *sections, key = what.split(".")
            place = edited
            for section in sections:
                place = place[section]
            assert key in place, what
            place[key] = "something else"
            found = [s for s, part in parts.items() if part_of(edited, STAGES[s]) != part and s != "ledger"]
        assert set(said[what].split(", ")) == set(found or ["none"]), f"| `{what}` | {', '.join(found) or 'none'} |"


@pytest.mark.skipif(not Path(sys.executable).with_name("ruff").exists(), reason="ruff is not installed")
def test_the_files_are_clean(extended: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", extended)
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [str(Path(sys.executable).with_name("ruff")), *command, *files()],
            cwd=extended,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_the_page_lists_what_there_is() -> None:
    """`python tests/test_extending.py tables` writes the tables anew."""
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text), "run: python tests/test_extending.py tables"


def with_tables(text: str) -> str:
    from meddiff_steps.core import registries

    return TABLE.sub(lambda found: f"<!-- {found[1]} -->\n{getattr(registries, found[1]).table()}<!-- end -->", text)


# ------------------------------------------------------------------------------- in the process that sees the copy


def file_of(registry: str) -> str:
    """The page's file of one kind."""
    from meddiff_steps.core import registries

    folder = getattr(registries, registry).package.replace(".", "/")
    (name,) = [name for name in files() if str(Path(name).parent) == folder]
    return name


def name_of(registry: str) -> str:
    return Path(file_of(registry)).stem


def check_names() -> None:
    """Registries list the files; keys take their names, and the schema shows them; parsing imports nothing heavy."""
    from meddiff_steps import config
    from meddiff_steps.core import registries

    schema = json.loads(config.json_schema())["$defs"]
    for registry, (key, value) in KEYS.items():
        name, (section, below) = name_of(registry), key.split(".")
        assert name in getattr(registries, registry).names(), name
        study = config.parse_study(STUDY | {section: {below: value(name)}}, "test")
        assert getattr(getattr(study, section), below) == value(name)
        model = type(getattr(study, section)).__name__
        assert f'"{name}"' in json.dumps(schema[model]["properties"][below]), key
    assert name_of("APPLICATIONS") in registries.APPLICATIONS.names()
    assert "torch" not in sys.modules


def check_samplers() -> None:
    """Gaussian data, an exact denoiser: mean and spread come out, from every kind of model that the entry names."""
    import torch

    from meddiff_steps.config import Diffusion
    from meddiff_steps.core.registries import SAMPLERS, samplers_of
    from meddiff_steps.diffusion.conditioning import Condition
    from meddiff_steps.diffusion.sampling import sample
    from meddiff_steps.diffusion.schedules import NoiseProcess

    name, n, std, mean = name_of("SAMPLERS"), 20_000, 0.5, 1.0
    for prediction_type in ("v_prediction", "flow"):
        assert name in samplers_of(prediction_type) and SAMPLERS.entry(name)["stochastic"]
        process = NoiseProcess.of(Diffusion(prediction_type=prediction_type))

        def exact(x: Any, timesteps: Any, condition: Condition, process: NoiseProcess = process) -> Any:
            alpha, sigma = (value.reshape(-1, 1, 1).float() for value in process.alpha_sigma(timesteps))
            clean = mean + alpha * std**2 / ((alpha * std) ** 2 + sigma**2) * (x - alpha * mean)
            return process.target(clean, (x - alpha * clean) / sigma.clamp_min(1e-6), timesteps)

        def noise(step: int) -> Any:
            return torch.randn(n, 1, 1, generator=torch.Generator().manual_seed(step))

        x = sample(exact, noise(-1), Condition(torch.zeros(n, 1)), process, name, step_noise=noise)
        assert abs(float(x.mean()) - mean) < 0.02, (prediction_type, float(x.mean()))
        assert abs(float(x.std()) - std) < 0.05 * std, (prediction_type, float(x.std()))


def check_first_stages() -> None:
    """Shapes in 2D and 3D; trained for a moment it is better than before; saved and loaded it is the same."""
    import tempfile

    import torch

    from meddiff_steps.config import Autoencoder
    from meddiff_steps.models.first_stage.base import build, latent_shape, reconstruct
    from meddiff_steps.models.trained import load_first_stage, save_image_network

    torch.manual_seed(0)
    settings = Autoencoder(network=name_of("FIRST_STAGES"), channels=[16, 16], latent_channels=4)
    for spatial_dims in (2, 3):
        stage = build(settings, spatial_dims)
        shape = (1, *(8, 16, 12)[:spatial_dims])
        ramps = torch.meshgrid(*(torch.linspace(0, 1, n) for n in shape[1:]), indexing="ij")
        images = torch.stack([ramps[0] * a + ramps[1] * (1 - a) for a in torch.linspace(0, 1, 6)])[:, None]
        posterior = stage.encode(images)
        assert posterior.mode().shape == (6, *latent_shape(settings, shape))
        assert stage.decode(posterior.mode(), slab=2).shape == images.shape
        before = float((reconstruct(stage, images) - images).abs().mean())
        optimiser = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(100):
            optimiser.zero_grad()
            made, _, mean, _ = stage(images, torch.randn_like(posterior.mean), torch.tensor(0.01))
            assert made.shape == images.shape and mean.shape == posterior.mean.shape
            (made - images).abs().mean().backward()
            optimiser.step()
        assert float((reconstruct(stage, images) - images).abs().mean()) < 0.5 * before
        assert set(stage.costly) == {"encoder", "decoder"}
        with tempfile.TemporaryDirectory() as folder:
            save_image_network(stage, Path(folder), shape, {"settings": settings.model_dump(mode="json")})
            again, _ = load_first_stage(Path(folder))
        assert torch.equal(again.encode(images).mode(), stage.encode(images).mode())
        assert torch.equal(reconstruct(again, images), reconstruct(stage, images))


def check_drawing_decoders() -> None:
    """Shapes in 2D and 3D, of crops and in slabs; it learns; the same noise draws the same, another another."""
    import torch

    from meddiff_steps.config import Decoder
    from meddiff_steps.models.drawing.base import build

    torch.manual_seed(0)
    settings = Decoder(network=name_of("DRAWING_DECODERS"), channels=16)
    for shape in ((1, 16, 12), (1, 16, 8, 12)):
        model = build(settings, shape)
        decoded = torch.rand(4, *shape)
        images = (decoded + 0.05 * torch.randn(decoded.shape)).clamp(0, 1)
        model.deviation.fill_((images - decoded).std())
        start, size = [1] * (len(shape) - 1), [3] * (len(shape) - 1)
        window = (slice(None), slice(None), *(slice(a, a + n) for a, n in zip(start, size, strict=True)))
        residual, seen = model.residual(images, decoded)[window], model.in_blocks(decoded)[window]
        assert residual.shape == (4, model.channels, *size)
        assert abs(float(model.residual(images, decoded).std()) - 1) < 0.02
        place = model.place(start, size).expand(4, *(-1 for _ in shape))
        optimiser, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
        for _ in range(60):
            timesteps, noise = torch.full((4,), 300.0), torch.randn(residual.shape)
            optimiser.zero_grad()
            predicted = model(model.process.add_noise(residual, noise, timesteps), timesteps, seen, place)
            loss = (predicted - model.process.target(residual, noise, timesteps)).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
        assert losses[-1] < 0.8 * losses[0]
        with torch.no_grad():
            noise = torch.randn(decoded.shape)
            drawn = model.draw(decoded, noise, 3)
            assert drawn.shape == decoded.shape and 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
            assert torch.equal(model.draw(decoded, noise, 3), drawn)
            assert not torch.allclose(model.draw(decoded, -noise, 3), drawn, atol=1e-3)
            assert torch.allclose(model.draw(decoded, noise, 3, slab=4), drawn, atol=1e-5)
        assert model.costly and all(isinstance(part, torch.nn.Module) for part in model.costly)


def check_denoisers() -> None:
    """Forward and backward through `Denoiser`, in 2D and 3D, with missing covariates; it starts at zero and learns."""
    import torch

    from meddiff_steps.config import Diffusion
    from meddiff_steps.core.errors import UserError
    from meddiff_steps.diffusion.conditioning import Condition
    from meddiff_steps.models.denoiser.base import Denoiser

    torch.manual_seed(0)
    settings = Diffusion(
        network=name_of("DENOISERS"), channels=[8, 8], norm_num_groups=4, num_head_channels=8, covariate_dim=8
    )
    for shape in ((4, 6, 8), (4, 6, 4, 8)):
        denoiser = Denoiser(settings, shape, [0, 2], variants=3)
        x, timesteps = torch.randn(1, *shape).expand(3, *shape), torch.tensor([500.0] * 3)  # covariates alone differ
        condition = Condition(torch.tensor([[0.1, 1.0], [0.1, 0.0], [float("nan"), float("nan")]]))
        assert float(denoiser.network(x, timesteps, condition).abs().max()) == 0
        target = condition.covariates[:, 1].nan_to_num(0.5).reshape(-1, *[1] * len(shape)).expand_as(x)
        optimiser, losses = torch.optim.AdamW(denoiser.parameters(), lr=1e-2), []
        for _ in range(60):
            optimiser.zero_grad()
            loss = (denoiser(x, timesteps, condition) - target).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
        assert losses[-1] < 0.2 * losses[0]
        plain = denoiser(x, timesteps, condition)
        for other in (
            denoiser(x, timesteps / 2, condition),
            denoiser(x, timesteps, replace(condition, variant=torch.tensor([[1.0, 0.0, 0.0]] * 3))),
        ):
            assert not torch.allclose(plain, other, atol=1e-3)
        assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters() if p.grad is not None)
        assert all(p.grad is not None for p in denoiser.network.parameters())
        assert denoiser.costly and all(isinstance(part, torch.nn.Module) for part in denoiser.costly)
        try:
            Denoiser(settings, shape, [0, 2], maps={"scan": 1})
        except UserError:
            continue
        raise AssertionError("a map that it cannot be told is not refused")


def blobs(count: int, seed: int) -> Any:
    """Smooth random images, float32 (count, 1, 16, 16, 16) in [0, 1]."""
    import numpy as np
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    raw = np.stack([gaussian_filter(rng.normal(size=(16, 16, 16)), 1.5) for _ in range(count)])[:, None]
    return np.clip(0.5 + 0.2 * raw / raw.std(), 0, 1).astype(np.float32)


def check_detectors() -> None:
    """Noised, mirrored and re-contrasted copies are nearer than any stranger, and it is said whose they are."""
    import numpy as np
    import torch

    from meddiff_steps.core.registries import DETECTORS
    from meddiff_steps.imaging.perturbations import flip
    from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
    from meddiff_steps.privacy.detectors.base import Context, TrainingImages, references

    scans = blobs(30, 0)
    with ShardWriter(Path("scans.arrow"), {"image": TensorColumn("float16", scans.shape[1:])}) as shard:
        for scan in scans:
            shard.append(image=scan)
    training, name = TrainingImages(Shards([Path("scans.arrow")]), np.arange(30)), name_of("DETECTORS")

    def built(directions: dict[str, np.ndarray]) -> Any:
        nothing: Any = None  # this detector asks for neither network
        return DETECTORS.load(name).build(Context(scans.mean(0), training, nothing, nothing, nothing, directions))

    detector = built({name: references(built({}), training)})
    assert detector.name == name
    strangers = detector.similarity(torch.from_numpy(blobs(30, 1)))[0]
    rng, copies = np.random.default_rng(2), torch.from_numpy(scans[:8])
    noised = copies + 0.05 * torch.from_numpy(rng.standard_normal(copies.shape).astype(np.float32))
    for planted in (noised, flip(copies), copies**1.2):
        similarity, whose = detector.similarity(planted)
        assert whose.tolist() == list(range(8)) and similarity.min() > strangers.max()


def check_metrics() -> None:
    """Near its floor for samples of one distribution; further for a shift, more so for a larger one."""
    import numpy as np

    from meddiff_steps.evaluation.realism.base import Sample, Scale
    from meddiff_steps.evaluation.realism.measure import measure

    rng, name = np.random.default_rng(0), name_of("METRICS")
    rows = rng.standard_normal((240, 6))
    scale = Scale.of(rows[:80], 80)
    values = []
    for shift in (0.0, 1.0, 2.0):
        parts = {"synthetic": rows[:80] + shift, "training": rows[80:160], "held_out": rows[160:]}
        samples = {kind: Sample(scale.standard(part), np.arange(80)) for kind, part in parts.items()}
        options: dict[str, Any] = {"resamples": 100, "slow_resamples": 100, "permutations": 100, "seed": "x"}
        figure = measure(samples, scale, [name], **options)[name]
        assert figure == measure(samples, scale, None, **options)[name]
        assert figure["low"] <= figure["value"] <= figure["high"] and figure["n"] == 80
        values.append(figure)
    assert values[0]["low"] <= values[0]["floor"]["high"]
    assert values[0]["high"] < values[1]["low"] and values[1]["high"] < values[2]["low"]


def check_feature_spaces() -> None:
    """Finite, the same for an image whatever stands beside it, and other for a blurred one; also for empty images."""
    import torch

    from meddiff_steps.instruments.feature_spaces.assemble import spaces
    from meddiff_steps.instruments.feature_spaces.base import Context

    for spatial_dims in (2, 3):
        (space,) = spaces([name_of("FEATURE_SPACES")], Context(spatial_dims))
        images = torch.rand(4, 1, *(17, 12, 8)[:spatial_dims], generator=torch.Generator().manual_seed(0))
        features = space.extract(images)
        assert features.ndim == 2 and len(features) == 4 and torch.isfinite(features).all()
        assert torch.allclose(space.extract(images[1:2]), features[1:2], atol=1e-6)
        assert torch.isfinite(space.extract(torch.zeros_like(images))).all()
        assert (space.extract(0.5 + 0.1 * (images - 0.5))[:, 0] < features[:, 0]).all()
        assert len(space.digest) == 16 and space.name == name_of("FEATURE_SPACES")


def check_operators() -> None:
    """In 2D and 3D: its adjoint is one, and it measures what it says, with the noise that it says."""
    import numpy as np
    import torch

    from meddiff_steps.config import Reconstruction
    from meddiff_steps.imaging.operators.base import build, inner

    name = name_of("OPERATORS")
    settings = Reconstruction(operators=[name])
    ((_, strength),) = settings.tasks
    rng = np.random.default_rng(0)
    for shape in ((1, 8, 12), (1, 8, 4, 12)):
        operator = build(name, strength, settings, shape, (2.0,) * (len(shape) - 1), rng)
        x = torch.from_numpy(rng.standard_normal((2, *shape)).astype(np.float32))
        y = torch.from_numpy(rng.standard_normal((2, *operator.measured_shape)).astype(np.float32))
        assert torch.allclose(inner(operator.forward(x), y), inner(x, operator.adjoint(y)), rtol=1e-4, atol=1e-4)
        assert operator.first_look(y).shape == x.shape
        known, measured = operator.measure(x[:1], rng)
        left = (measured - known.forward(x[:1]))[known.reached()[None]]
        assert 0.5 * known.noise_std < float(left.std()) < 1.5 * known.noise_std


def check_anomaly_maps() -> None:
    """A lesion differs from what is expected by its contrast at most, the rest hardly; a scan has one map."""
    import numpy as np
    import pandas as pd

    from meddiff_steps.applications.anomaly_maps.base import Context, Scan, build
    from meddiff_steps.config import Anomaly

    images = np.clip(blobs(9, 0), 0, 0.5)
    scans = [Scan(image, pd.DataFrame({"sex": ["F"]}), f"x/{i}") for i, image in enumerate(images)]
    lesion = np.zeros(images.shape[2:], bool)
    lesion[2:5, 2:5, 2:5] = True
    ill = Scan(np.where(lesion, images[8] + 0.4, images[8]).astype(np.float32), scans[8].subject, "x/8")
    untrained: Any = None  # this one asks no model
    mapper = build(name_of("ANOMALY_MAPS"), Context(untrained, Anomaly(), scans[:8]))
    found, healthy = mapper(ill)[""], mapper(scans[8])[""]
    assert found.difference.shape == lesion.shape and found.healed.shape == images[8].shape
    change = found.difference - healthy.difference
    assert 0.1 < change[lesion].mean() < 0.45 and abs(change[~lesion].mean()) < 0.05
    np.testing.assert_array_equal(found.difference, mapper(ill)[""].difference)


def check_applications() -> None:
    """Runs on an untrained model; a small depth changes less than a large one; the same keys give the same images."""
    import importlib

    import numpy as np
    import pandas as pd
    import torch

    from meddiff_steps.cohort.covariates import CovariateEncoding
    from meddiff_steps.compute.device import make_fabric
    from meddiff_steps.config import Autoencoder, Compute, Diffusion, Generate, parse_study
    from meddiff_steps.core.random_streams import seed_key
    from meddiff_steps.models.first_stage.base import build, latent_shape
    from meddiff_steps.models.trained import DenoiserCard, TrainedModel

    torch.manual_seed(0)
    study = parse_study(STUDY, "test")
    first = Autoencoder(channels=[8, 16], norm_num_groups=4, latent_channels=8)
    second = Diffusion(channels=[8, 16], norm_num_groups=4, num_head_channels=8, covariate_dim=8, num_res_blocks=1)
    training = pd.DataFrame({"age": [50.0, 60.0, 70.0], "sex": ["F", "M", "M"]})
    subjects = pd.DataFrame({"age": [55.0, np.nan], "sex": ["F", "M"]})
    images = blobs(2, 0)
    card = DenoiserCard(
        second, latent_shape(first, images.shape[1:]), CovariateEncoding.fit(training, study.covariates), 0
    )
    stage = build(first, 3).eval()
    denoiser = card.build().eval().requires_grad_(False)
    for parameter in denoiser.parameters():  # untrained it predicts 0, and then it does not matter where a run starts
        parameter += 0.1 * torch.randn_like(parameter)
    model = TrainedModel(stage, denoiser, card, make_fabric(Compute(device="cpu"), 1))
    run = importlib.import_module(f"meddiff_steps.applications.{name_of('APPLICATIONS')}").redraw
    keys = [seed_key("test", i, 0, "noise") for i in range(2)]

    def change(depth: float) -> float:
        made = run(model, images, subjects, keys, depth, Generate(num_inference_steps=5))
        assert made.shape == images.shape and made.dtype == np.float32 and 0 <= made.min() <= made.max() <= 1
        np.testing.assert_array_equal(made, run(model, images, subjects, keys, depth, Generate(num_inference_steps=5)))
        return float(np.abs(made - model.decode(model.encode(images)).numpy()).mean())

    assert change(0.01) < 0.2 * change(0.5)


def checked() -> dict[str, str]:
    """What is wrong with each kind."""
    said = {}
    for check in ("names", *KEYS, "APPLICATIONS"):
        try:
            globals()[f"check_{check.lower()}"]()
            said[check] = ""
        except Exception:  # noqa: BLE001 - a broken example must not hide the others
            said[check] = traceback.format_exc()
    return said


if __name__ == "__main__":
    if sys.argv[1:] == ["tables"]:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(json.dumps(checked()))
