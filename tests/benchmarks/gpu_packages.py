"""Prints, as pip wants them, the packages that `gpu.py` needs and this Python has not, at the versions of the lock: `make bench-gpu` installs them.

Needs nothing but Python.  torch is never among them: the machine brings the one that fits its driver.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

LOCK = Path(__file__).parents[2] / "envs/requirements.lock"
#: What is imported, directly or by what is imported, and the package that brings it.
NEEDED = {
    "annotated_types": "annotated-types",
    "cryptography": "cryptography",
    "diffusers": "diffusers",
    "einops": "einops",
    "lightning_fabric": "lightning-fabric",
    "lightning_utilities": "lightning-utilities",
    "monai": "monai",
    "nibabel": "nibabel",
    "numpy": "numpy",
    "pandas": "pandas",
    "pyarrow": "pyarrow",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic_core",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "tensorboard": "tensorboard",
    "tqdm": "tqdm",
    "typing_inspection": "typing-inspection",
    "yaml": "PyYAML",
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def missing() -> list[str]:
    """Requirements, `name==version`, of what cannot be imported."""
    pins = {canonical(line.partition("==")[0]): line for line in LOCK.read_text(encoding="utf-8").split() if "==" in line}
    return [pins[canonical(package)] for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


if __name__ == "__main__":
    print("\n".join(missing()))
