"""The command `meddiff`: what people type.  The workflow's steps stay `python -m meddiff_steps STEP`.

A command's module is imported when it is asked for, and not for help or completion: some load torch.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from meddiff_steps import __version__
from meddiff_steps.core.errors import UserError

#: Every command with one line of help, in the order in which a study needs them.
COMMANDS = {
    "propose": "look at a BIDS dataset and write a study for it",
    "init": "write a commented study to begin with",
    "check": "say before a run what would go wrong in it, and what it will take",
    "run": "run a study, or a part of it",
    "status": "how far a study is: jobs done, running, stopped and failed, hours used",
    "report": "where the report of a study lies; open it",
    "plan-cost": "count hours of GPUs and cores, memory and disk of every stage of a study",
    "audit": "check a release, from its form to making images again",
    "explain": "where one synthetic image comes from, as a tree",
    "diff": "which part of the recipe differs between two releases",
    "prove": "the path from one subject to the release's root",
    "regenerate": "make images of a release again from its ledger and its models: one subject, a shard, or all",
}

#: Of each command, what people type.
EXAMPLES = {
    "propose": ["meddiff propose /data/mycohort --out mycohort.yaml", "meddiff propose /data/mycohort --hours 12"],
    "init": ["meddiff init mycohort.yaml", "meddiff init --from simulated-5mm mycohort.yaml"],
    "check": ["meddiff check mycohort.yaml", "meddiff check mycohort.yaml --measured results/demo"],
    "run": [
        "meddiff run mycohort.yaml -n",
        "meddiff run mycohort.yaml --cores 8",
        "meddiff run mycohort.yaml evaluate --profile slurm",
        "meddiff run mycohort.yaml --cores 8 -- --keep-going",
    ],
    "status": ["meddiff status mycohort.yaml", "meddiff status results/mycohort"],
    "report": ["meddiff report mycohort.yaml --open"],
    "plan-cost": [
        "meddiff plan-cost mycohort.yaml --scans 200 --measured results/demo",
        "meddiff plan-cost mycohort.yaml --scans 31740 --tflops 300 --jobs 50",
    ],
    "audit": ["meddiff audit results/mycohort/release --models results/mycohort"],
    "explain": ["meddiff explain sub-syn000000 results/mycohort/release"],
    "diff": ["meddiff diff results/mycohort/release results/other/release"],
    "prove": ["meddiff prove sub-syn000000 results/mycohort/release --out proof.json"],
    "regenerate": [
        "meddiff regenerate results/mycohort/release --models results/mycohort --out again --subject sub-syn000000"
    ],
}

#: Commands that are steps as well.
STEPS = ("status", "plan-cost", "audit", "explain", "diff", "prove", "regenerate")


def examples(name: str | None = None) -> str:
    """The end of a help page; a line each, which are not to be filled."""
    lines = EXAMPLES[name] if name else [EXAMPLES[one][0] for one in ("propose", "check", "run", "status", "report")]
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


class BeforeSnakemake(TyperCommand):
    """A command that hands options on which stand after `--`, and says so where they stand before it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return list(super().parse_args(ctx, args))
        except Exception as error:
            # click's NoSuchOption, which typer keeps a copy of for itself
            if not hasattr(error, "option_name") or not hasattr(error, "format_message"):
                raise
            raise UserError(
                f"{error.format_message().rstrip('.')}. What is meant for Snakemake goes behind --:"
                f" meddiff run STUDY.yaml -- {error.option_name}"
            ) from None


def loaded(name: str) -> Any:
    """A command with its options; imports its module."""
    folder = "steps" if name in STEPS else "command"
    module = importlib.import_module(f"meddiff_steps.{folder}.{name.replace('-', '_')}")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, epilog=examples(name), cls=BeforeSnakemake if name == "run" else None)(module.run)
    return typer.main.get_command(app)


class Commands(TyperGroup):
    """The commands by name."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command that knows its line of help alone."""
        return (
            TyperCommand(cmd_name, short_help=COMMANDS[cmd_name], rich_markup_mode=None)
            if cmd_name in COMMANDS
            else None
        )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0].replace("_", "-")
        if name in COMMANDS:
            return name, loaded(name), args[1:]
        raise UserError(unknown(args[0]))


def unknown(name: str) -> str:
    """What is said to somebody who asks for a command that is not there."""
    step = name.replace("-", "_")
    if step.isidentifier() and importlib.util.find_spec(f"meddiff_steps.steps.{step}") and step != "options":
        return f"{name!r} is a step of the workflow, not a command: python -m meddiff_steps {step} --help"
    from meddiff_steps.command.run import rules_of, workflow_folder

    if step in rules_of(workflow_folder()):
        return f"{name!r} is a target of the workflow, not a command: meddiff run STUDY.yaml {step}"
    near = difflib.get_close_matches(name, COMMANDS, 1)
    meant = f" Did you mean `meddiff {near[0]}`?" if near else ""
    return f"there is no command {name!r}.{meant} Commands are: {', '.join(COMMANDS)}."


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    epilog=examples(),
    help="Synthetic cohorts of medical images that can be regenerated.",
)


@app.callback()
def everything(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Synthetic cohorts of medical images that can be regenerated."""


def main() -> int:
    from meddiff_steps.command.ending import exit_code

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    name = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    return exit_code(lambda: app(prog_name="meddiff"), name)


if __name__ == "__main__":
    sys.exit(main())
