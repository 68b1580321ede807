"""Measurement operators: the adjoint is one, noise is what it says, and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from meddiff_steps.config import Reconstruction
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import OPERATORS
from meddiff_steps.imaging.operators.base import Operator, build, inner
from meddiff_steps.imaging.operators.low_count import LowCount
from meddiff_steps.imaging.operators.mri import Mri, coil_maps, sampling_mask
from meddiff_steps.imaging.total_variation import squared_norm, total_variation

SHAPES = [(1, 12, 8, 16), (1, 12, 16)]
STRENGTHS = {"mri": 4.0, "super_resolution": 4, "denoising": 0.1, "low_count": 50.0}


def made(name: str, shape: tuple[int, ...], given: dict[str, np.ndarray] | None = None, **changes: Any) -> Operator:
    settings = Reconstruction(operators=[name], coils=3, **changes)
    spacing = (2.0,) * (len(shape) - 1)
    return build(name, STRENGTHS[name], settings, shape, spacing, np.random.default_rng(0), given)


def random(shape: tuple[int, ...], seed: int, is_complex: bool = False) -> Tensor:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, *shape)) + (1j * rng.standard_normal((2, *shape)) if is_complex else 0)
    return torch.from_numpy(values.astype(np.complex64 if is_complex else np.float32))


def test_every_operator_is_tested() -> None:
    assert list(OPERATORS.names()) == list(STRENGTHS)
    for name in OPERATORS.names():
        assert OPERATORS.entry(name)["strengths"] in Reconstruction.model_fields


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STRENGTHS)
def test_the_adjoint_is_one(name: str, shape: tuple[int, ...]) -> None:
    """<A x, y> = <x, A* y> for any x and y."""
    operator = made(name, shape)
    x, y = random(shape, 1), random(operator.measured_shape, 2, operator.is_complex)
    assert operator.forward(x).shape == y.shape and operator.adjoint(y).shape == x.shape
    left, right = inner(operator.forward(x), y), inner(x, operator.adjoint(y))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4 * float(left.abs().max()))
    assert operator.first_look(y).shape == x.shape


@pytest.mark.parametrize("name", STRENGTHS)
def test_noise_is_as_large_as_it_says(name: str) -> None:
    """Of low counts: of many images, so bright that the noise of counts is Gaussian."""
    shape = SHAPES[0]
    operator, image = made(name, shape), torch.full((1, *shape), 0.8)
    known, measured = operator.measure(image, np.random.default_rng(3))
    left = (measured - known.forward(image))[known.reached()[None]]
    left = torch.view_as_real(left) if left.is_complex() else left
    assert float(left.std()) == pytest.approx(known.noise_std, rel=0.1)
    assert abs(float(left.mean())) < 0.1 * known.noise_std
    if name == "mri":
        assert float(measured[~known.reached()[None]].abs().max()) == 0


@pytest.mark.parametrize("shape", [shape[1:] for shape in SHAPES])
def test_a_sampling_mask_measures_as_much_as_it_says_and_the_middle_wholly(shape: tuple[int, ...]) -> None:
    mask = sampling_mask(shape, 4.0, 0.2, np.random.default_rng(0))
    assert mask.size / mask.sum() == pytest.approx(4.0, rel=0.05)
    assert (mask == mask[:1]).all(), "whole lines along the readout"
    middle = [np.abs(np.fft.fftfreq(n)) * 2 <= 0.2 for n in shape[1:]]
    assert mask[0][np.ix_(*middle)].all()
    with pytest.raises(UserError, match=r"reconstruction.calibration_share: 0.9 measures \d+ of \d+ lines wholly"):
        sampling_mask(shape, 4.0, 0.9, np.random.default_rng(0))


def test_all_of_k_space_gives_the_image_back() -> None:
    shape = (6, 8, 10)
    operator = Mri(coil_maps(shape, 4), np.ones(shape), 0.0)
    image = random((1, *shape), 0)
    torch.testing.assert_close(operator.adjoint(operator.forward(image)), image, rtol=0, atol=1e-5)
    assert squared_norm(operator) == pytest.approx(1.1, rel=1e-3)


def test_thick_slices_are_means_and_a_plain_image_stays_plain() -> None:
    operator = made("super_resolution", (1, 4, 4, 8))
    torch.testing.assert_close(operator.forward(torch.full((1, 1, 4, 4, 8), 0.5)), torch.full((1, 1, 4, 4, 2), 0.5))
    ramp = torch.arange(8.0).expand(1, 1, 4, 4, 8)
    seen = operator.first_look(operator.forward(ramp))
    assert (seen[..., 1:] >= seen[..., :-1]).all()
    with pytest.raises(UserError, match="slice_factors: 4 does not divide the 10 voxels"):
        made("super_resolution", (1, 4, 4, 10))


def test_counts_know_their_own_noise() -> None:
    bright, dark = torch.full((1, 1, 8, 8, 8), 1.0), torch.full((1, 1, 8, 8, 8), 0.25)
    operator = made("low_count", (1, 8, 8, 8))
    rates = [operator.measure(image, np.random.default_rng(0))[0] for image in (bright, dark)]
    assert all(isinstance(rate, LowCount) for rate in rates)
    ratio = float(rates[0].rate.mean() / rates[1].rate.mean())  # type: ignore[attr-defined]
    assert ratio == pytest.approx(4.0, rel=0.05)


def test_a_measurement_of_another_operator_is_refused() -> None:
    operator = made("mri", (1, 8, 8, 8))
    with pytest.raises(UserError, match=r"scan.npz: y has the shape \(8, 8\), expected \(3, 8, 8, 8\)"):
        operator.checked(np.zeros((8, 8)), "scan.npz")
    with pytest.raises(UserError, match="y is real, expected complex"):
        operator.checked(np.zeros((3, 8, 8, 8)), "scan.npz")
    with pytest.raises(UserError, match="not finite"):
        operator.checked(np.full((3, 8, 8, 8), np.nan + 0j), "scan.npz")


def test_arrays_of_a_measurement_must_fit() -> None:
    maps, mask = coil_maps((8, 8, 8), 5), np.ones((8, 8, 8))
    with pytest.raises(UserError, match=r"root sum of squares of maps .* expected 1.*Divide maps by it"):
        made("mri", (1, 8, 8, 8), {"maps": maps, "mask": mask})
    maps /= np.sqrt((np.abs(maps) ** 2).sum(0))
    maps[:, 0] = 0
    assert made("mri", (1, 8, 8, 8), {"maps": maps, "mask": mask}).measured_shape == (5, 8, 8, 8)
    with pytest.raises(UserError, match=r"mask has the shape \(8, 8\), expected \(8, 8, 8\)"):
        made("mri", (1, 8, 8, 8), {"maps": maps, "mask": mask[0]})
    with pytest.raises(UserError, match="no array 'mask'"):
        made("mri", (1, 8, 8, 8), {"maps": maps})
    with pytest.raises(UserError, match="mask is empty"):
        made("mri", (1, 8, 8, 8), {"maps": maps, "mask": 0 * mask})


def test_k_space_with_its_zero_in_the_middle_is_refused_with_the_way_to_turn_it() -> None:
    """As fastMRI, BART and ISMRMRD have it; what the advice makes of it is the image."""
    shape, axes = (12, 8, 10), (-3, -2, -1)
    maps = coil_maps(shape, 3)
    maps /= np.sqrt((np.abs(maps) ** 2).sum(0))
    operator = made("mri", (1, *shape), {"maps": maps, "mask": np.ones(shape)})
    image = np.zeros(shape)
    image[3:9, 2:6, 2:7] = 1
    centred = np.fft.ifftshift(maps * image, axes=axes)
    centred = np.fft.fftshift(np.fft.fftn(centred, axes=axes, norm="ortho"), axes=axes)
    with pytest.raises(UserError, match=r"scan.npz: .* along axis 1, so that .* expected at index 0 .*ifftshift"):
        operator.checked(centred, "scan.npz")
    turned = np.fft.ifftn(np.fft.ifftshift(centred, axes=axes), axes=axes, norm="ortho")
    turned = np.fft.fftn(np.fft.fftshift(turned, axes=axes), axes=axes, norm="ortho")
    np.testing.assert_allclose(operator.first_look(operator.checked(turned, "scan.npz"))[0, 0], image, atol=1e-5)


def test_counts_of_less_than_one_are_not_taken_for_more() -> None:
    """x of 0.01 and 10 counts: a rate of 0.1, below the least one."""
    rate = np.full((1, 8, 8, 8), 0.1, np.float32)
    operator = build(
        "low_count", 10.0, Reconstruction(), rate.shape, (2.0,) * 3, np.random.default_rng(0), {"rate": rate}
    )
    found = operator.first_look(operator.checked(rate / np.sqrt(rate), "scan.npz"))
    np.testing.assert_allclose(found, 0.01, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ total variation


def test_total_variation_is_that_of_a_library() -> None:
    """Of noise alone it is Chambolle's problem, which scikit-image solves."""
    from skimage.restoration import denoise_tv_chambolle

    rng = np.random.default_rng(0)
    image = np.zeros((1, 24, 24), np.float32)
    image[0, 6:18, 8:20] = 1.0
    noisy = image + 0.2 * rng.standard_normal(image.shape).astype(np.float32)
    found = total_variation(made("denoising", image.shape), torch.from_numpy(noisy)[None], 0.2)[0, 0].numpy()
    expected = denoise_tv_chambolle(noisy[0], weight=0.2, eps=1e-8, max_num_iter=5000)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    assert np.abs(found - image[0]).mean() < 0.5 * np.abs(noisy - image).mean()


def test_total_variation_of_thick_slices_is_run_to_its_end() -> None:
    """Which takes more iterations than noise alone."""
    image = np.zeros((1, 24, 24, 24), np.float32)
    image[0, 6:18, 8:20, 5:19], image[0, 10:14, 12:16, 8:13] = 0.6, 0.9
    operator = made("super_resolution", image.shape)
    operator, measured = operator.measure(torch.from_numpy(image)[None], np.random.default_rng(0))
    weight = 15 * operator.noise_std**2
    solution = total_variation(operator, measured, weight, 5000, 0.0)
    error = float((total_variation(operator, measured, weight) - solution).norm() / solution.norm())
    assert error < 0.01
    assert torch.equal(total_variation(operator, measured, weight, 5000), total_variation(operator, measured, weight))


def test_without_weight_it_is_least_squares() -> None:
    operator = made("super_resolution", (1, 4, 4, 8))
    measured = operator.forward(random((1, 4, 4, 8), 0))
    found = total_variation(operator, measured, 0.0, 500)
    torch.testing.assert_close(operator.forward(found), measured, rtol=0, atol=1e-2)
