"""The benchmarks compare like with like, and what they say follows from what they measured.

Sizes are tiny and nothing here asks for a speed: that would fail on a busy machine.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import LatentDiffusionInferer

from benchmarks import data, measure, peer, render, training
from benchmarks.places import MEDIUM, SMALL, TINY, Setting, ellipsoids
from benchmarks.sampling import Samplers
from meddiff_steps import config
from meddiff_steps.core.files import read_json, write_json
from meddiff_steps.imaging.preprocess import preprocess_image
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.trained import DenoiserCard, TrainedModel
from meddiff_steps.training.latent_data import LatentData


def weights(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path, quick=True, threads=1)


@pytest.mark.parametrize("size", [SMALL, MEDIUM])
def test_a_fair_copy_has_our_sizes(size, tmp_path):
    study = Setting(tmp_path).place(size).study
    settings, second = study.autoencoder, study.diffusion
    light = build_first_stage(settings, 3)
    ours = build_first_stage(settings.model_copy(update={"network": "kl"}), 3)
    theirs = peer.peer_autoencoder(settings, "cpu")
    assert weights(theirs) == pytest.approx(weights(ours), rel=0.25)
    x = torch.zeros(1, 1, 16, 16, 16)
    with torch.no_grad():
        for network in (ours, light):
            assert theirs.encode(x)[0].shape == network.encode(x).mean.shape == (1, settings.latent_channels, 4, 4, 4)
    shape = (settings.latent_channels, *(n // settings.downsampling for n in size.shape))
    unet = Denoiser(peer.unet_settings(second), shape, [0, 2, 2, 0, 0]).network.unet
    copy = peer.peer_unet(second, settings.latent_channels, 5, "cpu")
    assert weights(copy) == pytest.approx(weights(unet), rel=0.25)
    mine, other = (
        sorted(
            m.out_channels for m in network.modules() if isinstance(m, torch.nn.Conv3d) and m.kernel_size == (3, 3, 3)
        )
        for network in (unet, copy)
    )
    assert mine == other  # as many convolutions, as wide


def test_both_sides_see_the_same_images(setting):
    """The peers' transforms and ours give the same picture, so that both learn the same thing."""
    ellipsoids(setting.work, 1, TINY)
    path = next(setting.work.glob("sub-*/anat/*.nii.gz"))
    settings = setting.place(TINY).study.preprocess
    ours = preprocess_image(path, settings)[0]
    theirs = peer.peer_transform(settings)({"image": str(path)})["image"].numpy()
    assert theirs.shape == ours.shape
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


def test_one_pass_at_scale_one_is_what_two_passes_give(setting):
    """Why the peer's realism may be measured without its second pass."""
    place = setting.place(TINY)
    torch.manual_seed(0)
    card = DenoiserCard(place.study.diffusion, place.latent_shape, place.encoding, variants=0)
    denoiser = card.build().eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))  # the last layer starts at zero, and would predict nothing
    first_stage = build_first_stage(place.study.autoencoder, 3).eval().requires_grad_(False)
    samplers = Samplers(place, TrainedModel(first_stage, denoiser, card, place.fabric))
    rows = np.arange(2)
    one, two, guided = (
        samplers.theirs(rows, 3, passes=1),
        samplers.theirs(rows, 3),
        samplers.theirs(rows, 3, guidance_scale=3.0),
    )
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert np.abs(guided - two).max() > 1e-3


