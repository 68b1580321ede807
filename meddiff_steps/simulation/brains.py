"""A simulated brain cohort, made of the MNI152 templates that ship with nilearn: no data are needed, and no person is
shown.

How a subject is made (all random numbers of subject i come from generators keyed by the seed and i):

1. Covariates: age, sex and diagnosis are drawn; head size, atrophy and ventricular size follow from them with noise of
   their own.
2. Anatomy: a point of the image is carried to the template by an affine map (head size, proportions, and how the head
   lies in the scanner, from a generator of its own), a smooth random warp at three scales (individual shape and folds)
   and a flow out of the ventricles (their enlargement).
3. Tissue: the template's probabilities of sulcal CSF, ventricular CSF, grey and white matter are sampled there,
   weighted by smooth random fields (individual sulci; atrophy turns cortex into sulcal CSF), and made to add up to the
   brain mask again.
4. A lesion, where the study asks for some: a ball with a bumpy surface in white matter, which takes the place of grey
   and white matter and displaces nothing.
5. Images: tissue intensities, the template's regional tone, bias field, noise, for T1w and any further contrast.

Volumes in the table are integrals of the subject's own tissue maps, over the points that the voxels are averaged from:
they are measured, not requested. Anatomy does not depend on the image grid: subject i at 2.5 mm is subject i at 5 mm,
and volumes differ by the blur alone.

Templates: MNI ICBM152 2009a, Fonov et al., NeuroImage 54 (2011) 313, through `nilearn.datasets`.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage
from scipy.special import ndtr, ndtri

from meddiff_steps.config import SimulatedSource
from meddiff_steps.core.errors import UserError

log = logging.getLogger(__name__)

#: The image must cover this box (mm), or large heads would be cut.
FIELD_OF_VIEW_MM = (160.0, 200.0, 160.0)
#: Ages (years) are normally distributed, cut to a range.
AGE_MEAN, AGE_SD, AGE_RANGE = 63.0, 11.0, (44.0, 82.0)
#: Middle of the template's brain mask (MNI mm); heads are centred there, and all template coordinates below are
#: relative to it.
CENTRE_MNI = np.array([0.0, -17.0, 5.0])
#: Half extent and node spacing (mm) of the grid that carries a subject's smooth fields.
FIELD_HALF_MM, FIELD_STEP_MM = (100.0, 120.0, 100.0), 5.0
#: Random warp, coarse to fine: distance of control points (mm), standard deviation of the displacement along one axis
#: (mm), and correlation between the hemispheres. More displacement at the finer scales makes lumpy skulls.
WARP_SCALES = ((60.0, 2.5, 0.85), (28.0, 1.5, 0.6), (14.0, 1.0, 0.0))
#: Fields that vary sulci and the grey-white boundary: control spacing (mm), standard deviations (log weight).
TEXTURE_MM, SULCI_SD, BOUNDARY_SD = 10.0, 0.4, 0.15
#: How heads lie in the scanner, as in IXI: standard deviations of pitch, roll and yaw (degrees), of which pitch, the
#: chin's distance from the chest, varies most; and of where the middle of the brain is (mm), along each axis.
POSE_SD_DEG, POSE_SD_MM = (6.7, 2.5, 2.0), (2.0, 2.0, 2.0)
#: Bias field: control spacing (mm), standard deviation (log intensity).
BIAS_MM, BIAS_SD = 70.0, 0.035
#: Exponent that sharpens the averaged template's tissue probabilities towards those of one person.
SHARPEN = 1.5
#: Boundary shifts (mm) for which the flow out of the ventricles is tabulated; its reach in tissue and its grid (mm).
FLOW_MM = np.arange(-2.0, 8.1, 1.0)
FLOW_REACH_MM, FLOW_STEP_MM = 32.0, 2
#: Mean T1w intensity of CSF, grey and white matter on the template's scale of 0 to 1, and how much it varies between
#: subjects.
INTENSITIES, INTENSITY_SD = np.array([0.27, 0.63, 0.88]), np.array([0.015, 0.01, 0.007])
#: The same of further contrasts (T1w is as above), and what a lesion has in each.
OTHER_INTENSITIES = {"T2w": np.array([1.0, 0.62, 0.47]), "FLAIR": np.array([0.14, 0.68, 0.49])}
LESION_INTENSITY = {"T1w": 0.50, "T2w": 0.88, "FLAIR": 0.95}
#: How much of the template's regional tone, which is of T1w, a contrast shows.
TONE = {"T1w": 1.0, "T2w": -0.4, "FLAIR": -0.3}
#: Mean radius of a lesion (mm; smallest and largest), how much it varies over the surface (standard deviation of its
#: logarithm, mm between control points), and how wide its rim is (mm).
LESION_MM, LESION_BUMPS, LESION_RIM_MM = (8.0, 18.0), (0.3, 18.0), 1.0
#: A lesion's middle is the first of so many random places that has at least so much white matter.
LESION_PLACES, LESION_WHITE = 400, 0.8
#: Values of a label map, with the tissues that they name; 0 is outside the brain.
TISSUES = {1: "sulcal CSF", 2: "ventricles", 3: "grey matter", 4: "white matter"}
#: Standard deviation of the noise, on the same scale: lowest and highest.
NOISE_SD = (0.006, 0.014)
#: Blur before voxels are averaged, as full width at half maximum in voxels: an acquired voxel is no sharp-edged box.
BLUR = 0.8
#: uint8 value of intensity 1; bias and gain stay below 255 / 190.
FULL_SCALE = 190.0


# ----------------------------------------------------------------------------------------------------------- covariates


def subject_generator(seed: str, index: int) -> np.random.Generator:
    """Return the generator of all random numbers of subject `index` (from 0), whatever the number of subjects."""
    return _generator(f"meddiff/simulate/v1|{seed}|{index}")


def _generator(key: str) -> np.random.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))


@dataclass(frozen=True)
class Traits:
    """What is drawn for a subject before its anatomy.

    Attributes
    ----------
    age, age_missing, sex, diagnosis
        Age in years (always known here, left out of the table if missing), F or M, control or case.
    head_ml
        Volume inside the brain mask.
    atrophy
        Log weight that turns cortex into sulcal CSF.
    ventricles_ml
        Ventricular volume aimed at; the table holds the one that resulted.
    """

    age: float
    age_missing: bool
    sex: str
    diagnosis: str
    head_ml: float
    atrophy: float
    ventricles_ml: float


def draw_traits(source: SimulatedSource, rng: np.random.Generator) -> Traits:
    """Draw what the anatomy follows from.

    Spreads follow healthy T1w cohorts: head size by sex, CSF by age. The diagnosis grows more frequent with age (its
    overall share stays `case_share`) and acts on sulci and ventricles like some ten more years, so that it overlaps
    with ageing.
    """
    uniform = rng.random(4)
    noise = np.clip(rng.standard_normal(4), -2.5, 2.5)
    low, high = (float(ndtr((bound - AGE_MEAN) / AGE_SD)) for bound in AGE_RANGE)
    age = round(float(AGE_MEAN + AGE_SD * ndtri(low + uniform[0] * (high - low))), 1)
    years = (age - AGE_MEAN) / AGE_SD
    male = bool(uniform[1] < 0.5)
    # Symmetric about the mean age, and within [0, 1] for every share.
    share = source.case_share * (1 + (1 - source.case_share) * 0.5 * (age - AGE_MEAN) / (AGE_RANGE[1] - AGE_MEAN))
    case = bool(uniform[2] < share)
    head_ml = (1535.0 if male else 1375.0) * math.exp(0.066 * noise[0])
    # noise[1] is shared: whoever has wide sulci for their age tends to have wide ventricles.
    atrophy = -0.1 + 0.36 * years + 0.40 * case + 0.06 * male + 0.26 * noise[1]
    ventricles = (
        math.log(23.5) + math.log(head_ml / 1455.0) + 0.29 * years + 0.32 * case + 0.08 * noise[1] + 0.26 * noise[2]
    )
    return Traits(
        age=age,
        age_missing=bool(uniform[3] < source.missing_share),
        sex="M" if male else "F",
        diagnosis="case" if case else "control",
        head_ml=head_ml,
        atrophy=float(atrophy),
        ventricles_ml=float(np.clip(math.exp(ventricles), 10.0, 66.0)),
    )


@dataclass(frozen=True)
class HeadPose:
    """How a head lies in the scanner.

    Attributes
    ----------
    rotation
        (3, 3) from the head's axes to those of the image.
    shift
        (3,) where the middle of the brain is, mm from the middle of the image.
    """

    rotation: np.ndarray
    shift: np.ndarray


def draw_pose(seed: str, index: int) -> HeadPose:
    """Draw how the head of subject `index` lies in the scanner; from a generator of its own, since a person can lie in
    any way. Pitch turns about the left-right axis, roll about the posterior-anterior one, yaw about the third.
    """
    turn, shift = np.clip(_generator(f"meddiff/simulate/pose/v1|{seed}|{index}").standard_normal((2, 3)), -2, 2)
    pitch, roll, yaw = np.radians(turn * POSE_SD_DEG)
    return HeadPose(_rotation(0, pitch) @ _rotation(1, roll) @ _rotation(2, yaw), shift * POSE_SD_MM)


# ------------------------------------------------------------------------------------------------------------- template


@dataclass(frozen=True)
class Grid:
    """Values on a regular grid: tensor (channels, z, y, x) (the order `grid_sample` wants), its first and last node in
    mm (x, y, z).
    """

    values: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    def nodes(self) -> torch.Tensor:
        """Coordinates (n, 3) of all nodes in the order of `values[0].ravel()`."""
        axes = [
            torch.linspace(float(a), float(b), n)
            for a, b, n in zip(self.first, self.last, self.values.shape[:0:-1], strict=True)
        ]
        z, y, x = torch.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
        return torch.stack([x.reshape(-1), y.reshape(-1), z.reshape(-1)], 1)

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """Trilinear values (channels, n) at points (n, 3) in mm, x y z; the nearest border value outside."""
        at = (points - self.first) / (self.last - self.first) * 2 - 1
        return torch.nn.functional.grid_sample(
            self.values[None], at[None, None, None], padding_mode="border", align_corners=True
        )[0, :, 0, 0]


def _grid(values: np.ndarray, first: np.ndarray, step: float) -> Grid:
    """Make a Grid of an array (channels, x, y, z)."""
    last = first + step * (np.array(values.shape[1:]) - 1)
    stored = torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 2, 1), np.float32))
    return Grid(stored, torch.tensor(first, dtype=torch.float32), torch.tensor(last, dtype=torch.float32))


@dataclass(frozen=True)
class Template:
    """The template, ready for sampling; coordinates are mm around CENTRE_MNI.

    Attributes
    ----------
    maps
        Sulcal CSF, ventricular CSF, grey matter, white matter (0 to 1, adding up to the brain mask), regional tone
        (intensity).
    distance
        Signed distance to the brain's surface (mm), negative inside.
    flow
        Displacement (mm) that leads from an image with moved ventricular walls back to the template, for each of
        FLOW_MM.
    ventricle_share
        Ventricular share of the brain mask for each of FLOW_MM.
    """

    maps: Grid
    distance: Grid
    flow: tuple[Grid, ...]
    ventricle_share: np.ndarray


def _ventricle_region(first: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Boxes (MNI mm) in which CSF is lateral or third ventricle, not cistern or sulcus; read off the template
    by eye.
    """
    x, y, z = np.ogrid[tuple(slice(int(o), int(o) + n) for o, n in zip(first, shape, strict=True))]
    x = abs(x)
    frontal = (x <= 28) & (y >= -24) & (y <= 36) & (z >= np.where(y <= 4, -2, 0)) & (z <= 31)
    frontal &= (x >= np.where(y >= 26, 3, 0)) & (x >= np.where(z >= 22, 4, 0))
    third = (x <= 5) & (y >= -24) & (y <= 4) & (z >= -12) & (z <= 10)
    atrium = (x <= 33) & (y >= -56) & (y < -24) & (z >= -8) & (z <= 31)
    atrium &= x >= np.select([z >= 17, z >= 12, z >= 4], [np.where(y < -40, 10, 4), 9, 14], 20)
    temporal = (x >= 28) & (x <= 37) & (y >= -40) & (y <= -6) & (z >= -24) & (z < -8)
    return frontal | third | atrium | temporal


