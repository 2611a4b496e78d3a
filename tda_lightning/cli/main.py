"""The entry point: the group of all commands, the exit codes, and one line per error.

Exit code 0: all is well. 1: a run cannot be read, or a check finds a problem. 2: the command line
is wrong. 130: interrupted by Ctrl-C.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from tda_lightning.cli.answers import attribute, self_influence
from tda_lightning.cli.exports import export
from tda_lightning.cli.inspection import audit, data, info, verify
from tda_lightning.cli.output import FailedCheck
from tda_lightning.cli.reports import report
from tda_lightning.cli.suspects import mislabeled
from tda_lightning.stores.integrity.damage import printable

# Printed after the commands of `tda-lightning --help`.
EPILOG = (
    "Exit codes: 0 all is well; 1 the run cannot be read, or a check found a problem; "
    "2 the command line is wrong; 130 interrupted by Ctrl-C."
)


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tda_lightning", prog_name="tda-lightning")
def commands() -> None:
    """Training data attribution for PyTorch Lightning: inspect and query recorded runs."""


for command in (info, audit, data, verify, attribute, self_influence, mislabeled, report, export):
    commands.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; the arguments are those of the process by default."""
    try:
        commands.main(
            None if arguments is None else list(arguments),
            prog_name="tda-lightning",
            standalone_mode=False,
        )
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except FailedCheck:
        return 1
    except (click.Abort, KeyboardInterrupt):
        return 130
    except Exception as error:  # Whatever is wrong with a run, its user gets one line.
        click.echo(f"tda-lightning: {_in_one_line(error)}", err=True)
        return 1
    return 0


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return printable(f"`{_final_name(Path(error.filename))}`: {error.strerror}.")
    is_expected = isinstance(error, OSError | ValueError | ModuleNotFoundError)
    name = "" if is_expected else f"{type(error).__name__}: "
    return printable(f"{name}{' '.join(str(error).split())}")


def _final_name(path: Path) -> Path:
    """Return the path that a file would have had, for the temporary one of a failed write."""
    is_temporary = path.name.startswith(".") and path.suffix == ".partial"
    return path.with_name(path.stem[1:]) if is_temporary else path
