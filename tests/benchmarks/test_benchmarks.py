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
from benchmarks.sampling import Judge, Samplers, as_real
from meddiff_steps import config
from meddiff_steps.core.files import read_json, write_json
from meddiff_steps.imaging.preprocess import preprocess_image
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.trained import DenoiserCard, TrainedModel


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


def test_a_wide_study_is_compared_with_a_wide_tutorial():
    """Of config/studies/ixi_2mm.yaml, whose network has 192 channels."""
    study = config.load_study(Path(__file__).parents[2] / "config/studies/ixi_2mm.yaml")
    with torch.device("meta"):
        network = peer.peer_unet(study.diffusion, 16, 4, "meta")
        made = network(torch.zeros(1, 16, 20, 24, 20), torch.zeros(1), torch.zeros(1, 1, 4))
    assert made.shape == (1, 16, 20, 24, 20)
    assert weights(network) > 1e8


def test_both_sides_see_the_same_images(setting):
    """The peers' transforms and ours give the same picture, so that both learn the same thing."""
    ellipsoids(setting.work, 1, TINY)
    path = next(setting.work.glob("sub-*/anat/*.nii.gz"))
    settings = setting.place(TINY).study.preprocess
    ours = preprocess_image(path, settings)[0]
    theirs = peer.peer_transform(settings)({"image": str(path)})["image"].numpy()
    assert theirs.shape == ours.shape
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.99


@pytest.fixture
def samplers(setting) -> Samplers:
    """Both ways of sampling one model, whose layers that begin at zero have moved."""
    place = setting.place(TINY)
    torch.manual_seed(0)
    card = DenoiserCard(place.study.diffusion, place.latent_shape, place.encoding, variants=0)
    denoiser = card.build().eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    denoiser.effects.effects.copy_(0.3 * torch.randn_like(denoiser.effects.effects))
    first_stage = build_first_stage(place.study.autoencoder, 3).eval().requires_grad_(False)
    return Samplers(place, TrainedModel(first_stage, denoiser, card, place.fabric))


def test_guidance_is_the_same_on_both_sides(samplers):
    """As many passes, and the same prediction at the same place, with guidance and without."""
    calls = []
    denoise = samplers.model.denoiser.forward
    samplers.model.denoiser.forward = lambda x, *args: calls.append(len(x)) or denoise(x, *args)
    rows = np.arange(2)
    passes = {}
    for side, make in (("ours", samplers.ours), ("DDIM", samplers.theirs)):
        for scale in (None, 1.5):
            calls.clear()
            make(rows, 3, scale)
            passes[side, scale] = sum(calls) / len(rows) / 3
    assert passes["DDIM", None] == passes["ours", None] == 1.0
    assert passes["DDIM", 1.5] == passes["ours", 1.5] == 2.0


@pytest.mark.parametrize("scale", [None, 1.5])
def test_all_samplers_draw_from_the_same_model(samplers, scale):
    """With many steps, the peers' samplers and ours end at the same images, from the same noise and covariates."""
    rows = np.arange(2)
    ours = samplers.ours(rows, 60, scale)
    spread = ours.std()
    assert np.abs(samplers.theirs(rows, 500, scale, "DDIM") - ours).mean() < 0.05 * spread
    assert np.abs(samplers.theirs(rows, 500, scale, "RFlow") - ours).mean() < 0.05 * spread


def test_realism_has_its_floor_and_its_interval(setting):
    """Training scans are the floor; grey images are worse than that, and held-out scans themselves are not."""
    place = setting.place(TINY)
    judge = Judge(place, 10)
    scans = place.tensors("test").numpy()[:10]
    real = judge.look(None, "scans", 1, lambda rows: scans[rows])
    grey = judge.look(None, "grey", 1, lambda rows: np.full_like(scans[rows], 0.5))
    assert real["frechet"]["value"] < judge.floor["frechet"]["value"] < grey["frechet"]["value"]
    for figures in (real, grey, judge.floor):
        assert figures["frechet"]["low"] <= figures["frechet"]["value"] <= figures["frechet"]["high"]
    assert [entry["what"] for entry in judge.table()] == [
        "as many training scans (the floor)",
        "scans, 1 steps, unguided",
        "grey, 1 steps, unguided",
    ]


