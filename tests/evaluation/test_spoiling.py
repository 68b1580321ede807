"""Ways to spoil images: what each does to an image, and that grain has the strength and spectrum of what is missing."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from meddiff_steps.core.random_streams import philox, seed_key
from meddiff_steps.evaluation import spoiling
from meddiff_steps.evaluation.spectrum import radial_power


def key(name: str) -> str:
    return seed_key("test/spoiling", 0, 0, name)


def pictures(count: int, shape: tuple[int, ...] = (32, 36)) -> list[np.ndarray]:
    """Textured discs, a bright half with twice the texture of the dark one, on black."""
    grid = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in shape], indexing="ij")
    disc = np.sqrt(sum(np.square(g) for g in grid)) < min(shape) / 2 - 2
    side = np.where(grid[0] > 0, 1.0, 0.5)
    out = []
    for i in range(count):
        texture = gaussian_filter(philox("test", f"spoiling {i}").normal(size=shape), 0.7)
        out.append((disc * np.clip(side * (0.6 + 0.2 * texture), 0.05, 1)).astype(np.float32))
    return out


def test_blocks_have_one_offset_each_and_background_none() -> None:
    image = np.full((10, 8), 0.5, np.float32)
    image[:, 6:] = 0.0
    change = spoiling.blocky(image, key("blocks")) - image
    assert (change[:, 6:] == 0).all()
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        for columns in (slice(0, 4), slice(4, 6)):
            np.testing.assert_allclose(change[rows, columns], change[rows, columns].ravel()[0], atol=1e-6)
    assert len(np.unique(change[:, :6].round(6))) == 6


def test_haze_lies_in_the_dark_alone() -> None:
    image = pictures(1)[0]
    hazy = spoiling.hazy(image, key("haze"))
    assert (hazy[image > 0.05] == image[image > 0.05]).all()
    dark = hazy[image == 0]
    assert dark.mean() == pytest.approx(spoiling.HAZE, rel=0.3)
    assert 0.01 < dark.min() < dark.max() < 0.05


@pytest.mark.parametrize("shape", [(32, 36), (20, 24, 22)])
def test_grain_has_the_power_and_the_local_strength_of_what_soft_images_lack(shape: tuple[int, ...]) -> None:
    images = pictures(24, shape)
    soft = [spoiling.blurred(image) for image in images]
    grain = spoiling.Grain.fit(lambda: zip(images, soft, strict=True))
    drawn = [grain.drawn_on(image, key(f"grain {i}")) for i, image in enumerate(soft)]
    power = [
        radial_power(np.stack([a - b for a, b in zip(some, soft, strict=True)])[:, None]).mean(0)
        for some in (images, drawn)
    ]
    fine = len(power[0]) // 2  # where nearly all of it is
    np.testing.assert_allclose(power[1][fine:], power[0][fine:], rtol=0.4)
    assert power[1][fine:].sum() == pytest.approx(power[0][fine:].sum(), rel=0.25)
    bright, dark = np.mean(images, 0) > 0.5, (np.mean(images, 0) > 0.1) & (np.mean(images, 0) < 0.35)
    residual, noise = (np.stack(some) - np.stack(soft) for some in (images, drawn))
    for region in (bright, dark):
        assert noise[:, region].std() == pytest.approx(residual[:, region].std(), rel=0.25)
    assert noise[:, bright].std() > 1.5 * noise[:, dark].std()
    assert (np.stack(drawn)[np.stack(soft) <= spoiling.DARK] <= spoiling.DARK).all()


def test_grain_of_perfect_reconstructions_is_none() -> None:
    images = pictures(4)
    grain = spoiling.Grain.fit(lambda: zip(images, images, strict=True))
    np.testing.assert_allclose(grain.drawn_on(images[0], key("none")), images[0], atol=1e-6)
    black = [np.zeros((8, 8), np.float32)] * 2
    assert (spoiling.Grain.fit(lambda: zip(black, black, strict=True)).drawn_on(black[0], key("black")) == 0).all()


def test_what_is_drawn_follows_the_key() -> None:
    image = pictures(1)[0]
    for spoil in (spoiling.blocky, spoiling.hazy):
        assert np.array_equal(spoil(image, key("a")), spoil(image, key("a")))
        assert not np.array_equal(spoil(image, key("a")), spoil(image, key("b")))