@lru_cache(maxsize=2)
def load_template(blur_mm: float) -> Template:
    """Prepare the template for sampling at points some `blur_mm` apart.

    Maps are smoothed by that full width at half maximum, so that points see partial volume and nothing aliases.
    """
    from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template

    images = [load_mni152_template(), load_mni152_gm_template(), load_mni152_wm_template()]
    t1, grey, white = (image.get_fdata(dtype=np.float32) for image in images)
    margin = 8
    found = [np.flatnonzero((t1 > 0).any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = [(max(f[0] - margin, 0), f[-1] + margin + 1) for f in found]
    below = [(max(margin - f[0], 0), 0) for f in found]  # the mask touches the lowest slice
    t1, grey, white = (np.pad(image[tuple(slice(*b) for b in box)], below) for image in (t1, grey, white))
    first_mni = images[0].affine[:3, 3] + [f[0] - margin for f in found]
    first = first_mni - CENTRE_MNI
    mask = t1 > 0
    averaged = np.stack([np.clip(1 - grey - white, 0, 1), grey, white]) * mask
    tone = ndimage.gaussian_filter((t1 - np.tensordot(INTENSITIES.astype(np.float32), averaged, 1)) * mask, 3.0)

    tissue = averaged**SHARPEN
    tissue *= mask / np.maximum(tissue.sum(0), 1e-6)
    fluid, grey, white = tissue
    ventricles = fluid * _ventricle_region(first_mni, mask.shape)
    maps = [fluid - ventricles, ventricles, grey, white, tone]
    if blur_mm > 1:
        maps = [ndimage.gaussian_filter(m, blur_mm / 2.355) for m in maps]
    stride = 2 if blur_mm >= 2 else 1
    sampled = _grid(np.stack([m[::stride, ::stride, ::stride] for m in maps]), first, stride)
    distance = _grid(_signed_distance(np.pad(mask[::2, ::2, ::2], 8), 2)[None], first - 16, 2)

    flow = _ventricle_flow(ventricles, first)
    only_ventricles = Grid(sampled.values[1:2], sampled.first, sampled.last)
    points = flow[0].nodes()
    share = [
        float(only_ventricles(points + part(points).T).sum(dtype=torch.float64)) * FLOW_STEP_MM**3 / float(mask.sum())
        for part in flow
    ]
    return Template(sampled, distance, flow, np.array(share))


def _signed_distance(mask: np.ndarray, step: float) -> np.ndarray:
    outside, inside = ndimage.distance_transform_edt(~mask), ndimage.distance_transform_edt(mask)
    return ((outside - inside) * step).astype(np.float32)


def _ventricle_flow(ventricles: np.ndarray, first: np.ndarray) -> tuple[Grid, ...]:
    """Move the ventricular walls outwards by following a velocity field, which cannot fold (unlike a scaled
    displacement).

    The velocity is 1 mm per unit of time at the wall along the smoothed normal, vanishes on the medial axis and at
    FLOW_REACH_MM.
    """
    step = FLOW_STEP_MM
    core = ndimage.gaussian_filter(ventricles, 1.0)[::step, ::step, ::step] > 0.35
    margin = math.ceil(FLOW_REACH_MM / step) + 1
    found = [np.flatnonzero(core.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    core = np.pad(core[tuple(slice(f[0], f[-1] + 1) for f in found)], margin)
    distance = ndimage.gaussian_filter(_signed_distance(core, step), 0.75)
    reach = np.clip(1 - (np.maximum(distance, 0) / FLOW_REACH_MM) ** 2, 0, 1) ** 2
    velocity = _grid(
        np.stack(np.gradient(distance, step)) * reach, first + step * np.array([f[0] - margin for f in found]), step
    )

    start = velocity.nodes()
    levels: dict[float, Grid] = {}
    for sign in (1.0, -1.0):
        points = start
        for level in range(int(max(sign * FLOW_MM)) + 1):
            if level:  # one midpoint step per mm
                points = points - sign * velocity(points - sign * 0.5 * velocity(points).T).T
            levels[sign * level] = Grid(
                (points - start).T.reshape(velocity.values.shape).contiguous(), velocity.first, velocity.last
            )
    return tuple(levels[float(level)] for level in FLOW_MM)


# -------------------------------------------------------------------------------------------------------------- subject


@lru_cache(maxsize=8)
def _spline(spacing: float) -> tuple[torch.Tensor, ...]:
    """Cubic B-spline weights (nodes, control points) of the field grid for z, y, x; rows of unit norm keep the variance
    of white noise.
    """
    weights = []
    for half in FIELD_HALF_MM[::-1]:
        nodes = np.arange(-half, half + 1e-6, FIELD_STEP_MM)
        reach = math.ceil(half / spacing) + 1
        t = np.abs(nodes[:, None] / spacing - np.arange(-reach, reach + 1)[None])
        w = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0))
        weights.append(torch.tensor(w / np.linalg.norm(w, axis=1, keepdims=True), dtype=torch.float32))
    return tuple(weights)


def _smooth_noise(rng: np.random.Generator, channels: int, spacing: float) -> torch.Tensor:
    """Random fields (channels, z, y, x) on the field grid with unit variance, smooth over `spacing` mm."""
    z, y, x = _spline(spacing)
    noise = torch.from_numpy(rng.standard_normal((channels, z.shape[1], y.shape[1], x.shape[1]), dtype=np.float32))
    noise = torch.matmul(y, noise @ x.T)
    return torch.matmul(z, noise.flatten(2)).reshape(channels, len(z), len(y), len(x))


def _smooth_warp(rng: np.random.Generator, spacing: float, symmetry: float) -> torch.Tensor:
    """Random displacements (3, z, y, x) with unit variance on average and correlation `symmetry` between the
    hemispheres.
    """
    noise = _smooth_noise(rng, 3, spacing)
    mirrored = noise.flip(3) * torch.tensor([-1.0, 1.0, 1.0])[:, None, None, None]
    angle = math.asin(symmetry) / 2
    return math.cos(angle) * noise + math.sin(angle) * mirrored


@dataclass(frozen=True)
class Anatomy:
    """One subject's geometry and appearance, independent of the image grid."""

    to_head: torch.Tensor  # (3, 3): image mm to head mm
    middle: torch.Tensor  # (3,): middle of the brain, head mm
    shift: torch.Tensor  # (3,): where the middle is in the image, mm
    warp: Grid  # displacement towards the template, mm
    surface: Grid  # signed distance to the brain's surface, mm
    weights: Grid  # of sulcal CSF and of white matter; bias field
    flow: Grid  # displacement towards the template around the ventricles, mm
    intensities: np.ndarray  # CSF, grey, white
    noise_sd: float
    gain: float

    def head(self, points: torch.Tensor) -> torch.Tensor:
        """Carry points (n, 3) from image mm to head mm."""
        return (points - self.shift) @ self.to_head.T + self.middle

    def maps(self, head: torch.Tensor, template: Template) -> torch.Tensor:
        """Return the template's maps (5, n) at points (n, 3) in head mm."""
        at = head + self.warp(head).T
        return template.maps(at + self.flow(at).T)


@dataclass(frozen=True)
class Lesion:
    """A ball with a bumpy surface."""

    middle: torch.Tensor  # (3,): head mm
    radius_mm: float
    bumps: Grid  # log factor of the radius

    def share(self, head: torch.Tensor) -> torch.Tensor:
        """Return how much of the tissue (n,) at points (n, 3) in head mm is lesion, 0 to 1."""
        reach = self.radius_mm * torch.exp(self.bumps(head)[0])
        return torch.sigmoid((reach - (head - self.middle).norm(dim=1)) / LESION_RIM_MM)


def draw_lesion(share: float, seed: str, index: int, anatomy: Anatomy, template: Template) -> Lesion | None:
    """Draw the lesion of subject `index`, whom one has with probability `share`; from a generator of its own."""
    rng = _generator(f"meddiff/simulate/lesion/v1|{seed}|{index}")
    if rng.random() >= share:
        return None
    low, high = np.log(LESION_MM)
    radius = math.exp(rng.uniform(low, high))
    places = anatomy.middle + torch.from_numpy(rng.uniform(-1, 1, (LESION_PLACES, 3)).astype(np.float32)) * (
        torch.tensor(FIELD_OF_VIEW_MM) / 2
    )
    white = anatomy.maps(places, template)[3]
    deep = torch.nonzero(white >= LESION_WHITE)[:, 0]
    middle = places[deep[0] if len(deep) else white.argmax()]
    half = torch.tensor(FIELD_HALF_MM)
    sd, spacing = LESION_BUMPS
    return Lesion(middle, radius, Grid(sd * _smooth_noise(rng, 1, spacing), -half, half))


def draw_anatomy(traits: Traits, pose: HeadPose, template: Template, rng: np.random.Generator) -> Anatomy:
    """Draw a subject's anatomy and the settings of its scan."""
    # The first and the last three were the pose until it got a generator of its own: what follows stays what it was.
    _, proportions, _ = rng.standard_normal((3, 3))
    contrast = rng.standard_normal(3)
    noise_sd, gain = _scan_settings(rng)

    half = torch.tensor(FIELD_HALF_MM)
    warp = Grid(
        torch.stack([sd * _smooth_warp(rng, spacing, symmetry) for spacing, sd, symmetry in WARP_SCALES]).sum(0),
        -half,
        half,
    )
    texture = _smooth_noise(rng, 2, TEXTURE_MM)
    sulci = torch.exp(SULCI_SD * texture[:1] + traits.atrophy)
    boundary = torch.exp(BOUNDARY_SD * texture[1:])
    bias = torch.exp(BIAS_SD * _smooth_noise(rng, 1, BIAS_MM))

    # Every second node is enough for a distance.
    coarse = Grid(warp.values[:, ::2, ::2, ::2], -half, half)
    nodes = coarse.nodes()
    surface = template.distance(nodes + coarse.values.reshape(3, -1).T).reshape(1, *coarse.values.shape[1:])
    # Share of each cell inside the brain, were its surface flat; the warp alone changes volume and position.
    cell = 2 * FIELD_STEP_MM
    warped_ml = float((0.5 - surface / cell).clamp(0, 1).sum(dtype=torch.float64)) * cell**3 / 1000
    # A node inside has a ball of its own depth around it inside: the farthest ball ends where the brain does.
    deep = surface.reshape(-1) < 0
    depth = -surface.reshape(-1)[deep, None]
    middle = ((nodes[deep] + depth).amax(0) + (nodes[deep] - depth).amin(0)) / 2
    # The MNI152 brain is taller than brains are.
    proportions = np.clip(proportions, -2, 2) * (0.02, 0.02, 0.02) + (0.01, 0.025, -0.035)
    scale = (traits.head_ml / warped_ml) ** (1 / 3) * np.exp(proportions - proportions.mean())

    # The flow between two tabulated shifts is their average, weighted so that the ventricles get the share aimed at.
    position = float(
        np.interp(traits.ventricles_ml / traits.head_ml, template.ventricle_share, np.arange(len(FLOW_MM)))
    )
    below = min(int(position), len(FLOW_MM) - 2)
    low, high = template.flow[below], template.flow[below + 1]
    flow = Grid(torch.lerp(low.values, high.values, position - below), low.first, low.last)
    return Anatomy(
        to_head=torch.tensor(np.diag(1 / scale) @ pose.rotation.T, dtype=torch.float32),
        middle=middle,
        shift=torch.tensor(pose.shift, dtype=torch.float32),
        warp=warp,
        surface=Grid(surface, -half, half),
        weights=Grid(torch.cat([sulci, boundary, bias]), -half, half),
        flow=flow,
        intensities=INTENSITIES + INTENSITY_SD * np.clip(contrast, -2, 2),
        noise_sd=noise_sd,
        gain=gain,
    )


def _scan_settings(rng: np.random.Generator) -> tuple[float, float]:
    """Draw the standard deviation of the noise of a scan, and its gain."""
    gain = math.exp(0.06 * np.clip(rng.standard_normal(), -2, 2))
    return float(rng.uniform(*NOISE_SD)), gain


def _rotation(axis: int, angle: float) -> np.ndarray:
    a, b = [i for i in range(3) if i != axis]
    matrix = np.eye(3)
    matrix[a, a] = matrix[b, b] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


@dataclass(frozen=True)
class Lattice:
    """The image grid.

    Attributes
    ----------
    centres
        (n, 3) voxel centres in mm around the middle of the grid, in C order.
    offsets
        (m, 3) points in mm, relative to its centre, that a voxel is averaged from.
    blur_mm
        Full width at half maximum of the blur that goes with these points.
    """

    shape: tuple[int, int, int]
    spacing_mm: float
    centres: torch.Tensor
    offsets: torch.Tensor
    blur_mm: float

    @property
    def affine(self) -> np.ndarray:
        """RAS+ affine with the middle of the grid at 0, 0, 0 mm."""
        affine = np.diag([self.spacing_mm] * 3 + [1.0])
        affine[:3, 3] = -self.spacing_mm * (np.array(self.shape) - 1) / 2
        return affine


def make_lattice(shape: tuple[int, int, int], spacing_mm: float) -> Lattice:
    """Lay out voxels and their points: a grid of at most 2.5 mm, of which every second point (face-centred cubic)
    suffices.

    Raises
    ------
    UserError
        The grid is too small for a head.
    """
    extent = tuple(n * spacing_mm for n in shape)
    if any(e < need - 1e-6 for e, need in zip(extent, FIELD_OF_VIEW_MM, strict=True)):
        enough = [math.ceil(need / spacing_mm - 1e-9) for need in FIELD_OF_VIEW_MM]
        raise UserError(
            f"cohort.shape {list(shape)} at cohort.spacing_mm {spacing_mm:g} covers"
            f" {' x '.join(f'{e:g}' for e in extent)} mm; heads need {' x '.join(f'{e:g}' for e in FIELD_OF_VIEW_MM)}"
            f" mm. Use a shape of at least {enough}, or a larger spacing."
        )
    per_axis = math.ceil(spacing_mm / 2.5 - 1e-9)
    step_mm = spacing_mm / per_axis
    axes = [(torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * spacing_mm for n in shape]
    index = torch.cartesian_prod(*[torch.arange(per_axis)] * 3)
    offsets = (index[index.sum(1) % 2 == 0] - (per_axis - 1) / 2) * step_mm
    return Lattice(shape, spacing_mm, torch.cartesian_prod(*axes), offsets, BLUR * spacing_mm)


@dataclass(frozen=True)
class Subject:
    """A finished subject.

    Attributes
    ----------
    images
        By contrast, T1w first: uint8, the lattice's shape, 0 outside the brain.
    tissue
        uint8, the lattice's shape: the tissue that most of a voxel is, as in TISSUES; 0 outside the brain.  A lesion
        is what it grew in.
    lesion
        bool, the lattice's shape: where a lesion is.
    head_ml, brain_ml, ventricles_ml, lesion_ml
        Volumes measured in the subject's tissue maps: inside the mask, grey and white matter (with what is lesion),
        lateral and third ventricles, the lesion.
    at_edge
        Whether the brain touches the edge of the image, where some of it may be cut off.
    """

    images: dict[str, np.ndarray]
    tissue: np.ndarray
    lesion: np.ndarray
    traits: Traits
    head_ml: float
    brain_ml: float
    ventricles_ml: float
    lesion_ml: float
    at_edge: bool


def simulate_subject(source: SimulatedSource, seed: str, index: int, lattice: Lattice, template: Template) -> Subject:
    """Make subject `index` (from 0); the result depends on nothing but the arguments."""
    rng = subject_generator(seed, index)
    traits = draw_traits(source, rng)
    anatomy = draw_anatomy(traits, draw_pose(seed, index), template, rng)

    near = anatomy.surface(anatomy.head(lattice.centres))[0]
    # Voxels farther out have traces of the blurred mask: 0.1 % of the head (measured), not worth a third more points.
    chosen = torch.nonzero(near < (0.75 + 0.4 * BLUR) * lattice.spacing_mm)[:, 0]
    head = anatomy.head((lattice.centres[chosen, None] + lattice.offsets).reshape(-1, 3))
    sulci, ventricles, grey, white, tone = anatomy.maps(head, template).numpy()
    weight_sulci, weight_white, bias = anatomy.weights(head).numpy()

    mask = sulci + ventricles + grey + white
    sulci = sulci * weight_sulci
    white = white * weight_white
    scale = mask / np.maximum(sulci + ventricles + grey + white, 1e-6)
    sulci, ventricles, grey, white = sulci * scale, ventricles * scale, grey * scale, white * scale
    ill = np.zeros_like(grey)
    if lesion := draw_lesion(source.lesion_share, seed, index, anatomy, template):
        ill = lesion.share(head).numpy()

    per_voxel = len(lattice.offsets)

    def by_voxel(values: np.ndarray) -> np.ndarray:
        """Mean over the points of each chosen voxel."""
        return values.reshape(-1, per_voxel).mean(1)

    def volume(values: np.ndarray, dtype: type) -> np.ndarray:
        """Values of chosen voxels on the whole lattice, 0 elsewhere."""
        whole: np.ndarray = np.zeros(len(lattice.centres), dtype)
        whole[chosen.numpy()] = values
        return whole.reshape(lattice.shape)

    inside = by_voxel(mask)

    def image(
        contrast: str, rng: np.random.Generator, intensities: np.ndarray, noise_sd: float, gain: float
    ) -> np.ndarray:
        fluid_i, grey_i, white_i = intensities.astype(np.float32)
        signal = (sulci + ventricles) * fluid_i + grey * grey_i + white * white_i + np.float32(TONE[contrast]) * tone
        if lesion:
            ill_i = LESION_INTENSITY[contrast]
            signal += ill * (grey * (ill_i - grey_i) + white * (ill_i - white_i))
        noise = rng.standard_normal(len(lattice.centres), dtype=np.float32)[chosen.numpy()]
        values = np.where(inside > 0.02, by_voxel(signal * bias) + noise_sd * noise * inside, 0)
        return np.clip(np.rint(volume(values, np.float32) * (FULL_SCALE * gain)), 0, 255).astype(np.uint8)

    images = {"T1w": image("T1w", rng, anatomy.intensities, anatomy.noise_sd, anatomy.gain)}
    for contrast in source.contrasts:
        own = _generator(f"meddiff/simulate/{contrast}/v1|{seed}|{index}")
        varied = OTHER_INTENSITIES[contrast] + INTENSITY_SD * np.clip(own.standard_normal(3), -2, 2)
        images[contrast] = image(contrast, own, varied, *_scan_settings(own))

    shares = [by_voxel(part) for part in (sulci, ventricles, grey, white)]
    ml = lattice.spacing_mm**3 / per_voxel / 1000  # of one point
    head_ml, brain_ml, ventricles_ml, lesion_ml = (
        float(part.sum(dtype=np.float64)) * ml for part in (mask, grey + white, ventricles, ill * (grey + white))
    )
    in_brain = volume(inside > 0.5, bool)
    at_edge = any(bool(in_brain.take((0, -1), axis).any()) for axis in range(3))
    return Subject(
        images,
        tissue=volume(np.where(inside > 0.5, 1 + np.argmax(shares, 0), 0), np.uint8),
        lesion=volume(by_voxel(ill * (grey + white)) > 0.5, bool),
        traits=traits,
        head_ml=head_ml,
        brain_ml=brain_ml,
        ventricles_ml=ventricles_ml,
        lesion_ml=lesion_ml,
        at_edge=at_edge,
    )
