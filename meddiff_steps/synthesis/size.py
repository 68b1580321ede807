"""How many subjects and shards a plan has, from the config alone; imports nothing heavy, for use while a workflow is
parsed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from meddiff_steps.core.errors import UserError

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


def enlarged(groups: Sequence[PlanGroup], count: int, name: str | None = None) -> PlanGroup:
    """One group of a plan, the only one or the one that is named, with `count` subjects, at least as many as it had.

    Raises
    ------
    UserError
        There is no such group, several and none is named, or it has more subjects already.
    """
    known = ", ".join(group.name for group in groups)
    chosen = [group for group in groups if name in (None, group.name)]
    if not chosen:
        raise UserError(f"group {name!r}: the plan has no such group. There are: {known}.")
    if len(chosen) > 1:
        raise UserError(f"count {count}: of which group? The plan has {known}. Name one of them.")
    if count < chosen[0].subjects:
        raise UserError(
            f"count {count}: group {chosen[0].name} has {chosen[0].subjects} subjects already. Give at least as many."
        )
    return chosen[0].model_copy(update={"subjects": count})
