"""Tiny tensors gain nothing from threads, and lose much to them on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meddiff_steps.simulation.dataset import one_torch_thread


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield
