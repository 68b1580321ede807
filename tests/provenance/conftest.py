from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_release import Place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A signed 3D release; tests must not change it."""
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The same as several datasets of at most three subjects; tests must not change it."""
    return Place(tmp_path_factory.mktemp("large"), limit=3)


@pytest.fixture
def copied(place: Place, tmp_path: Path) -> Path:
    """A copy of that release, to be attacked."""
    return Path(shutil.copytree(place.release, tmp_path / "release", symlinks=True))
