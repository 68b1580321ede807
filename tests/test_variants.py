"""Detectors, metrics and feature spaces: each is one file with a whole entry, found by its registry and read without
importing anything heavy.
"""

import inspect
import subprocess
import sys

import pytest

from meddiff_steps.config import Evaluate, Privacy
from meddiff_steps.core.choice import chosen
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import DETECTORS, FEATURE_SPACES, METRICS, OPERATORS
from meddiff_steps.core.registry import Registry

#: Registry, its names in order, what an entry says, and the function of a variant with its parameters.
KINDS = [
    (DETECTORS, ["aligned", "learned", "latent"], {"source": str, "misses": str}, "build", 1),
    (METRICS, ["frechet", "kid", "classifier_auc"], {"source": str, "blind_to": str}, "figure", 4),
    (
        FEATURE_SPACES,
        ["random", "radiomics", "embedder", "structure"],
        {"source": str, "spatial_dims": list, "needs": str},
        "build",
        1,
    ),
    (
        OPERATORS,
        ["mri", "super_resolution", "denoising", "low_count"],
        {"source": str, "measures": str, "strengths": str},
        "build",
        6,
    ),
]
VARIANTS = [(registry, name, *rest) for registry, names, *rest in KINDS for name in names]


@pytest.mark.parametrize(("registry", "names"), [kind[:2] for kind in KINDS])
def test_a_registry_lists_its_variants_in_order(registry: Registry, names: list[str]) -> None:
    found = [name for name in registry.names() if name in names]
    assert found == names and not {"base", "measure", "assemble"} & set(registry.names())  # others may be added


@pytest.mark.parametrize(("registry", "name", "fields", "function", "parameters"), VARIANTS)
def test_a_variant_has_a_whole_entry_and_the_function_of_its_kind(
    registry: Registry, name: str, fields: dict[str, type], function: str, parameters: int
) -> None:
    entry = registry.entry(name)
    for field, kind in ({"summary": str} | fields).items():
        assert isinstance(entry[field], kind) and entry[field], field
    assert set(entry) <= {"summary", "order", "title", *fields}
    module = registry.load(name)
    assert entry == module.ENTRY
    assert len(inspect.signature(getattr(module, function)).parameters) == parameters


def test_entries_are_read_without_importing_anything_heavy() -> None:
    code = (
        "import sys; from meddiff_steps.core.registries import DETECTORS, FEATURE_SPACES, METRICS\n"
        "for r in (DETECTORS, METRICS, FEATURE_SPACES): [r.entry(name) for name in r.names()]\n"
        "assert not {'torch', 'numpy', 'sklearn', 'monai'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("section", "key", "registry"),
    [(Privacy, "detectors", DETECTORS), (Evaluate, "spaces", FEATURE_SPACES), (Evaluate, "metrics", METRICS)],
)
def test_the_config_takes_the_names_of_the_registry(section: type, key: str, registry: Registry) -> None:
    for name in registry.names():
        assert getattr(section(**{key: [name]}), key) == [name]
    assert getattr(section(), key) is None
    for wrong in ([], ["nothing"]):
        with pytest.raises(ValueError, match=key):
            section(**{key: wrong})


def test_names_are_in_the_order_of_the_registry_and_unknown_ones_are_refused() -> None:
    assert chosen(METRICS, None, "k") == list(METRICS.names())
    assert chosen(METRICS, ["kid", "frechet", "kid"], "k") == ["frechet", "kid"]
    with pytest.raises(UserError, match=r"evaluate.metrics: there is no fid. Choose from frechet, kid"):
        chosen(METRICS, ["kid", "fid"], "evaluate.metrics")
    with pytest.raises(UserError, match="nothing is chosen"):
        chosen(METRICS, [], "k")
