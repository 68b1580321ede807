"""Conditions: shapes, rows, and what is left of one for an unconditional prediction."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.conditioning import Condition


def condition(b: int = 4) -> Condition:
    numbers = torch.arange(2.0 * b).reshape(b, 2)
    return Condition(
        numbers,
        maps={"scan": numbers[:, :1, None, None].expand(b, 1, 3, 5), "labels": torch.arange(b).reshape(b, 1, 1, 1)},
        tokens={"report": numbers[:, None].expand(b, 6, 2)},
    )


def test_null_forgets_covariates_and_tokens_and_keeps_maps():
    full, null = condition(), condition().null()
    assert null.covariates.isnan().all() and null.covariates.shape == (4, 2)
    assert null.tokens["report"].isnan().all() and null.tokens["report"].shape == (4, 6, 2)
    assert torch.equal(null.maps["scan"], full.maps["scan"])
    assert not full.covariates.isnan().any()


@pytest.mark.parametrize(
    "rows", [[2, 0], slice(1, 3), torch.tensor([3]), np.array([1, 1, 2]), [True, False, True, False]]
)
def test_rows_of_everything(rows):
    full, some = condition(), condition()[rows]
    index = torch.arange(4)[rows if isinstance(rows, slice) else torch.as_tensor(rows)]
    assert len(some) == len(index)
    for name in ("scan", "labels"):
        assert torch.equal(some.maps[name], full.maps[name][index])
    assert torch.equal(some.covariates, full.covariates[index])
    assert torch.equal(some.tokens["report"], full.tokens["report"][index])


def test_one_row_is_a_batch_of_one_and_rows_can_be_gone_through():
    assert len(condition()[-1]) == 1 and condition()[-1].covariates.tolist() == [[6.0, 7.0]]
    assert [row.covariates[0, 0].item() for row in condition()] == [0.0, 2.0, 4.0, 6.0]
    with pytest.raises(IndexError, match="row 4 of a condition with 4"):
        condition()[4]


def test_one_covariate_is_moved_and_nothing_else():
    full = condition()
    moved = full.moved(1, 9.0)
    assert moved.covariates[:, 1].tolist() == [9.0] * 4 and torch.equal(moved.covariates[:, 0], full.covariates[:, 0])
    assert full.covariates[0, 1] == 1.0 and moved.maps is full.maps
    assert full.moved(0, torch.arange(4.0)).covariates[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert full.moved(-1, float("nan")).covariates[:, 1].isnan().all()
    with pytest.raises(IndexError, match="column 2 of 2 covariates"):
        full.moved(2, 0.0)


def test_precision_changes_where_numbers_survive_it():
    half = condition().to(dtype=torch.bfloat16)
    assert half.tokens["report"].dtype == half.maps["scan"].dtype == torch.bfloat16
    assert half.maps["labels"].dtype == torch.int64 and half.covariates.dtype == torch.float32
    assert condition().to(dtype=torch.float64).covariates.dtype == torch.float64
    assert condition().to("cpu").covariates.dtype == torch.float32
    assert condition().to("meta").maps["scan"].device.type == "meta"


def test_covariates_alone_are_a_condition_and_travel_between_processes():
    alone = Condition(torch.zeros(3, 0))
    assert len(alone) == 3 and len(alone.null()[[0, 2]]) == 2
    assert torch.equal(pickle.loads(pickle.dumps(condition())).covariates, condition().covariates)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"covariates": torch.zeros(3)}, r"covariates: expected a shape \(b, k\), found \(3,\)"),
        ({"covariates": torch.tensor(1.0)}, r"covariates: expected a shape \(b, k\), found \(\)"),
        ({"covariates": torch.zeros(3, 2, dtype=torch.int64)}, "covariates: torch.int64 has no NaN"),
        ({"maps": {"mask": torch.zeros(4, 1, 8)}}, r"maps\['mask'\]: 4 rows, but covariates have 3"),
        ({"maps": {"mask": torch.zeros(3, 8)}}, r"maps\['mask'\]: expected a shape \(b, c, \*spatial\)"),
        ({"tokens": {"report": torch.zeros(3, 8)}}, r"tokens\['report'\]: expected a shape \(b, n, dim\)"),
        (
            {"tokens": {"report": torch.zeros(3, 8, 2, dtype=torch.int32)}},
            r"tokens\['report'\]: torch.int32 has no NaN",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Condition(**{"covariates": torch.zeros(3, 2), **parts})


def test_the_variant_of_a_training_image_goes_with_its_row():
    variant = torch.arange(6.0).reshape(3, 2)
    condition = Condition(torch.zeros(3, 1), variant=variant)
    assert torch.equal(condition[[2, 0]].variant, variant[[2, 0]])
    assert torch.equal(condition.null().variant, variant)
    assert torch.equal(condition.variant_numbers(2), variant)
    assert torch.equal(Condition(torch.ones(3, 1)).variant_numbers(4), torch.zeros(3, 4)), "the image itself"
    with pytest.raises(ValueError, match="variant"):
        Condition(torch.zeros(3, 1), variant=torch.zeros(2, 2))


def test_maps_are_those_that_a_network_was_trained_with():
    maps = {"b": torch.ones(1, 2, 4, 4), "a": torch.zeros(1, 1, 4, 4)}
    condition = Condition(torch.zeros(1, 1), maps)
    assert [given.shape[1] for given in condition.maps_of({"a": 1, "b": 2})] == [1, 2]
    for trained in ({}, {"a": 1}, {"a": 1, "b": 3}):
        with pytest.raises(UserError, match="trained with"):
            condition.maps_of(trained)
