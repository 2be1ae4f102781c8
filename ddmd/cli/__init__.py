"""The command `ddmd`: detect, bids, report, info, phantom, train, evaluate."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from ddmd.cli import bids, detect, entry, evaluate, info, phantom, report, train


class PlainCommand(TyperCommand):
    """A command whose help has no Python types in it."""

    def get_help(self, ctx: Any) -> str:
        """The help text, without "<list[Path]>" and the like, nor braces around what is required."""
        usage, line, rest = super().get_help(ctx).partition("\n")
        typeless = re.sub(r" <(list\[)?\w+\]?>(?=  )", lambda match: " " * len(match[0]), rest)
        return re.sub(r"\{(\w+)\}", r"\1", usage) + line + re.sub(r" <(list\[)?\w+\]?>", "", typeless)


class CommandGroup(TyperGroup):
    """The commands, and the form of BIDS Apps without one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the arguments apart; an empty one, as a variable that is not set, would be the working directory."""
        if any(argument == "" or re.fullmatch(r"--?[\w-]+=", argument) for argument in args):
            raise entry.bad_usage(
                f"an argument is empty ({shlex.join(args[:20])}); give its value, or leave it out"
            )
        return super().parse_args(ctx, bids.bids_app_arguments(args, self.commands))


app = typer.Typer(
    cls=CommandGroup,
    help="Lesions in brain MRI by discrepancy distribution medical diffusion. For research, not diagnosis.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (detect, bids, report, info, phantom, train, evaluate):
    app.command(_module.__name__.rpartition(".")[2], cls=PlainCommand)(entry.command(_module.command))


def _print_version(wanted: bool) -> None:
    if wanted:
        import ddmd

        typer.echo(f"ddmd {ddmd.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Entry point of the `ddmd` command; ends with its exit code."""
    entry.run(app)