def test_both_sides_are_judged_on_the_same_noise(setting):
    """A network that predicts no noise has the same loss on both sides, whatever the offset of ours."""
    place = setting.place(TINY)
    autoencoder = training.trained_peer_autoencoder(place)
    shards = training.write_latents(setting.work / "latents.arrow", *training._posteriors(autoencoder, place))
    factor = peer.peer_scale_factor(autoencoder, place.tensors("train")[:4])
    offset, scale = (
        torch.full((1, *place.latent_shape), 0.3),
        torch.tensor(1.0 / factor),
    )
    judged = training.HeldOut(
        place,
        LatentData(
            shards, {"offset": offset, "scale": scale}, place.covariates, place.rows("train"), place.rows("val")
        ),
        factor,
    )
    clean = (judged.mine - judged.other).flatten(1)
    alpha = judged.process.alpha_sigma(judged.timesteps)[0].float()
    np.testing.assert_allclose(clean, (-alpha * 0.3 * factor)[:, None].expand_as(clean), atol=1e-4)
    oracle = judged._error(lambda i: judged.noise[i])
    nothing = judged.theirs(_Silent())
    assert oracle == 0 and nothing == pytest.approx(1.0, abs=0.1)


class _Silent(torch.nn.Module):
    def forward(self, x, timesteps, context):
        return torch.zeros_like(x)


def test_the_peers_training_learns(setting):
    place = setting.place(TINY)
    settings, images = place.study.autoencoder, place.tensors("train")
    torch.manual_seed(0)
    first = peer.peer_autoencoder(settings, "cpu")
    optimiser = peer.peer_optimiser(first, 2e-3)
    losses = [peer.peer_autoencoder_step(first, optimiser, images[:2], settings.kl_weight) for _ in range(4)]
    assert losses[-1] < losses[0]
    second = place.study.diffusion
    network = peer.peer_unet(second, settings.latent_channels, 5, "cpu")
    inferer = LatentDiffusionInferer(
        peer.peer_scheduler(second), scale_factor=peer.peer_scale_factor(first, images[:2])
    )
    optimiser, context = peer.peer_optimiser(network, 2e-3), peer.peer_context(place.covariates[:2], "cpu")
    steps = []
    for _ in range(4):
        torch.manual_seed(1)  # the same noise and timesteps, so that the losses are comparable
        steps.append(
            peer.peer_diffusion_step(network, first, inferer, optimiser, images[:2], context, place.latent_shape, 0.5)
        )
    assert steps[-1] < steps[0]
    before = {name: p.clone() for name, p in first.named_parameters()}
    peer.peer_diffusion_step(network, first, inferer, optimiser, images[:2], context, place.latent_shape)
    assert all(torch.equal(p, before[name]) for name, p in first.named_parameters())  # the first stage is only read


def test_a_race_gives_both_sides_the_same_time(monkeypatch):
    """On a made-up clock: steps of 1 s and of 3 s, and held-out figures that rise with steps."""
    ticks = {"at": 0.0}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: ticks["at"])
    monkeypatch.setattr(measure.time, "process_time", lambda: ticks["at"])

    def side(seconds: float) -> training.Side:
        made = training.Side(lambda: ticks.update(at=ticks["at"] + seconds), lambda: 0.0)
        made.judge = lambda: float(made.steps)
        return made

    ours, theirs = side(1.0), side(3.0)
    training.race(ours, theirs, (60.0, 120.0))
    assert ours.clock.wall == pytest.approx(60, abs=5) and theirs.clock.wall == pytest.approx(120, abs=12)
    throughput, reached = training.results([(ours, theirs)], 2.0, ("a", "b"), "subjects/s", True, "tiny")
    assert throughput["ours"]["value"] == pytest.approx(2.0) and throughput["ratio"]["value"] == pytest.approx(3.0)
    assert reached["level"] == theirs.steps and reached["ratio"]["value"] == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize(
    ("curve", "level", "higher", "expected"),
    [
        ([(1, 10), (3, 20)], 15, True, 2.0),
        ([(1, 10)], 5, True, 1),
        ([(1, 10)], 11, True, None),
        ([(2, 1.0), (4, 0.5)], 0.75, False, 3.0),
    ],
)
def test_seconds_to_a_level(curve, level, higher, expected):
    assert training.seconds_to(curve, level, higher) == expected


