"""Networks between groups of images that are not paired: steps of diffusion, critics, and a known map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.applications.unpaired import Translator
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import SAMPLERS
from meddiff_steps.diffusion.levels import Levels, halving_timesteps
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.imaging.domains import Domain, halves
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.unpaired import LargeSteps, Side, Unpaired, load_unpaired
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.unpaired import UnpairedTask, cycle_error
from meddiff_steps.training.unpaired import train_unpaired

SHAPE = (1, 8, 8)
PLAIN = config.Variants(flip=False, max_shift_voxels=0)
#: The known map from one group to the other: brighter from left to right, which no tone does.
RAMP = np.linspace(-0.2, 0.2, SHAPE[-1])


@pytest.fixture(scope="module")
def fabric() -> Any:
    return make_fabric(config.Compute(device="cpu", precision="32-true"), threads=1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Smooth Gaussian fields, two images of each of 32 subjects; `other` is what the map makes of them."""
    path = tmp_path_factory.mktemp("unpaired") / "shard.arrow"
    columns = {"scan_id": pa.string(), "image": TensorColumn("float16", SHAPE)}
    columns |= {"other": TensorColumn("float16", SHAPE, "contrast")}
    rng = np.random.default_rng(0)
    with ShardWriter(path, columns) as shard:
        for i in range(64):
            field = ndimage.gaussian_filter(rng.standard_normal(SHAPE[1:]), 1, mode="wrap")
            image = np.clip(0.5 + 0.1 * field / field.std(), 0.25, 0.75)
            shard.append(scan_id=str(i), image=image[None], other=image[None] + RAMP)
    return Shards([path])


def subjects() -> np.ndarray:
    return np.array([f"s{i // 2}" for i in range(56)])


def groups(shards: Shards) -> dict[Side, Domain]:
    a, b = halves(np.arange(56), subjects(), np.random.default_rng(1))
    held_out = np.arange(56, 64)
    return {"a": Domain("a", shards, ("image",), a, held_out), "b": Domain("b", shards, ("other",), b, held_out)}


def task(shards: Shards, fabric: Any, steps: int = 6, **changes: Any) -> UnpairedTask:
    optimiser = {"steps": steps, "batch_size": 4, "warmup_steps": 2, "checkpoint_every": 3, "validate_every": 3}
    optimiser |= changes.pop("optimiser", {})
    settings = {"block": 2, "channels": [16], "num_res_blocks": 1, "critic_channels": 8, "critic_blocks": 1}
    made = config.Unpaired(**(settings | {"optimiser": optimiser} | changes))
    return UnpairedTask(made, PLAIN, groups(shards), "x", fabric)


