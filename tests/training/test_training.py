import contextlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from monai.losses import DiceLoss

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.compute.micro_batch import MicroBatch
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.imaging.variants import Variant, draw_variant, untouched
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.tone import ToneCurve
from meddiff_steps.models.torchscript import load_torchscript
from meddiff_steps.models.weights import weights_digest
from meddiff_steps.training import loop
from meddiff_steps.training.checkpoints import CheckpointFolder
from meddiff_steps.training.latent_data import LatentData, drop
from meddiff_steps.training.tasks import image_to_image
from meddiff_steps.training.tasks.autoencoder import AutoencoderTask, perceptual_loss, spectral_loss
from meddiff_steps.training.tasks.decoder import BLACK, LEAST_SHARE, DecoderTask
from meddiff_steps.training.tasks.diffusion import DiffusionTask
from meddiff_steps.training.tasks.image_to_image import ImageToImageTask

#: Sums of parts are rounded otherwise. Largest relative difference of a point of the curve: 2e-7 (AVX2: 2e-5) with
#: AdamW; 2.1e-3 with Muon, which makes matrices orthogonal in bfloat16.
CURVE_TOLERANCE = {"adamw": 5e-5, "muon": 1e-2}
OPTIMISER = config.NetworkOptimiser(
    steps=7, batch_size=4, learning_rate=1e-3, warmup_steps=2, log_every=2, checkpoint_every=3, validate_every=4
)


