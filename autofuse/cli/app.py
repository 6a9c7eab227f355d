"""``autofuse``: the commands, and what a person sees when something is wrong.

Whatever a person can put right is one line on standard error and exit code 2. Anything else is a fault of ours: one
line that asks to report it, exit code 1, and the traceback if ``AUTOFUSE_TRACEBACK=1``.
"""

from __future__ import annotations

import errno
import io
import os
import sqlite3
import sys
from collections.abc import Sequence

import typer

from autofuse.cli.capture import capture
from autofuse.cli.compile import compile_kernels
from autofuse.cli.diff import diff
from autofuse.cli.doctor import doctor
from autofuse.cli.exchange import export, import_, merge
from autofuse.cli.history import gc, rollback
from autofuse.cli.ops import ops
from autofuse.cli.report import report
from autofuse.cli.show import show
from autofuse.cli.tune import tune
from autofuse.cli.verify import verify
from autofuse.cli.why import why
from autofuse.errors import AutofuseError

__all__ = ["BAD_INPUT", "INTERRUPTED", "app", "main", "run"]

BAD_INPUT = 2
INTERRUPTED = 130  # as a shell reports a command that Ctrl-C ended

app = typer.Typer(
    help="Fused LLM kernels, tuned per GPU and shape, used by torch.compile where they are measured to be faster.",
    epilog="Start with `autofuse doctor`, then `autofuse tune`. Each command has --help with an example.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

app.command()(doctor)
app.command()(ops)
app.command()(tune)
app.command()(verify)
app.command()(show)
app.command()(why)
app.command()(report)
app.command()(export)
app.command("import")(import_)
app.command()(merge)
app.command()(diff)
app.command()(rollback)
app.command()(gc)
# What follows the program is the program's, options included.
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(capture)
app.command("compile")(compile_kernels)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: bool = typer.Option(False, "--version", help="Show the version.")) -> None:
    if version:
        from autofuse import __version__

        typer.echo(f"autofuse {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The entry point of the ``autofuse`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows "?" rather than fails
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code. Raises nothing."""
    try:
        code = app(args=list(arguments), prog_name="autofuse", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", INTERRUPTED, kind="")
    except BrokenPipeError:  # `autofuse show | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except AutofuseError as error:
        return _fail(str(error), BAD_INPUT)
    except sqlite3.Error as error:
        return _fail(f"the database cannot be used: {error}; set AUTOFUSE_DB to another file", BAD_INPUT)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        full = "; free some space and run again: everything measured before is kept" * (error.errno == errno.ENOSPC)
        return _fail(f"{place}{error.strerror or error}{full}", BAD_INPUT)
    except Exception as error:
        if message := _usage(error):
            return _fail(message, BAD_INPUT)
        if message := _out_of_memory(error):
            return _fail(message, BAD_INPUT)
        if os.environ.get("AUTOFUSE_TRACEBACK") == "1":
            raise
        return _fail(
            f"unexpected {type(error).__name__}: {error}; this is a fault of autofuse: please report it, with what "
            "AUTOFUSE_TRACEBACK=1 shows",
            1,
        )


def _fail(message: str, code: int, kind: str = "error: ") -> int:
    print(f"autofuse: {kind}{' '.join(message.split())}", file=sys.stderr)
    return code


def _usage(error: Exception) -> str:
    """The message of a usage error; "" for any other exception. Each version of typer keeps these elsewhere."""
    if not hasattr(error, "format_message"):
        return ""
    context = getattr(error, "ctx", None)
    help_hint = f"; see `{context.command_path} --help`" if context else ""
    return f"{error.format_message().rstrip('.')}{help_hint}"


def _out_of_memory(error: Exception) -> str:
    """One line for lack of memory; "" for any other exception."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return "there is not enough memory on the device for that many tokens; what was measured so far is kept"
    return ""
