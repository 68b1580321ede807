"""Prints, as pip wants them, the packages that `benchmarks.gpu` needs and this Python has not, at the versions of the
lock: `make bench-gpu` installs them.

Needs nothing but Python.  torch is never among them: the machine brings the one that fits its driver.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

LOCK = Path(__file__).parents[1] / "envs/requirements.lock"
#: What is imported, directly or by what is imported, and the package that brings it.
NEEDED = {
    "absl": "absl-py",
    "annotated_types": "annotated-types",
    "cloudpickle": "cloudpickle",
    "dateutil": "python-dateutil",
    "einops": "einops",
    "filelock": "filelock",
    "fsspec": "fsspec",
    "google.protobuf": "protobuf",
    "grpc": "grpcio",
    "joblib": "joblib",
    "lightning_fabric": "lightning-fabric",
    "lightning_utilities": "lightning-utilities",
    "markdown": "Markdown",
    "monai": "monai",
    "narwhals": "narwhals",
    "nibabel": "nibabel",
    "numpy": "numpy",
    "packaging": "packaging",
    "pandas": "pandas",
    "PIL": "pillow",
    "psutil": "psutil",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic_core",
    "pytz": "pytz",
    "rfc8785": "rfc8785",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "threadpoolctl": "threadpoolctl",
    "tqdm": "tqdm",
    "typing_extensions": "typing_extensions",
    "typing_inspection": "typing-inspection",
    "tzdata": "tzdata",
    "werkzeug": "Werkzeug",
    "yaml": "PyYAML",
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def missing() -> list[str]:
    """Requirements, `name==version`, of what cannot be imported."""
    pins = {
        canonical(line.partition("==")[0]): line for line in LOCK.read_text(encoding="utf-8").split() if "==" in line
    }
    return [pins[canonical(package)] for module, package in NEEDED.items() if not importable(module)]


if __name__ == "__main__":
    print("\n".join(missing()))
