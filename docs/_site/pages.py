"""What the docs site has beyond the pages of docs/: pages of other folders, the tutorial, every option, diagrams.

A hook of MkDocs (mkdocs.yml).  Links stay those of the repository, so that pages can also be read there.
"""

from __future__ import annotations

import hashlib
import importlib
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import typer
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from meddiff_steps.__main__ import STEPS
from meddiff_steps.command.app import COMMANDS, EXAMPLES, loaded

ROOT = Path(__file__).parents[2]
#: Pages and files of the site that are other files of the repository.
ELSEWHERE = {
    "CITATION.cff": "CITATION.cff",
    "index.md": "README.md",
    "tutorial.md": "docs/tutorial.ipynb",
    "keys.md": "config/keys.md",
    "studies.md": "config/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
PAGE_OF = {source: page for page, source in ELSEWHERE.items()}
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
DIAGRAM = re.compile(r"```mermaid\n(.*?)```", re.S)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that do not lie in docs/."""
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=notebook(text) if source.endswith(".ipynb") else text))
    files.append(File.generated(config, "options.md", content="\n".join(options())))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links of the repository into links of the site, and diagrams into pictures."""
    here = posixpath.dirname(ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def linked(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[1]))
        on_site = PAGE_OF.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        return match[1] if on_site is None else posixpath.relpath(on_site, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(linked, DIAGRAM.sub(drawn, markdown))


def drawn(match: re.Match[str]) -> str:
    """The picture of a diagram.  Its name holds a digest of the text, so that no old one is shown."""
    name = f"images/diagram-{hashlib.sha256(match[1].encode()).hexdigest()[:8]}.svg"
    if not (ROOT / "docs" / name).is_file():
        raise PluginError(f"docs/{name}: not there. A diagram was changed: draw it as CONTRIBUTING.md says")
    return f"![The diagram as a picture]({name})"


def notebook(text: str) -> str:
    """A notebook as Markdown: its texts, its code, and what that printed and drew when it was run last."""
    parts = []
    for cell in nbformat.reads(text, 4).cells:
        parts.append(cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                source = "".join(data["image/png"].split())
                parts.append(f'<img alt="What the code above draws" src="data:image/png;base64,{source}">')
            elif printed := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join([*parts, '<a href="tutorial.ipynb" download>The notebook itself</a>'])


def options() -> Iterator[str]:
    """Every option of every command and step, as `--help` has them."""
    yield "# Every option\n\nMade from the programs when the site is built.\n"
    yield "## Commands\n\nWhat people type: [commands.md](commands.md) explains them.\n"
    for name, help_ in COMMANDS.items():
        examples = "\n".join(EXAMPLES[name])
        yield f"### meddiff {name}\n\n{sentence(help_)}\n\n```\n{examples}\n```\n"
        yield from table(loaded(name))
    yield "## Steps\n\nWhat the rules of the workflow run. Nobody needs them to run a study.\n"
    for name, help_ in STEPS.items():
        yield f"### python -m meddiff_steps {name}\n\n{sentence(help_)}\n"
        app = typer.Typer(add_completion=False)
        app.command()(importlib.import_module(f"meddiff_steps.steps.{name}").run)
        yield from table(typer.main.get_command(app))


def table(command: Any) -> Iterator[str]:
    """Rows of the arguments and options of a command."""
    yield "| | | default |\n|---|---|---|"
    for one in command.params:
        named = one.param_type_name == "option"
        label = ", ".join(one.opts) if named else one.name.upper()
        default = "" if one.default in (None, (), [], False) or callable(one.default) else f"`{one.default}`"
        text = " ".join((getattr(one, "help", None) or "").split()).replace("|", "\\|")
        yield f"| `{label}` | {text} | {'required' if one.required else default} |"
    yield ""


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
