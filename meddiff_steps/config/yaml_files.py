"""Study files: YAML in which nothing is taken for something else, and where in a file a key stands.

YAML 1.1 makes `no` false, `1e3` text, `012` ten, `1:30` ninety and `2024-01-31` a date.  Here a value without quotes is
null or a number only if the number is written back just so (`null`, `3`, `-0.5`).  All else stays as it was written;
keys that want a number or true and false are read from text as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from meddiff_steps.core.errors import UserError

_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def as_written(text: str) -> str | int | float | None:
    """A value without quotes as null, a number or text, none of which says less than what was written.

    >>> [as_written(text) for text in ("3", "-0.5", "null", "no", "01", "1e3", "1.50", "1:30", "2024-01-31")]
    [3, -0.5, None, 'no', '01', '1e3', '1.50', '1:30', '2024-01-31']
    """
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if _NUMBER.fullmatch(text):
        number = float(text) if "." in text else int(text)
        return number if str(number) == text else text
    return text


class _Loader(yaml.SafeLoader):
    """Values as `as_written` has them; a key that stands twice in its mapping is refused."""

    # What a value without quotes is, is decided by `as_written`; only << (keys of another mapping) is YAML's own.
    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<$"))]}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in first:
                    raise yaml.composer.ComposerError(
                        problem=f"key `{key.value}` is on line {_line(first[key.value])} and again on line"
                        f" {_line(key)}. A key is given once: keep one of them, and put what belongs to it together"
                    )
                first[key.value] = key
        return node

    def construct_text(self, node: yaml.ScalarNode) -> Any:
        text = self.construct_scalar(node)
        return as_written(text) if node.style is None else text


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def parse_yaml(text: str) -> Any:
    """The content of a study that is at hand as text; raises what YAML does."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> Any:
    """The content of a study file.

    Raises
    ------
    UserError
        The file is missing, no text, no YAML, or has a key twice.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such study file. Give a YAML file, for example config/config.yaml.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, expected a YAML file. Name the study file itself.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error.reason}). A study is a YAML file in UTF-8.") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply. A study has a few levels of keys.") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        hint = " Indent with spaces, not with tabs." if "'\\t'" in said else ""
        raise UserError(f"{path}{where}: not valid YAML: {said}.{hint}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def given_on_command_line(content: Any) -> Any:
    """Values of `--config`, which Snakemake gives as text below the first level, as a study file would have them."""
    if isinstance(content, dict):
        return {key: given_on_command_line(value) for key, value in content.items()}
    if isinstance(content, list):
        return [given_on_command_line(value) for value in content]
    return as_written(content) if isinstance(content, str) else content


def where_is(keys: Sequence[Any], files: Sequence[Path]) -> str:
    """`FILE, line N` of a key, or of the nearest one above it that is written; "" where none of the files has it."""
    for path in reversed(files):
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
        line = None
        for key in keys:
            if isinstance(node, yaml.MappingNode):
                found = [(name, value) for name, value in node.value if name.value == str(key)]
            elif isinstance(node, yaml.SequenceNode) and str(key).isdigit() and int(key) < len(node.value):
                found = [(node.value[int(key)], node.value[int(key)])]
            else:
                found = []
            if not found:
                break
            line, node = _line(found[0][0]), found[0][1]
        if line is not None:
            return f"{path}, line {line}"
    return ""
