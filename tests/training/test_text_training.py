"""A diffusion model that is told texts: what is dropped, what is learnt, and that a killed training is the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_training import OPTIMISER, TWO_NUMBERS, latent_data

from meddiff_steps import config
from meddiff_steps.cohort.texts import text_digest
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.weights import weights_digest
from meddiff_steps.training import loop
from meddiff_steps.training.latent_data import CachedTokens, drop, drop_tokens
from meddiff_steps.training.tasks.diffusion import DiffusionTask

#: So much noise that latents say nothing of themselves.
LEVELS = {"mean": 4.0, "deviation": 0.3}
WORDS = {"up": 1.0, "down": -1.0}


@pytest.fixture
def cached(tmp_path):
    with ShardWriter(
        tmp_path / "t.arrow", {"text_sha256": pa.string(), "tokens": TensorColumn("float16", (2, 3))}
    ) as s:
        for word, sign in WORDS.items():
            s.append(text_sha256=text_digest(word), tokens=[[sign, 0, 1], [np.nan] * 3])
    return Shards([tmp_path / "t.arrow"])


def test_tokens_are_found_by_the_text_of_a_row(cached):
    tokens = CachedTokens(cached, ["down", None, "up"])(np.array([2, 1, 0]))
    assert tokens[:, 0, 0].tolist()[::2] == [1.0, -1.0] and np.isnan(tokens[1]).all() and np.isnan(tokens[:, 1]).all()
    with pytest.raises(UserError, match=r"has no tokens of 1 text\(s\)"):
        CachedTokens(cached, ["sideways"])


def test_texts_are_dropped_with_the_covariates_and_by_themselves():
    rng = np.random.default_rng(0)
    covariates, gone = drop(np.zeros((20000, 2), np.float32), 0.0, 0.2, rng)
    assert np.array_equal(np.isnan(covariates).all(1), gone) and gone.mean() == pytest.approx(0.2, abs=0.01)
    lost = np.isnan(drop_tokens(np.zeros((20000, 4, 3), np.float32), gone, 0.1, rng)).all(-1)
    assert lost[gone].all() and lost[~gone].mean() == pytest.approx(0.1, abs=0.01)


class Told:
    """Latents whose sign is what their text says, and nothing else does."""

    def __init__(self, folder, cached, **text):
        data = latent_data(folder / "latents.arrow", variants=1)
        said = ["up" if i % 2 else "down" for i in range(10)]
        signs = np.array([WORDS[word] for word in said], np.float32).reshape(-1, 1, 1, 1, 1)
        offset = data.prior["offset"]
        self.fabric = make_fabric(config.Compute(device="cpu", precision="32-true"), threads=1)
        self.data = replace(data, tokens={"text": CachedTokens(cached, said)})
        object.__setattr__(
            self.data,
            "draw",
            lambda rows, generator: np.broadcast_to(signs[rows], (len(rows), *offset.shape[1:])).copy(),
        )
        settings = config.Diffusion(
            channels=[16], num_res_blocks=1, covariate_dim=8, levels=LEVELS, optimiser=OPTIMISER.model_dump()
        )
        self.settings = settings.model_copy(
            update={"optimiser": settings.optimiser.model_copy(update={"steps": 60, "learning_rate": 2e-2})}
        )
        self.text = config.FreeText(column="text", **text)

    def task(self):
        return DiffusionTask(self.settings, self.data, TWO_NUMBERS, "seed", self.fabric, text=self.text)


def test_what_only_a_text_says_is_learnt_from_it(tmp_path, cached):
    losses = {}
    for dropout in (0.0, 1.0):
        told = Told(tmp_path, cached, dropout=dropout, token_dropout=0.0)
        task = told.task()
        loop.fit(task, told.settings.optimiser, told.fabric, tmp_path / f"state-{dropout}", "test")
        if dropout:  # never told: what it would make of a text is nobody's concern
            task.data = replace(task.data, tokens={"text": CachedTokens(cached, [None] * 10)})
            object.__setattr__(task.data, "draw", told.data.draw)
        losses[dropout] = task.validate()["val/loss"]
    assert losses[0.0] < 0.8 * losses[1.0]


def test_a_training_with_texts_that_was_killed_ends_the_same(tmp_path, cached):
    weights = []
    for name, stops in (("whole", ()), ("killed", (4,))):
        told = Told(tmp_path, cached)
        for last in (*stops, 7):
            optimiser = told.settings.optimiser.model_copy(update={"steps": 7})
            task = told.task()
            if last < 7:
                made = task.train_step

                def dies(step, made=made, last=last):
                    if step == last:
                        raise KeyboardInterrupt
                    return made(step)

                task.train_step = dies
                with pytest.raises(KeyboardInterrupt):
                    loop.fit(task, optimiser, told.fabric, tmp_path / name, "test")
            else:
                loop.fit(task, optimiser, told.fabric, tmp_path / name, "test")
        weights.append(weights_digest(task.modules["average"].state_dict()))
    assert weights[0] == weights[1]
    assert torch.isfinite(next(task.modules["average"].parameters())).all()
