"""Networks between two groups of images that are not paired: trained and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meddiff_steps import config
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import resolve
from meddiff_steps.core.files import atomic_path
from meddiff_steps.imaging.domains import Domain
from meddiff_steps.models.unpaired import Side, card_of
from meddiff_steps.models.weights import save_model
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.unpaired import UnpairedTask

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def train_unpaired(
    domains: Mapping[Side, Domain],
    settings: config.Unpaired,
    variants: config.Variants,
    compute: config.Compute,
    root: str,
    fabric: Fabric,
    state: Path,
    out: Path,
) -> None:
    """Train networks from group `a` to group `b` and back, resuming from `state`, and write them.

    Parameters
    ----------
    domains
        The two groups.
    root
        The study's seed, and what the networks are for.
    out
        Folder: weights, card, training curve.
    """
    task = UnpairedTask(settings, variants, domains, root, fabric)
    compiled = speed_up(task.costly, compute, fabric, training=True)
    curve = fit(task, settings.optimiser, fabric, state, f"{root.rpartition('/')[2]}: unpaired")
    facts: dict[str, Any] = {
        **card_of(settings, task.model),
        "groups": {side: {"name": each.name, "columns": list(each.columns)} for side, each in domains.items()},
        "scans": {side: {"train": len(each.rows), "val": len(each.held_out)} for side, each in domains.items()},
        "optimiser": settings.optimiser.model_dump(mode="json"),
        "precision": resolve(compute)[1],
        **({"compiled": True} if compiled else {}),
    }
    save_model(task.modules["average"], out, facts)
    with atomic_path(out / "history.parquet") as path:
        curve.to_parquet(path, index=False)