def test_the_peers_trainings_learn(setting):
    place = setting.place(TINY)
    settings, images = place.study.autoencoder, place.tensors("train")
    torch.manual_seed(0)
    first = peer.peer_autoencoder(settings, "cpu")
    optimiser = peer.peer_optimiser(first, 2e-3)
    losses = [peer.peer_autoencoder_step(first, optimiser, images[:2], settings.kl_weight) for _ in range(4)]
    assert losses[-1] < losses[0]
    second, precision = place.study.diffusion, peer.Precision("cpu", half=True)
    network = peer.peer_unet(second, settings.latent_channels, 5, "cpu")
    inferer = LatentDiffusionInferer(
        peer.peer_scheduler(second), scale_factor=peer.peer_scale_factor(first, images[:2])
    )
    optimiser, context = peer.peer_optimiser(network, 2e-3), peer.peer_context(place.covariates[:2], "cpu")
    before = {name: p.clone() for name, p in first.named_parameters()}

    def tutorial() -> float:
        told = peer.dropped(context, 0.5)
        return peer.peer_diffusion_step(
            network, first, inferer, optimiser, images[:2], told, place.latent_shape, precision
        )

    latents, flow = torch.randn(2, *place.latent_shape), peer.peer_flow(second)

    def cached() -> float:
        return peer.peer_cached_step(network, flow, optimiser, latents, peer.dropped(context, 0.5), precision)

    for step in (tutorial, cached):
        steps = []
        for _ in range(4):
            torch.manual_seed(1)  # the same noise and timesteps, so that the losses are comparable
            steps.append(step())
        assert steps[-1] < steps[0]
    assert all(torch.equal(p, before[name]) for name, p in first.named_parameters())  # the first stage is only read


def test_a_row_is_dropped_as_often_as_the_share_says():
    context = torch.ones(2000, 1, 3)
    assert peer.dropped(context, 0.0) is context
    gone = (peer.dropped(context, 0.3) == peer.NULL_CONDITION).all(2).float().mean()
    assert float(gone) == pytest.approx(0.3, abs=0.05)


def runner(ticks: dict[str, float], seconds: float, budget: float, start: float, gain: float) -> training.Side:
    """A side on a made-up clock, whose figure rises with its steps."""
    steps = [0]

    def step() -> None:
        ticks["at"] += seconds
        steps[0] += 1

    return training.Side(step, lambda: start + gain * steps[0], budget)


def test_a_race_gives_every_side_its_time_and_levels_are_above_the_mean_image(monkeypatch):
    """On a made-up clock: steps of 1 s and of 3 s, and held-out figures that rise with steps."""
    ticks = {"at": 0.0}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: ticks["at"])
    monkeypatch.setattr(measure.time, "process_time", lambda: ticks["at"])
    sides = {
        "ours": runner(ticks, 1.0, 60.0, 26.0, 0.1),
        "peer": runner(ticks, 3.0, 120.0, 10.0, 0.1),
        "raised": runner(ticks, 3.0, 120.0, 10.0, 0.5),
    }
    for side in sides.values():
        side.look()
    training.race(list(sides.values()))
    assert {name: round(side.clock.wall / side.seconds, 1) for name, side in sides.items()} == dict.fromkeys(sides, 1.0)
    names = {name: (name, "") for name in sides}
    found = {entry["side"]: entry for entry in training.reaches(sides, names, "tiny", 20.0, "PSNR")}
    assert found["ours"]["start"] == 26.0 and found["raised"]["best"] == pytest.approx(30.0, abs=0.6)
    level = found["raised"]["best"] - training.SHORT_OF_BEST
    assert [entry["level"] for entry in found.values()] == pytest.approx([level] * 3)
    assert found["peer"]["seconds_to_level"] is None
    assert found["raised"]["seconds_to_level"] == pytest.approx((level - 10.0) / 0.5 * 3.0, abs=1.0)
    # Where the level is no better than what ignores the subject, nobody is told seconds.
    for entry in training.reaches(sides, names, "tiny", 28.0, "PSNR"):
        assert entry["level"] is None and entry["seconds_to_level"] is None
        assert entry["mean_image"] == 28.0


@pytest.mark.parametrize(
    ("curve", "level", "expected"), [([(1, 10), (3, 20)], 15, 2.0), ([(1, 10)], 5, 1), ([(1, 10)], 11, None)]
)
def test_seconds_to_a_level(curve, level, expected):
    assert training.seconds_to(curve, level) == expected


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 1, 4, 4, 4)
    assert training.psnr(torch.stack([images[0] + 0.1, images[0] + 0.01]), images) == pytest.approx(30.0, abs=1e-3)