@pytest.fixture(scope="module")
def fabric():
    return make_fabric(config.Compute(device="cpu", precision="32-true"), threads=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "shard.arrow"
    rng = np.random.default_rng(0)
    with ShardWriter(path, {"scan_id": pa.string(), "image": TensorColumn("float16", (1, 8, 8, 8))}) as shard:
        for i in range(10):
            shard.append(scan_id=str(i), image=rng.random((1, 8, 8, 8)))
    return Shards([path])


def autoencoder_task(images, fabric, features=None, **changes):
    settings = config.Autoencoder(
        **{
            "channels": [8, 16],
            "norm_num_groups": 4,
            "latent_channels": 4,
            "optimiser": OPTIMISER.model_dump(),
            **changes,
        }
    )
    return AutoencoderTask(
        settings,
        config.Variants(count=2, flip=True, max_shift_voxels=1),
        images,
        range(8),
        range(8, 10),
        "seed",
        fabric,
        features,
    )


def latent_data(path, variants=2, posterior=True):
    """Ten random latents, of `variants` variants a scan, with effects of both covariates."""
    rng = np.random.default_rng(0)
    shape = TensorColumn("float16", (4, 4, 4, 4))
    columns = {"mean": shape, "numbers": TensorColumn("float32", (5,))}
    if posterior:
        columns["log_variance"] = shape
    settings = config.Variants(count=variants, flip=True, max_shift_voxels=1, max_contrast=0.1)
    with ShardWriter(path, columns) as shard:
        for row in range(10):
            variant = draw_variant(settings, 3, rng) if row % variants else untouched(3)
            values = {"mean": rng.normal(size=shape.shape), "numbers": variant.numbers(settings)}
            shard.append(**values, **({"log_variance": np.full(shape.shape, -4.0)} if posterior else {}))
    prior = {"offset": torch.zeros(1, *shape.shape), "scale": torch.tensor(1.1)}
    effects = {
        "effects": torch.from_numpy(0.1 * rng.normal(size=(4, *shape.shape))).float(),
        "feature_mean": torch.zeros(4),
        "feature_covariance": torch.eye(4),
        "deviation": torch.tensor(0.9),
    }
    prior |= {f"effects.{name}": value for name, value in effects.items()}
    covariates = rng.normal(size=(10, 2)).astype(np.float32)
    return LatentData(Shards([path]), prior, covariates, np.arange(8), np.arange(8, 10))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return latent_data(tmp_path_factory.mktemp("latents") / "shard.arrow")


@pytest.fixture(scope="module")
def bare_latents(tmp_path_factory):
    """Of a first stage without a posterior, and of scans without variants."""
    return latent_data(tmp_path_factory.mktemp("bare-latents") / "shard.arrow", variants=1, posterior=False)


#: Of the two columns of covariates in `latents`.
TWO_NUMBERS = CovariateEncoding(
    {name: config.ContinuousCovariate(unit="", range=(-9, 9)) for name in "ab"}, {"a": 0, "b": 0}, {"a": 1, "b": 1}
)


def diffusion_task(latents, fabric, **changes):
    settings = config.Diffusion(
        **{
            "channels": [8, 16],
            "norm_num_groups": 4,
            "num_head_channels": 8,
            "covariate_dim": 8,
            "num_res_blocks": 1,
            "optimiser": OPTIMISER.model_dump(),
            **changes,
        }
    )
    return DiffusionTask(settings, latents, TWO_NUMBERS, "seed", fabric)


def decoder_task(images, first_stage, fabric, variants=2, base=None, **changes):
    settings = config.Decoder(
        **{"channels": 8, "num_res_blocks": 1, "crop": 4, "optimiser": OPTIMISER.model_dump(), **changes}
    )
    return DecoderTask(
        settings,
        config.Variants(count=variants, flip=True, max_shift_voxels=1),
        first_stage,
        images,
        range(8),
        range(8, 10),
        "seed",
        fabric,
        base,
    )


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Ten scans, of which most have nothing marked, and some no other contrast."""
    path = tmp_path_factory.mktemp("pairs") / "shard.arrow"
    columns = {
        "image": TensorColumn("float16", (1, 8, 8, 8)),
        "other": TensorColumn("float16", (1, 8, 8, 8), "contrast"),
    }
    rng = np.random.default_rng(0)
    with ShardWriter(path, columns | {"mask": TensorColumn("uint8", (1, 8, 8, 8), "mask")}) as shard:
        for i in range(10):
            image = rng.uniform(0.1, 0.9, (1, 8, 8, 8))
            shard.append(image=image, other=(i > 4) * image, mask=(i % 4 == 0) & (image > 0.5))
    return Shards([path])


def image_to_image_task(shards, fabric, kind, optimiser):
    names, missing = ["image", "other"], kind == "missing contrasts"
    source, target, way = (names, names, "diffusion") if missing else (["image"], ["mask"], "regression")
    settings = config.Translation(
        **{"source": source, "target": target, "missing": missing, "optimiser": optimiser.model_dump()},
        **{"block": 2, "channels": [8], "num_res_blocks": 1},
    )
    variants, drawn = config.Variants(max_shift_voxels=1), Pairs.of(shards, source, target, range(8), "x", missing)
    return ImageToImageTask(way, settings, variants, drawn, range(8), range(8, 10), "seed", fabric)


@pytest.fixture(scope="module")
def first_stage():
    """Untrained: what it leaves open is nearly the whole image."""
    torch.manual_seed(0)
    settings = config.Autoencoder(channels=[8, 16], latent_channels=4)
    return build_first_stage(settings, 3).requires_grad_(False).eval()


def digests(task):
    return {name: weights_digest(module.state_dict()) for name, module in task.modules.items()}


class Killed(Exception):
    pass


#: What is trained by the loop.
FIRST_STAGES = ["autoencoder", "kl", "vq", "adversarial"]
DRAWINGS = ["masks", "missing contrasts"]
KINDS = [*FIRST_STAGES, *DRAWINGS, "decoder", "diffusion", "unet", "no posterior", "learnt weights", "guide"]


@pytest.fixture
def task_of(images, latents, bare_latents, pairs, first_stage, fabric):
    """Makes the task of one of `KINDS`."""

    def make(kind, optimiser=OPTIMISER):
        if kind in DRAWINGS:
            return image_to_image_task(pairs, fabric, kind, optimiser)
        changes = {"optimiser": optimiser.model_dump()}
        if kind == "learnt weights":
            changes["loss_weights"] = "learnt"
        if kind == "guide":
            changes["guide_share"] = 0.5
        if kind in ("diffusion", "no posterior", "unet", "learnt weights", "guide"):
            network = "unet" if kind == "unet" else "resnet"
            return diffusion_task(
                bare_latents if kind == "no posterior" else latents, fabric, network=network, **changes
            )
        if kind == "decoder":
            return decoder_task(images, first_stage, fabric, **changes)
        if kind == "adversarial":
            changes["adversarial"] = config.Adversarial(weight=0.1, start_step=2, channels=8, layers=1)
        if kind == "vq":
            changes |= {"codebook": {"entries": 8, "parts": 2}}
        return autoencoder_task(images, fabric, network=kind if kind in ("kl", "vq") else "resnet", **changes)

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kill_at", [1, 4, 6])
def test_a_killed_and_resumed_training_gives_the_same_weights_and_curve(tmp_path, task_of, fabric, kind, kill_at):
    def make():
        return task_of(kind)

    straight = make()
    curve = loop.fit(straight, OPTIMISER, fabric, tmp_path / "straight", "test")

    interrupted = make()
    step = interrupted.train_step

    def train_step(number):
        if number == kill_at:
            raise Killed
        return step(number)

    interrupted.train_step = train_step
    with pytest.raises(Killed):
        loop.fit(interrupted, OPTIMISER, fabric, tmp_path / "resumed", "test")
    resumed = make()
    assert loop.fit(resumed, OPTIMISER, fabric, tmp_path / "resumed", "test").equals(curve)
    assert digests(resumed) == digests(straight)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A feature network as a user would give it: TorchScript, from images to maps of 3 channels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("features") / "network.pt"
    torch.jit.trace(torch.nn.Conv3d(1, 3, 3, bias=False), torch.rand(1, 1, 8, 8, 8)).save(str(path))
    return path


def test_the_perceptual_term_compares_directions_of_features(features):
    network = load_torchscript(features, "here")
    image, other = torch.rand(2, 2, 1, 8, 8, 8)
    assert perceptual_loss(network, image, image) == 0
    assert perceptual_loss(network, 2 * image, image) < 1e-6 < perceptual_loss(network, other, image), (
        "the length of features does not count"
    )
    assert perceptual_loss(network, other, -image) > 2 > perceptual_loss(network, other, image)
    empty = torch.zeros(1, 1, 8, 8, 8, requires_grad=True)
    perceptual_loss(network, empty, image[:1]).backward()
    assert empty.grad is not None and torch.isfinite(empty.grad).all()


def test_a_network_for_the_perceptual_term_is_used_and_its_absence_told(images, fabric, features, tmp_path):
    task = autoencoder_task(images, fabric, features, perceptual=config.Perceptual(weight=0.5, weights=str(features)))
    first = float(task.train_step(0)["train/perceptual"])
    plain = autoencoder_task(images, fabric)
    assert first > 0 and "train/perceptual" not in plain.train_step(0)
    assert digests(task) != digests(plain)
    assert not any(p.requires_grad for p in task.features.parameters())
    (tmp_path / "text.pt").write_text("no network")
    for path, message in ((tmp_path / "gone.pt", "there is no file"), (tmp_path / "text.pt", "is no TorchScript file")):
        with pytest.raises(UserError, match=rf"autoencoder\.perceptual\.weights: .*{message}"):
            autoencoder_task(images, fabric, path, perceptual=config.Perceptual(weight=0.5, weights=str(path)))
    with pytest.raises(UserError, match="no network was given: add --features"):
        autoencoder_task(images, fabric, perceptual=config.Perceptual(weight=0.5, weights=str(features)))


def test_a_truncated_checkpoint_is_not_resumed_from(tmp_path, latents, fabric):
    task = diffusion_task(latents, fabric)
    loop.fit(task, OPTIMISER, fabric, tmp_path, "test")
    newest = max(tmp_path.glob("step-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    again = diffusion_task(latents, fabric)
    loop.fit(again, OPTIMISER, fabric, tmp_path, "test")
    assert digests(again) == digests(task)


def saved(folder):
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors"))


def test_the_one_before_a_truncated_checkpoint_is_taken_and_later_saves_stay(tmp_path, caplog):
    model = torch.nn.Linear(2, 2)
    checkpoints = CheckpointFolder(tmp_path)
    for step in (500, 750, 1000):
        checkpoints.save(step, {"model": model}, {}, {"history": [step]})
    assert saved(tmp_path) == [750, 1000]
    newest = tmp_path / "step-000001000.safetensors"
    newest.write_bytes(newest.read_bytes()[:50])
    assert checkpoints.restore({"model": model}, {}) == (750, {"history": [750]})
    assert [path.name for path in tmp_path.glob("*.broken")] == [f"{newest.name}.broken"]
    assert f"put aside as {newest.name}.broken" in caplog.text


def test_a_save_outlives_a_file_of_a_later_step(tmp_path):
    model = torch.nn.Linear(2, 2)
    checkpoints = CheckpointFolder(tmp_path)
    (tmp_path / "step-000001000.safetensors").write_bytes(b"broken")
    for step in (250, 500, 900):  # a training that began anew, stopped at 900
        checkpoints.save(step, {"model": model}, {}, {})
    assert saved(tmp_path) == [500, 900, 1000]
    assert checkpoints.restore({"model": model}, {}) == (900, {})


def test_a_finished_training_trains_no_more(tmp_path, latents, fabric):
    loop.fit(diffusion_task(latents, fabric), OPTIMISER, fabric, tmp_path, "test")
    task = diffusion_task(latents, fabric)
    task.train_step = None
    assert len(loop.fit(task, OPTIMISER, fabric, tmp_path, "test"))


def out_of_memory_above(images_at_a_time, module):
    """Make the network of a task refuse larger batches, as a GPU does."""

    def refuse(_, inputs):
        if torch.is_grad_enabled() and len(inputs[0]) > images_at_a_time:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore words")

    module.register_forward_pre_hook(refuse)


@pytest.mark.parametrize("method", ["adamw", "muon"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [1, 3])
def test_out_of_memory_halves_what_is_computed_at_a_time_and_not_the_batch(tmp_path, task_of, kind, room, method):
    optimiser = OPTIMISER.model_copy(update={"method": method})

    def make():
        return task_of(kind, optimiser)

    whole = make()
    expected = loop.fit(whole, OPTIMISER, whole.fabric, tmp_path / "whole", "test")
    parts = make()
    out_of_memory_above(room, parts.modules["discriminator" if kind == "adversarial" else "model"])
    curve = loop.fit(parts, OPTIMISER, parts.fabric, tmp_path / "parts", "test")
    assert (whole.micro.size, parts.micro.size) == (None, {1: 1, 3: 2}[room])
    assert curve[["step", "metric"]].equals(expected[["step", "metric"]])
    np.testing.assert_allclose(curve["value"], expected["value"], rtol=CURVE_TOLERANCE[method])

    again = make()  # a later attempt does not try what did not fit
    loop.fit(again, OPTIMISER, again.fabric, tmp_path / "parts", "test")
    assert again.micro.size == parts.micro.size


class Rank:
    """One of two processes that run one after the other; means over both are right once both have told theirs."""

    world_size = 2

    def __init__(self, fabric, rank, told):
        self.fabric, self.global_rank, self.told = fabric, rank, told

    def __getattr__(self, name):
        return getattr(self.fabric, name)

    def all_reduce(self, value, reduce_op):
        self.told[self.global_rank] = value
        return getattr(torch.stack(list(self.told.values())), reduce_op)(0)


@pytest.mark.parametrize("kind", DRAWINGS)
def test_processes_have_the_loss_of_the_batch_and_its_gradients(task_of, fabric, kind, monkeypatch):
    monkeypatch.setattr(image_to_image, "clip_gradients", lambda *_: None)
    whole, told, shares = task_of(kind), {}, {}
    loss = float(whole.train_step(0)["train/loss"])
    for rank in (0, 1, 0):
        task = task_of(kind)
        task.fabric = Rank(fabric, rank, told)
        shares[rank] = float(task.train_step(0)["train/loss"]), [p.grad for p in task.model.parameters()]
    assert (shares[0][0] + shares[1][0]) / 2 == pytest.approx(loss, rel=1e-5)
    for parameter, *grads in zip(whole.model.parameters(), shares[0][1], shares[1][1], strict=True):
        torch.testing.assert_close(sum(grads) / 2, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_dice_is_that_of_monai_over_the_batch(channels):
    logits = torch.randn(4, channels, 6, 6)
    shares = torch.eye(3)[torch.randint(3, (4, 6, 6))].movedim(-1, 1)[:, :channels]
    expected = DiceLoss(sigmoid=channels == 1, softmax=channels > 1, batch=True)(logits, shares)
    torch.testing.assert_close(image_to_image.dice_loss(image_to_image.overlap(logits, shares)), expected)


def test_gradients_of_all_parts_but_the_last_stay_in_their_process():
    """Where a network is asked decides it, as where its gradients are taken."""
    inside = []

    class Two:
        world_size, device = 2, torch.device("cpu")

        @contextlib.contextmanager
        def no_backward_sync(self, module, enabled):
            inside.append(enabled)
            yield
            inside.pop()

        def backward(self, loss):
            loss.backward()
            seen.append(inside[-1])

    def losses(rows):
        seen.append(inside[-1])
        return net(torch.ones(rows.stop - rows.start, 2)).mean(), {}

    net, seen, micro = torch.nn.Linear(2, 1), [], MicroBatch(Two())
    inside.append("outside")
    micro.size = 2
    micro.gradients(net, 6, losses)
    assert seen == [True, True, True, True, False, False]


@pytest.mark.parametrize("kind", [*DRAWINGS, "diffusion"])
def test_held_out_images_are_looked_at_as_many_at_a_time_as_in_training(task_of, kind, monkeypatch):
    task, seen = task_of(kind), []
    task.val_rows = np.arange(10)
    task.modules["average"].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    expected = task.validate()["val/loss"]
    looks = 2 if kind == "masks" else 1  # Dice of parts needs what the whole has in common
    assert seen == looks * [4, 4, 2]
    for room, sizes in ((3, looks * [3, 3, 3, 1]), (16, [10])):
        task.micro.size, seen[:] = room, []
        assert task.validate()["val/loss"] == pytest.approx(expected, rel=1e-5) and seen == sizes


def test_one_image_that_does_not_fit_is_an_error_that_says_what_helps(tmp_path, latents, fabric):
    task = diffusion_task(latents, fabric)
    out_of_memory_above(0, task.modules["model"])
    with pytest.raises(
        UserError, match=r"no room for one image in training \(CUDA out of memory.*gradient_checkpointing"
    ):
        loop.fit(task, OPTIMISER, fabric, tmp_path, "test")


def test_the_seed_decides_the_weights(tmp_path, latents, fabric):
    first = diffusion_task(latents, fabric)
    torch.manual_seed(123)
    assert digests(diffusion_task(latents, fabric)) == digests(first)


@pytest.mark.parametrize("method", ["adamw", "muon"])
@pytest.mark.parametrize(("kind", "metric"), [("autoencoder", "train/l1"), ("decoder", "train/loss")])
def test_losses_fall(tmp_path, task_of, fabric, kind, metric, method):
    settings = OPTIMISER.model_copy(update={"steps": 40, "log_every": 10, "method": method})
    curve = loop.fit(task_of(kind, settings), settings, fabric, tmp_path, "test")
    found = curve[curve["metric"] == metric]["value"].to_numpy()
    assert found[-1] < found[0]


@pytest.mark.parametrize(("end", "told"), [(0.31, True), (0.29, False)])
def test_a_training_that_did_not_lower_the_held_out_loss_is_told(tmp_path, latents, fabric, caplog, end, told):
    task = diffusion_task(latents, fabric)
    looks = iter([0.3, 0.5, end])
    task.validate = lambda: {"val/loss": next(looks)}
    loop.fit(task, OPTIMISER, fabric, tmp_path, "diffusion")
    assert ("did not lower val/loss: 0.3 before the first step, 0.31 at the end" in caplog.text) == told


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, latents, fabric):
    task = diffusion_task(latents, fabric)
    task.train_step = lambda step: {"train/loss": torch.tensor(float("nan"))}
    with pytest.raises(UserError, match="learning rate"):
        loop.fit(task, OPTIMISER, fabric, tmp_path, "test")


def test_without_held_out_scans_there_is_no_validation_and_no_failure(tmp_path, images, fabric):
    settings = config.Autoencoder(
        channels=[8, 16], norm_num_groups=4, latent_channels=4, optimiser=OPTIMISER.model_dump()
    )
    task = AutoencoderTask(settings, config.Variants(), images, range(10), [], "seed", fabric)
    curve = loop.fit(task, OPTIMISER, fabric, tmp_path, "test")
    assert len(curve) and not curve["metric"].str.startswith("val/").any()


def test_grey_levels_are_fitted_on_draws_without_the_curve_of_a_base(images, first_stage, fabric):
    """The same weights are given the same curve, whether they came with one or not."""
    fresh = decoder_task(images, first_stage, fabric)
    fresh.fit_grey_levels()
    fitted = fresh.modules["average"]
    expected = fitted.tone.values.clone()
    assert not torch.equal(expected, ToneCurve().values)
    later = decoder_task(images, first_stage, fabric, base=fitted)
    later.fit_grey_levels()
    assert torch.equal(later.modules["average"].tone.values, expected)


def test_epochs_are_permutations_and_steps_are_reproducible():
    rows = np.concatenate([loop.batch_rows("root", step, 4, 10) for step in range(5)])
    assert sorted(rows[:10]) == list(range(10))
    assert sorted(rows[10:]) == list(range(10))
    assert list(rows[:10]) != list(rows[10:])
    assert list(loop.batch_rows("root", 2, 4, 10)) == list(rows[8:12])


def test_the_learning_rate_warms_up_and_falls_to_nearly_zero():
    scales = [loop.learning_rate_scale(step, OPTIMISER) for step in range(OPTIMISER.steps)]
    assert scales[0] == 0.5
    assert max(scales) == 1.0
    assert scales[-1] < 0.15
    assert scales[2:] == sorted(scales[2:], reverse=True)


def test_covariate_dropout_has_the_stated_rates():
    kept, _ = drop(np.zeros((20000, 3), np.float32), each=0.2, together=0.1, generator=np.random.default_rng(0))
    assert np.isnan(kept).all(1).mean() == pytest.approx(0.1 + 0.9 * 0.2**3, abs=0.01)
    assert np.isnan(kept[:, 0]).mean() == pytest.approx(1 - 0.9 * 0.8, abs=0.01)


def test_variants_shift_without_wrapping_and_flip_left_right():
    image = np.arange(27, dtype=np.float32).reshape(1, 3, 3, 3) + 1
    shifted = Variant(False, (1, 0, 0))(image)
    assert (shifted[:, 0] == 0).all()
    assert np.array_equal(shifted[:, 1:], image[:, :-1])
    assert np.array_equal(Variant(True, (0, 0, 0))(image), image[:, ::-1])
    flat = image[:, 0]
    assert np.array_equal(Variant(True, (0, 0))(flat), flat[:, :, ::-1])
    drawn = {
        draw_variant(config.Variants(flip=True, max_shift_voxels=1), 3, np.random.default_rng(i)) for i in range(200)
    }
    assert len(drawn) > 40 and {variant.contrast for variant in drawn} == {1.0}


@pytest.mark.parametrize("dims", [2, 3])
def test_variants_change_grey_levels_and_say_how(dims):
    settings = config.Variants(flip=True, max_shift_voxels=2, max_contrast=0.2)
    image = np.linspace(0, 1, 4**dims, dtype=np.float32).reshape(1, *(4,) * dims)
    brighter = Variant(False, (0,) * dims, 1.2)(image)
    np.testing.assert_allclose(brighter, np.minimum(1.2 * image, 1.0), rtol=1e-6)
    assert brighter.dtype == np.float32 and brighter.max() == 1
    assert untouched(dims).numbers(settings).tolist() == [0.0] * (2 + dims)
    np.testing.assert_array_equal(untouched(dims)(image), image)
    shift = (2, -1, 0)[:dims]
    expected = [1.0, *(s / 2 for s in shift), -0.5]
    found = Variant(True, shift, 0.9).numbers(settings)
    assert found.dtype == np.float32 and found.tolist() == pytest.approx(expected, abs=1e-6)
    drawn = [draw_variant(settings, dims, np.random.default_rng(i)) for i in range(300)]
    numbers = np.stack([variant.numbers(settings) for variant in drawn])
    assert np.abs(numbers).max() <= 1 and numbers[:, -1].std() == pytest.approx(3**-0.5, rel=0.1)
    assert 0.8 <= min(variant.contrast for variant in drawn) < 0.82
    plain = Variant(False, (0,) * dims)
    assert plain.numbers(config.Variants()).tolist() == [0.0] * (2 + dims), "where nothing can change"


def test_the_spectral_loss_sees_blur_that_a_mean_does_not():
    x = torch.rand(1, 1, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert spectral_loss(x, x) == 0
    assert spectral_loss(blurred, x) > 0.1


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_latents_at_half_the_resolution_are_trained_to_decode_where_that_has_a_weight(images, fabric, weight):
    task = autoencoder_task(images, fabric, equivariance_weight=weight)
    found = task.train_step(0)
    assert ("train/coarse" in found) == (weight > 0)
    assert all(np.isfinite(float(value)) for value in found.values())


QUANTISED: dict[str, Any] = {"network": "vq", "codebook": {"entries": 8, "parts": 2}}


def test_codebooks_follow_the_batch_whatever_its_parts(images, fabric):
    whole, parts = (autoencoder_task(images, fabric, **QUANTISED) for _ in range(2))
    parts.micro.size = 1
    for step in range(3):
        found, same = whole.train_step(step), parts.train_step(step)
        assert float(found["train/commitment"]) == pytest.approx(float(same["train/commitment"]), rel=1e-3)
    for one, other in zip(whole.quantiser.parts, parts.quantiser.parts, strict=True):
        # A cell between two entries may go to the other one by rounding: the first batch decides where they begin.
        torch.testing.assert_close(one.ema_cluster_size, other.ema_cluster_size, atol=0.05, rtol=0)
        torch.testing.assert_close(one.embedding.weight, other.embedding.weight, atol=0.02, rtol=0)


def test_entries_begin_at_latents_of_the_first_batch_in_the_averaged_weights_too(images, fabric):
    task = autoencoder_task(images, fabric, **QUANTISED)
    before = task.quantiser.parts[0].embedding.weight.clone()
    task.train_step(0)
    model, average = task.quantiser.parts[0], task.average.quantiser.parts[0]
    assert not torch.isclose(model.embedding.weight, before).any(1).any()
    assert torch.equal(model.embedding.weight, average.embedding.weight)
    placed = model.embedding.weight.clone()
    task.train_step(1)  # no look for dead entries
    assert torch.equal(average.embedding.weight, placed), "the loop averages, not the task"
    assert not torch.equal(model.embedding.weight, placed)


def test_the_use_of_codebooks_is_validated_where_there_are_some(images, fabric):
    task = autoencoder_task(images, fabric, **QUANTISED)
    task.train_step(0)
    found = task.validate()
    assert 0 < found["val/codebook_used"] <= 1 <= found["val/codebook_perplexity"] <= 8
    counts = task.codebook_counts([8, 9])
    assert counts.shape == (2, 2, 8) and (counts.sum(-1) == 8).all(), "2 x 2 x 2 cells"
    assert autoencoder_task(images, fabric).codebook_counts([8, 9]) is None


# ----------------------------------------------------------------------------------------------------- diffusion


def fitted(latents, fabric, tmp_path, batch_size=4, **changes):
    optimiser = OPTIMISER.model_copy(
        update={"steps": 120, "learning_rate": 1e-2, "ema_decay": 0.9, "batch_size": batch_size}
    )
    task = diffusion_task(latents, fabric, optimiser=optimiser.model_dump(), covariate_dropout=0, **changes)
    return task, loop.fit(task, optimiser, fabric, tmp_path, "test")


def test_scans_without_any_covariate_are_learnt_from(tmp_path, fabric):
    data = latent_data(tmp_path / "shard.arrow", variants=1, posterior=False)
    some = data.covariates.copy()
    some[1:8:2] = np.nan
    unlabelled = LatentData(data.shards, data.prior, some, data.train_rows, data.val_rows)
    labelled = LatentData(data.shards, data.prior, some, data.train_rows[::2], data.val_rows)
    weights = []
    for each in (unlabelled, labelled):
        task = diffusion_task(each, fabric)
        curve = loop.fit(task, OPTIMISER, fabric, tmp_path / str(len(weights)), "test")
        assert np.isfinite(curve["value"]).all()
        weights.append(digests(task)["average"])
    assert weights[0] != weights[1]


def test_noise_levels_are_those_of_the_study(latents, fabric, monkeypatch):
    task, seen = diffusion_task(latents, fabric, levels={"mean": 0.5, "deviation": 0.2}), []
    given = task.process.training_timesteps
    monkeypatch.setattr(type(task.process), "training_timesteps", lambda _, *drawn: seen.append(drawn) or given(*drawn))
    task.train_step(0)
    ((uniform, mean, deviation),) = seen
    assert (mean, deviation) == (0.5, 0.2)
    assert sorted(np.floor(4 * uniform)) == [0, 1, 2, 3], "one of every quarter"
    alpha, sigma = task.process.alpha_sigma(torch.from_numpy(given(np.linspace(0.02, 0.98, 99), mean, deviation)))
    assert float((sigma / alpha).log().mean()) == pytest.approx(0.5, abs=0.01)


def test_what_a_variant_is_is_learnt(tmp_path, fabric):
    """Latents of which nothing but the variant tells the sign: told of it, the network sees through more noise."""
    rng, shape = np.random.default_rng(0), TensorColumn("float16", (2, 4, 4))
    sign, place = np.sign(rng.normal(size=40)), rng.normal(size=(2, 4, 4))
    losses = {}
    for told in (True, False):
        path = tmp_path / f"{told}.arrow"
        with ShardWriter(path, {"mean": shape, "numbers": TensorColumn("float32", (1,))}) as shard:
            for row in sign:
                shard.append(mean=row * place, numbers=[row * told])
        prior = {"offset": torch.zeros(1, 2, 4, 4), "scale": torch.ones(())}
        covariates = rng.normal(size=(40, 2)).astype(np.float32)
        data = LatentData(Shards([path]), prior, covariates, np.arange(32), np.arange(32, 40))
        assert data.variant_numbers == 1
        task, curve = fitted(data, fabric, tmp_path / f"state-{told}", batch_size=16, levels={"mean": 1.5})
        assert task.card.variants == 1
        losses[told] = curve[curve["metric"] == "val/loss"]["value"].iloc[-1]
    assert losses[True] < 0.7 * losses[False]


def test_learnt_weights_follow_the_size_of_the_loss(tmp_path, latents, fabric):
    task, curve = fitted(latents, fabric, tmp_path, loss_weights="learnt")
    with torch.no_grad():
        found = task.modules["level_losses"](torch.linspace(-2.0, 1.0, 7))
    errors = curve[curve["metric"] == "train/loss"]["value"].iloc[-10:].mean()
    assert float(found.mean()) == pytest.approx(np.log(errors), abs=0.3)


def test_learnt_weights_forget_a_part_that_did_not_fit(latents, fabric):
    """Gradients of the parts before the one that was too large are not counted twice."""

    def gradients(task, fails):
        calls = iter(range(9))

        def refuse(_, inputs):
            if fails and next(calls) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        task.modules["model"].register_forward_pre_hook(refuse)
        task.micro.size = 2
        task.train_step(0)
        return task.modules["level_losses"].last.bias.grad.clone()

    plain, again = (gradients(diffusion_task(latents, fabric, loss_weights="learnt"), fails) for fails in (False, True))
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize(("share", "kept_at"), [(0.5, 4), (0.01, 1), (1.0, 7)])
def test_the_guide_is_the_average_of_an_early_step(latents, fabric, share, kept_at):
    task = diffusion_task(latents, fabric, guide_share=share)
    seen = {}
    for step in range(OPTIMISER.steps):
        before = weights_digest(task.modules["average"].network.state_dict())
        task.train_step(step)
        seen[step + 1] = before, weights_digest(task.modules["average"].guide.state_dict())
        loop.update_average(task.modules["average"], task.modules["model"], 0.9, step)
    assert seen[kept_at][0] == seen[kept_at][1]
    assert len({guide for step, (_, guide) in seen.items() if step >= kept_at}) == 1
    assert not any(weight.requires_grad for weight in task.modules["model"].guide.parameters())


# ------------------------------------------------------------------------------------------------------- decoder


def test_crops_lie_where_there_is_an_image_and_know_where(tmp_path, first_stage, fabric):
    """Of scans that are black but for one corner, in which every voxel has a value of its own."""
    image = np.zeros((1, 16, 16, 16), np.float32)
    image[:, 8:, 8:, 8:] = np.linspace(0.1, 1, 512).reshape(8, 8, 8)
    with ShardWriter(tmp_path / "x.arrow", {"image": TensorColumn("float32", image.shape)}) as shard:
        for _ in range(10):
            shard.append(image=image)
    shards = Shards([tmp_path / "x.arrow"])
    task = decoder_task(shards, first_stage, fabric, variants=1, crop=8, latent_noise=0.0)
    residual, seen, place = task._crops(np.arange(8), np.arange(32), 32, np.random.default_rng(0))
    assert residual.shape == seen.shape == (32, 8, 4, 4, 4) and place.shape == (32, 3, 4, 4, 4)
    made = task.model.stem.inverse(residual) * task.model.deviation + (task.model.stem.inverse(seen) + 1) / 2
    assert ((made > BLACK).float().flatten(1).mean(1) >= LEAST_SHARE).float().mean() > 0.9  # by chance: 0.3
    for crop, where in zip(made, place, strict=True):
        start = [int(low) for low in ((where.flatten(1).min(1).values + 1) / 2 * 7).round() * 2]
        expected = image[(slice(None), *(slice(low, low + 8) for low in start))]
        np.testing.assert_allclose(crop.numpy(), expected, atol=1e-4)


def test_a_crop_of_nothing_but_black_is_taken_all_the_same(tmp_path, first_stage, fabric):
    with ShardWriter(tmp_path / "x.arrow", {"image": TensorColumn("float16", (1, 8, 8, 8))}) as shard:
        for _ in range(10):
            shard.append(image=np.zeros((1, 8, 8, 8)))
    task = decoder_task(Shards([tmp_path / "x.arrow"]), first_stage, fabric)
    assert np.isfinite(float(task.train_step(0)["train/loss"]))


def test_residuals_have_unit_variance(images, first_stage, fabric):
    task = decoder_task(images, first_stage, fabric, latent_noise=0.0)
    residual, _, _ = task._crops(np.arange(8), np.arange(512), 512, np.random.default_rng(1))
    assert float(residual.std()) == pytest.approx(1.0, abs=0.05)


def test_processes_make_the_batch_of_one_and_decode_their_images_alone(images, first_stage, fabric, monkeypatch):
    task = decoder_task(images, first_stage, fabric)
    rows = np.arange(4)

    def batch(mine):
        read = []
        reading = images.tensors
        monkeypatch.setattr(
            task.shards, "tensors", lambda column, wanted: read.extend(wanted) or reading(column, wanted)
        )
        made = task._batch(rows, mine, 16, np.random.default_rng(3))
        monkeypatch.undo()
        return made, read

    whole, read = batch(np.arange(16))
    assert read == [0, 1, 2, 3]
    for rank in range(2):
        mine = np.arange(16)[rank::2]
        share, read = batch(mine)
        assert read == [rank, rank + 2]
        for part, every in zip(share, whole, strict=True):
            np.testing.assert_allclose(part.numpy(), every[mine].numpy(), atol=1e-5)


def test_a_drawing_has_the_grey_levels_of_scans(images, first_stage, fabric):
    task = decoder_task(images, first_stage, fabric)
    before = task.modules["average"].tone.values.clone()
    scan, made = task.reconstruct(3, "a")
    np.testing.assert_array_equal(task.reconstruct(3, "a")[1], made)
    assert np.abs(task.reconstruct(3, "b")[1] - made).max() > 1e-3, "another draw"
    assert scan.shape == made.shape == (1, 8, 8, 8) and 0 <= made.min() <= made.max() <= 1
    task.fit_grey_levels()
    assert not torch.equal(task.modules["average"].tone.values, before)
    shares = [0.2, 0.5, 0.7]  # below what an untrained decoder clips
    after = np.concatenate([task.reconstruct(row, f"tone/{row}")[1] for row in range(8)])
    scans = images.tensors("image", range(8))
    assert np.quantile(after, shares) == pytest.approx(np.quantile(scans, shares), abs=0.02)


def test_a_decoder_in_2d(tmp_path, fabric):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "x.arrow", {"image": TensorColumn("float16", (1, 12, 8))}) as shard:
        for _ in range(10):
            shard.append(image=rng.random((1, 12, 8)))
    stage = build_first_stage(config.Autoencoder(channels=[8, 16], latent_channels=4), 2).requires_grad_(False).eval()
    task = decoder_task(Shards([tmp_path / "x.arrow"]), stage, fabric)
    curve = loop.fit(task, OPTIMISER, fabric, tmp_path / "state", "test")
    assert np.isfinite(curve["value"]).all()
    assert task.reconstruct(9, "x")[1].shape == (1, 12, 8)
