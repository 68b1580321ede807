"""How many subjects and shards a plan has, from the config alone; imports nothing heavy, for use while a workflow is parsed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meddiff_steps.config import PlanGroup


def group_rows(group: PlanGroup) -> int:
    """Rows of one group; for `grid` and `counterfactual`, its subjects times the points of its grid."""
    return group.subjects * math.prod(len(values) for values in group.grid.values())


def planned_subjects(groups: Sequence[PlanGroup]) -> int:
    """Rows of the whole plan, each one synthetic subject."""
    return sum(group_rows(group) for group in groups)


def plan_shards(groups: Sequence[PlanGroup], shard_size: int) -> int:
    """Shards of the whole plan: `shard_size` consecutive rows each, the last one maybe fewer."""
    return -(-planned_subjects(groups) // shard_size)