def test_turns_alternate_and_report_the_ratio():
    calls = []
    turns = measure.take_turns(lambda: calls.append("o") or 1.0, lambda: calls.append("p") or 1.0, 3)
    assert "".join(calls) == "op" + "oppoop"
    calls.clear()
    measure.rounds({name: lambda name=name: calls.append(name) or 1.0 for name in "abc"}, 2, warm_up=False)
    assert "".join(calls) == "abcbca"
    turns = measure.Turns({"ours": [1.0, 2.0, 1.0], "peer": [4.0, 4.0, 3.0]}, {"ours": [1, 1, 1], "peer": [2, 2, 2]})
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
    near = {"value": 12.3, "low": 10.1, "high": 15.2}
    floors = {
        "ours": {"gflop": 10.0, "seconds": 0.1, "reached": 0.2},
        "peer": {"gflop": 25.0, "seconds": 0.25, "reached": 0.25},
    }
    rows = [
        row | {"what": "diffusion training, ours as studies have it, beside the tutorial", "floor": floors},
        row
        | {
            "what": "unguided sampling beside DDIM-50, at equal Frechet distance",
            "ratio": {"value": 7.5},
            "steps": {"ours": 8, "peer": 50},
            "realism": {side: {"frechet": near} for side in ("ours", "peer", "floor")},
        },
    ]
    reached = {
        "size": "64x64x64",
        "side": "peer, its script as it is",
        "settings": "Adam at 1e-5",
        "mean_image": 21.7,
        "start": 8.1,
        "best": 15.7,
        "minutes": 2.0,
        "level": None,
        "seconds_to_level": None,
    }
    judged = {"size": "64x64x64", "what": "ours, 8 steps, unguided", "images": 64, "frechet": near, "kid": near}
    series = [{"label": "ours", "x": [1, 10, 100], "y": [1, 10, 1000], "exponent": 1.5, "local_exponents": [1.0, 2.0]}]
    curve = {"name": "subjects", "x_label": "subjects", "y_label": "seconds", "log": True, "series": series}
    write_json(
        tmp_path / "results/some.json",
        {
            "name": "some",
            "rows": rows,
            "curves": [curve],
            "versions": {"monai": "9.9"},
            "reached": [reached],
            "realism": [judged],
        },
    )
    text = render.page(tmp_path / "results", tmp_path / "docs").read_text()
    assert "2.00x [1.90, 2.20]" in text and "monai 9.9" in text
    assert "no: the networks' operations alone differ 2.50x" in text
    assert "| >= 3x | 7.50x | yes |" in text
    assert "Frechet: ours 12.3 [10.1, 15.2], peer 12.3 [10.1, 15.2], floor 12.3 [10.1, 15.2]" in text
    assert "The mean training image has 21.7 dB" in text and "no peer came 3 dB above it" in " ".join(text.split())
    assert "| 8.10 dB | 15.7 dB | 2.00 min | - |" in text
    assert "| ours, 8 steps, unguided | 64x64x64 | 12.3 [10.1, 15.2] | 12.3 [10.1, 15.2] |" in text
    assert "the exponent turns from 1.00 to 2.00 at 10" in text
    assert "not measured" in text  # aims without a row are not left out
    assert (tmp_path / "docs/images/benchmarks.png").stat().st_size > 5000


def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
    root = Path(__file__).parents[2]
    results = root / "benchmarks/results"
    assert not any(read_json(path).get("quick") for path in results.glob("*.json"))
    assert render.page(results, tmp_path).read_text() == (root / "docs/benchmarks.md").read_text()


def test_a_page_without_results_says_so(tmp_path):
    (tmp_path / "results").mkdir()
    text = render.page(tmp_path / "results", tmp_path / "docs").read_text()
    assert "**No figures yet.**" in text and "## What is compared" in text
    assert "images/benchmarks.png" not in text and not (tmp_path / "docs/images").exists()


def test_work_beside_it_is_told(tmp_path):
    row = {"what": "loader", "size": "1x1x1", "unit": "1/s", "ours": {"value": 2.0}, "peer": {"value": 1.0}}
    row |= {"ratio": {"value": 2.0}}
    write_json(tmp_path / "results/some.json", {"name": "some", "date": "today", "rows": [row], "busy": True})
    assert "| some | today, beside other work |" in render.page(tmp_path / "results", tmp_path / "docs").read_text()


@pytest.mark.parametrize(
    ("distances", "level", "steps"),
    [
        ({4: 9.0, 8: 5.0, 16: 4.0}, 5.0, 8),
        ({4: 4.0, 8: 6.0, 16: 4.0}, 5.0, 16),
        ({4: 4.0, 8: 3.0, 16: 5.1}, 5.0, None),
    ],
)
def test_no_lucky_number_of_steps_counts(distances, level, steps):
    assert as_real(distances, level) == steps


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
    for section in ("autoencoder", "diffusion", "decoder"):
        mine, theirs = (getattr(s, section).model_dump(exclude={"optimiser"}) for s in (study, demo))
        assert mine == theirs
        mine, theirs = (getattr(s, section).optimiser for s in (study, demo))
        assert (mine.method, mine.learning_rate) == (theirs.method, theirs.learning_rate)
    ours, demos = (s.generate.model_dump(exclude={"shard_size"}) for s in (study, demo))
    assert ours == demos
    assert study.preprocess.shape == demo.preprocess.shape
