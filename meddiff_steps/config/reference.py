"""What is generated from the sections: the JSON Schema for editors, and the reference of all keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from meddiff_steps.config.base import models_in
from meddiff_steps.config.covariates import CategoricalCovariate, ContinuousCovariate
from meddiff_steps.config.study import Study
from meddiff_steps.core.registry import Choice

_NAMES = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "NoneType": "null"}
_KINDS = {ContinuousCovariate: " (a number)", CategoricalCovariate: " (a label)"}


def json_schema() -> str:
    """The JSON Schema of a study file, for editors."""
    return json.dumps(Study.model_json_schema(), indent=2, sort_keys=True) + "\n"


def key_reference() -> str:
    """Every key of a study as Markdown tables: type, default and meaning."""
    lines = [
        "# Keys of a study",
        "",
        "Generated from `meddiff_steps/config/` by `python -m meddiff_steps schema`; a test compares.",
        "",
    ]
    for title, model in sections():
        lines += [f"## `{title}`", "", " ".join((model.__doc__ or "").split()), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            cells = (
                f"`{name}`",
                _type_name(field.annotation, field.metadata) + _bounds(field),
                _default(name, field),
                field.description or "",
            )
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def sections() -> list[tuple[str, type[BaseModel]]]:
    """Every part of a study, with the heading that it has in the reference."""
    return [("study", Study), *_below(Study, "")]


def _below(model: type[BaseModel], above: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        for below, inner in models_in(field.annotation):
            title = ".".join([f"{above}{name}", *("NAME" for _ in below)])
            source = inner.model_fields.get("source") if name == "cohort" else None
            kind = f" (source: {get_args(source.annotation)[0]})" if source else _KINDS.get(inner, "")
            yield f"{title}{' (a list)' if _is_list(field.annotation) else kind}", inner
            yield from _below(inner, f"{title}.")


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return f"see `{name}`"
    shown = json.dumps(field.default, default=lambda section: section.model_dump(mode="json", exclude_defaults=True))
    return f"`{shown}`"


def _bounds(field: FieldInfo) -> str:
    """The bounds of a number, as declared."""
    declared = [*field.metadata, *_nested_metadata(field.annotation)]
    bounds = ("ge", "gt", "le", "lt")
    found = {name: f"{getattr(item, name):,}" for item in declared for name in bounds if hasattr(item, name)}
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    if {"ge", "le"} <= set(found):
        return f", {found['ge']} to {found['le']}"
    return "".join(f", {word} {found[name]}" for name, word in words.items() if name in found)


def _nested_metadata(annotation: Any) -> Iterator[Any]:
    """Bounds of a number that may be left out."""
    for argument in get_args(annotation) if type(None) in get_args(annotation) else ():
        for item in getattr(argument, "__metadata__", ()):
            yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    for said in metadata:
        if isinstance(said, Choice):
            return " | ".join(f"`{name}`" for name in said.registry.names())
    if origin is None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return "section"
        name = getattr(annotation, "__name__", str(annotation))
        return _NAMES.get(name, name)
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    if origin is Annotated:
        return _type_name(arguments[0], arguments[1:])
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is tuple:
        return "[" + ", ".join(_type_name(argument) for argument in arguments) + "]"
    if origin is dict:
        return f"mapping to {_type_name(arguments[1])}"
    return " | ".join(dict.fromkeys(_type_name(argument) for argument in arguments))