def test_turns_alternate_and_report_the_ratio():
    calls = []
    turns = measure.take_turns(lambda: calls.append("o") or 1.0, lambda: calls.append("p") or 1.0, 3)
    assert "".join(calls) == "op" + "oppoop"
    turns = measure.Turns(ours=[1.0, 2.0, 1.0], peer=[4.0, 4.0, 3.0], ours_cpu=[1, 1, 1], peer_cpu=[2, 2, 2])
    row = turns.row("what", "size", "1/s")
    assert row["ratio"]["value"] == 3.0 and row["ratio"]["range"] == [2.0, 4.0] and row["ratio_cpu"]["value"] == 2.0
    assert 2.0 <= row["ratio"]["low"] <= 3.0 <= row["ratio"]["high"] <= 4.0


def test_exponents():
    x = [1, 10, 100]
    assert measure.exponent(x, [2, 200, 20000]) == pytest.approx(2)
    assert measure.local_exponents(x, [1, 10, 1000]) == pytest.approx([1, 2])


@pytest.mark.parametrize("compare", [data.loader, data.release, data.diversity])
def test_quick_comparisons_of_data_run(compare, setting):
    found = compare(replace(setting))
    assert found["rows"]
    for row in found["rows"]:
        assert row["ours"]["value"] > 0 and row["peer"]["value"] > 0 and row["ratio"]["value"] > 0


def test_the_page_says_what_the_files_say(tmp_path):
    row = {
        "size": "64x64x64",
        "unit": "steps/s",
        "ours": {"value": 2.0},
        "peer": {"value": 1.0},
        "ratio": {"value": 2.0, "low": 1.9, "high": 2.2},
    }
    floors = {
        "ours": {"gflop": 10.0, "seconds": 0.1, "reached": 0.2},
        "peer": {"gflop": 25.0, "seconds": 0.25, "reached": 0.25},
    }
    rows = [
        row | {"what": "diffusion training", "floor": floors},
        row | {"what": "sampling beside DDIM-50, equal Frechet distance", "ratio": {"value": 7.5}},
    ]
    series = [{"label": "ours", "x": [1, 10, 100], "y": [1, 10, 1000], "exponent": 1.5, "local_exponents": [1.0, 2.0]}]
    curve = {"name": "subjects", "x_label": "subjects", "y_label": "seconds", "log": True, "series": series}
    write_json(
        tmp_path / "results/some.json", {"name": "some", "rows": rows, "curves": [curve], "versions": {"monai": "9.9"}}
    )
    text = render.page(tmp_path / "results", tmp_path / "docs").read_text()
    assert "2.00x [1.90, 2.20]" in text and "monai 9.9" in text
    assert "no: the networks' operations alone differ 2.50x" in text
    assert "| >= 3x | 7.50x | yes |" in text
    assert "the exponent turns from 1.00 to 2.00 at 10" in text
    assert "not measured" in text  # aims without a row are not left out
    assert (tmp_path / "docs/images/benchmarks.png").stat().st_size > 5000


def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
    root = Path(__file__).parents[2]
    results = root / "benchmarks/results"
    if not any(results.glob("*.json")):
        pytest.skip("no results are committed")
    assert not any(read_json(path).get("quick") for path in results.glob("*.json"))
    assert render.page(results, tmp_path).read_text() == (root / "docs/benchmarks.md").read_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (4.5678, "4.57"), (1234.5, "1,230"), (99.96, "100.0"), (0, "0"), (None, "-")],
)
def test_numbers(value, text):
    assert render.number(value) == text


def test_settings_of_both_sides_are_the_demo_study(tmp_path):
    """The networks and optimisers of the comparisons are those of the embedded study but for steps and batch."""
    demo = config.load_study(Path(__file__).parents[2] / "config/config.yaml")
    study = Setting(tmp_path).place(SMALL).study
    for section in ("autoencoder", "diffusion"):
        mine, theirs = (getattr(s, section).model_dump(exclude={"optimiser"}) for s in (study, demo))
        assert mine == theirs
    assert study.autoencoder.optimiser.learning_rate == demo.autoencoder.optimiser.learning_rate
    assert study.preprocess.shape == demo.preprocess.shape
