"""The feature spaces of a study: the chosen ones of this package, then the user's own networks."""

from __future__ import annotations

from collections.abc import Sequence

from meddiff_steps.config import FeatureNetwork
from meddiff_steps.core.choice import chosen
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import FEATURE_SPACES
from meddiff_steps.instruments.feature_spaces.base import Context, FeatureSpace
from meddiff_steps.instruments.feature_spaces.own_network import network_space


def spaces(
    names: Sequence[str] | None, context: Context, networks: Sequence[FeatureNetwork] = ()
) -> list[FeatureSpace]:
    """Build feature spaces, in the order of their registry whatever the order of `names`, then of `networks`.

    Parameters
    ----------
    names
        Of the registry `FEATURE_SPACES`.  None: all that can be built from the context.
    context
        What they are built from.  A space that is not chosen loads nothing.
    networks
        The user's own.

    Raises
    ------
    UserError
        A space that was asked for by name does not exist or cannot be built, or a network is unusable.
    """
    found = []
    for name in chosen(FEATURE_SPACES, names, "evaluate.spaces"):
        space = _built(name, context)
        if space is not None:
            found.append(space)
        elif names is not None:
            entry = FEATURE_SPACES.entry(name)
            raise UserError(
                f"evaluate.spaces: {name} needs {entry['needs']} and images of {entry['spatial_dims']} dimensions;"
                f" these have {context.spatial_dims}. Give what it needs, or leave it out."
            )
    return found + [network_space(network, context.spatial_dims) for network in networks]


def _built(name: str, context: Context) -> FeatureSpace | None:
    if context.spatial_dims not in FEATURE_SPACES.entry(name)["spatial_dims"]:
        return None
    return FEATURE_SPACES.load(name).build(context)