# ------------------------------------------------------------------------------------------------ steps of diffusion


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_large_step_is_one_of_ancestral_sampling(count: int) -> None:
    process = NoiseProcess.of(config.Unpaired().denoiser)
    steps, levels = LargeSteps(process, count), Levels.of(process, halving_timesteps(process, count))
    x, x0, noise = (torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    solver = SAMPLERS.load("ddpm").solver(levels, lambda i: noise)
    for i in range(count):
        mine = steps.cleaner(torch.full((3,), i), x, x0, noise)
        torch.testing.assert_close(mine, solver(i, x, lambda x, level: x0), rtol=1e-4, atol=1e-5)


def test_states_of_training_are_a_chain_with_the_marginals_of_the_process() -> None:
    model = Unpaired(config.Unpaired(block=1, channels=[8], num_res_blocks=1), (4, 4), {"a": 1, "b": 1})
    steps, n = model.steps, 200_000
    noise, more, posterior = (torch.randn(n, 1, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for i in range(steps.count):
        level = torch.full((n,), i)
        cleaner, x = steps.noisier(level, torch.full((n, 1), 0.7), noise, more)
        for state, at in ((x, i), (cleaner, i + 1)):
            assert float(state.mean()) == pytest.approx(0.7 * float(steps.alpha[at]), abs=0.01)
            assert float(state.std()) == pytest.approx(float(steps.sigma[at]), abs=0.01)
        # Drawn backwards from x and the clean image, the cleaner state is distributed as on the way forwards
        back = steps.cleaner(level, x, torch.full((n, 1), 0.7), posterior)
        assert float(back.std()) == pytest.approx(float(cleaner.std()), abs=0.01)
        covariances = [float(((s - s.mean()) * (x - x.mean())).mean()) for s in (back, cleaner)]
        assert covariances[0] == pytest.approx(covariances[1], abs=0.01)


def test_critics_are_held_back_in_half_precision_as_in_full(shards: Shards, fabric: Any) -> None:
    """The first step has the penalty on their gradient, which Fabric's wrapper of bf16 does not let pass."""
    mixed = make_fabric(config.Compute(device="cpu", precision="bf16-mixed"), threads=1)
    full, half = (task(shards, where, critic_penalty=1.0).train_step(0) for where in (fabric, mixed))
    assert {name: float(loss) for name, loss in half.items()} == pytest.approx(
        {name: float(loss) for name, loss in full.items()}, rel=0.05
    )


# -------------------------------------------------------------------------------------------------------- no pairs


def test_no_subject_is_in_both_halves_and_none_is_lost() -> None:
    rows, people = np.arange(100, 156), subjects()
    a, b = halves(rows, people, np.random.default_rng(0))
    assert sorted([*a, *b]) == rows.tolist() and len(a) == len(b) == 28
    assert not set(people[a - 100]) & set(people[b - 100])
    with pytest.raises(UserError, match="1 training subjects, two groups"):
        halves(rows[:2], people[:2], np.random.default_rng(0))


def test_batches_of_both_groups_are_never_of_one_subject(shards: Shards, fabric: Any) -> None:
    made, people = task(shards, fabric), subjects()
    seen: dict[Side, set[str]] = {"a": set(), "b": set()}
    for step in range(30):
        for side in seen:
            seen[side] |= set(people[made.rows(side, step)])
    assert not seen["a"] & seen["b"] and len(seen["a"] | seen["b"]) == 28


def test_a_group_without_scans_is_refused_by_name(shards: Shards) -> None:
    with pytest.raises(UserError, match="site B: no training scan is of this group"):
        Domain("site B", shards, ("image",), np.array([]), np.array([]))


# ------------------------------------------------------------------------------------------------------- networks


def test_the_cycle_of_exact_inverses_has_no_error(shards: Shards, fabric: Any) -> None:
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(cycle_error(images, torch.sub(0.0, torch.sub(0.0, images)))) == 0.0
    assert float(cycle_error(images, images + 0.25)) == pytest.approx(0.25, abs=1e-6)
    # So begins a training: guesses are one tone and its inverse
    assert task(shards, fabric).validate()["val/cycle"] < 1e-6


def test_a_guess_begins_with_the_other_groups_mean_and_spread(shards: Shards, fabric: Any) -> None:
    made = task(shards, fabric)
    a, b = (torch.from_numpy(made.domains[side].images(made.domains[side].rows)) * 2 - 1 for side in ("a", "b"))
    begun = made.model.guess("b", a)
    assert float(begun.detach().mean()) == pytest.approx(float(b.mean()), abs=1e-4)
    assert float(begun.detach().std()) == pytest.approx(float(b.std()), abs=1e-4)
    empty = torch.full_like(a[:1], -1.0)
    assert torch.equal(made.model.toned("b", empty), empty)  # outside of the head nothing is shown


class Known(Unpaired):
    """Diffusions that know which image it is."""

    def clean(self, side: Side, sources: Tensor, x: Tensor, level: Tensor) -> Tensor:
        return self.standardised(side, 0.5 * sources)


def test_a_draw_ends_where_the_network_says_and_depends_on_its_key_alone(shards: Shards, fabric: Any) -> None:
    images = shards.tensors("image", [0, 1])
    settings = config.Unpaired(block=2, channels=[8], num_res_blocks=1)
    known = Known(settings, SHAPE[1:], {"a": 1, "b": 1}).eval()
    exact = Translator(known, "x", fabric, "").draws(images, ["a", "b"], 3)
    assert exact.shape == (2, 3, *SHAPE)
    np.testing.assert_allclose(exact, np.broadcast_to((images + 0.5)[:, None] / 2, exact.shape), atol=1e-5)
    free = Translator(task(shards, fabric).model.eval(), "x", fabric, "")
    both, alone = free.draws(images, ["a", "b"], 3), free.draws(images[1:], ["b"], 3)
    np.testing.assert_array_equal(both[1], alone[0])
    assert np.abs(both[1, 0] - both[1, 1]).max() > 0.01


def test_hidden_pairs_are_found_towards_the_known_map(shards: Shards, fabric: Any, tmp_path: Path) -> None:
    """Two groups of Gaussian fields, one through a map: neither network ever saw both of one image."""
    changes = {"block": 1, "critic_rate": 3e-3, "cycle_weight": 2.0}
    made = task(shards, fabric, 150, optimiser={"batch_size": 8, "learning_rate": 2e-3}, **changes)
    fit(made, made.settings.optimiser, fabric, tmp_path, "x")
    images, truth = (shards.tensors(name, np.arange(56, 64)) for name in ("image", "other"))
    model: Any = made.modules["average"]
    x = torch.from_numpy(images) * 2 - 1
    with torch.no_grad():
        begun, guess = ((each("b", x).numpy() + 1) / 2 for each in (model.toned, model.guess))
    drawn = Translator(model, "x", fabric, "").draws(images, list("abcdefgh"), 4).mean(1)
    toned, guessed, told = (np.abs(each - truth).mean() for each in (begun, guess, drawn))
    assert guessed < 0.8 * toned and told < toned
    for found in (guess, drawn):
        assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.9
        assert np.corrcoef((found - images).mean((0, 1, 2)), RAMP)[0, 1] > 0.95


# ------------------------------------------------------------------------------------------------------- training


def test_a_resumed_training_is_an_undisturbed_one(shards: Shards, fabric: Any, tmp_path: Path) -> None:
    whole, begun, resumed = (task(shards, fabric) for _ in range(3))
    curve = fit(whole, whole.settings.optimiser, fabric, tmp_path / "whole", "x")
    steps = begun.train_step

    def killed(step: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return steps(step)

    begun.train_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        fit(begun, begun.settings.optimiser, fabric, tmp_path / "other", "x")
    again = fit(resumed, resumed.settings.optimiser, fabric, tmp_path / "other", "x")
    assert again.equals(curve)
    for name, value in whole.modules["average"].state_dict().items():
        assert torch.equal(value, resumed.modules["average"].state_dict()[name]), name


def test_a_batch_in_parts_is_the_same_step(shards: Shards, fabric: Any) -> None:
    whole, parts = (task(shards, fabric) for _ in range(2))
    parts.micro.size = 2
    for made in (whole, parts):
        made.train_step(0)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(value, parts.model.state_dict()[name], rtol=1e-3, atol=1e-5, msg=name)


def test_scans_are_measured_one_by_one_and_validated_as_many_at_a_time_as_in_training(
    shards: Shards, fabric: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    images = Domain.images
    monkeypatch.setattr(Domain, "images", lambda domain, rows: read.append(len(rows)) or images(domain, rows))
    made = task(shards, fabric)
    assert set(read) == {1}
    for side, domain in made.domains.items():
        every = torch.from_numpy(images(domain, domain.rows)) * 2 - 1
        net = made.model.diffusion(side)
        blocks = net.in_blocks(every)
        torch.testing.assert_close(net.offset[0], blocks.mean(0))
        assert float(net.scale) == pytest.approx(float((blocks - blocks.mean(0)).square().mean().sqrt()), rel=1e-5)
    seen: list[int] = []
    model: Any = made.modules["average"]
    clean = model.clean
    model.clean = lambda side, sources, *more: seen.append(len(sources)) or clean(side, sources, *more)
    in_parts = made.validate()
    assert seen == [4] * 4
    made.micro.size = 16
    assert made.validate() == pytest.approx(in_parts, rel=1e-5, abs=1e-7) and seen[4:] == [8, 8]


def test_what_is_written_draws_as_what_was_trained(shards: Shards, fabric: Any, tmp_path: Path) -> None:
    made = task(shards, fabric)
    train_unpaired(
        groups(shards), made.settings, PLAIN, config.Compute(), "x/translation", fabric, tmp_path / "state", tmp_path
    )
    model, card = load_unpaired(tmp_path)
    assert card["groups"]["a"]["columns"] == ["image"] and card["channels"] == {"a": 1, "b": 1}
    guess = model.guess("b", torch.from_numpy(shards.tensors("image", [0])) * 2 - 1)
    assert guess.shape == (1, *SHAPE) and (tmp_path / "history.parquet").is_file()
    loaded = Translator.load(tmp_path, ["image"], ["other"], "x", fabric, "translation")
    np.testing.assert_allclose(
        loaded.guess(shards.tensors("image", [0])), ((guess + 1) / 2).clamp(0, 1).numpy(), atol=1e-6
    )
    with pytest.raises(UserError, match=r"was trained with \['image'\]. Train it again"):
        Translator.load(tmp_path, ["other"], ["other"], "x", fabric, "translation")
