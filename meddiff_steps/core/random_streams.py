"""Random numbers of the synthetic cohort: one 128-bit key per subject and purpose, one counter-based stream per key.

A subject's numbers depend on nothing but its key: not on shard, batch, order, device, instruction set, nor on how
many subjects are asked for.  Streams in use:

`noise`
    the initial noise of a sample;
`steps/0`, `steps/1`, ...
    the noise that a stochastic sampler adds after its first, second, ... network evaluation;
`decoder`
    the noise of a first stage that draws what latents leave open;
`covariates/0`, `covariates/1`, ...
    blocks of candidates for the covariates of a planned subject.

Trainings draw from `step_generator`, whose streams are named by purpose and step; evaluations from `philox`, by label.

Keys go into NumPy's Philox, never into `torch.manual_seed`: the CPU generator of torch keeps 32 bits of its seed,
so that among 100,000 subjects two would probably share their noise, and the CUDA generator depends on the GPU model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

#: Name of the scheme; a change of any rule in this module needs a new one.
SCHEME = "meddiff/seed/v1"


def seed_key(cohort_root: str, index: int, attempt: int, stream: str) -> str:
    """Key of one random stream: SHA-256("meddiff/seed/v1|cohort_root|index|attempt|stream"), the first 16 bytes.

    The last three fields cannot contain the separator, so different arguments never give the same text.

    Parameters
    ----------
    cohort_root
        Any text; synthetic cohorts use "SEED/GROUP".
    index, attempt
        Number of the subject within its root, and of the attempt at it; both from 0.
    stream
        What the numbers are for.

    Returns
    -------
    str
        32 hexadecimal digits.
    """
    if index < 0 or attempt < 0:
        raise ValueError(f"index and attempt count from 0, found {index} and {attempt}")
    if not stream or "|" in stream:
        raise ValueError(f"a stream is named by text without '|', found {stream!r}")
    text = "|".join((SCHEME, cohort_root, str(int(index)), str(int(attempt)), stream))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]


def noise(key: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 array of `shape` from the stream of `key` (Philox4x64, Salmon et al. 2011), in one draw.

    The bits depend on the shape, too: draw a stream once, at its full shape.
    """
    if len(key) != 32:
        raise ValueError(f"a key has 32 hexadecimal digits, found {key!r}")
    generator = np.random.Generator(np.random.Philox(key=int(key, 16)))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


def batch_noise(keys: Sequence[str], shape: Sequence[int]) -> np.ndarray:
    """Noise of several subjects, float32 (len(keys), *shape); each row is exactly `noise(key, shape)`."""
    out = np.empty((len(keys), *shape), dtype=np.float32)
    for row, key in zip(out, keys, strict=True):
        row[...] = noise(key, shape)
    return out


def step_generator(root: str, stream: str, step: int) -> np.random.Generator:
    """The random numbers of one training step: a function of study seed, purpose and step alone."""
    return np.random.Generator(np.random.Philox(key=int(seed_key(root, step, 0, stream), 16)))


def philox(seed: str, label: str) -> np.random.Generator:
    """A generator for one purpose; different labels give independent streams."""
    digest = hashlib.sha256(f"meddiff/evaluation/v1|{seed}|{label}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
