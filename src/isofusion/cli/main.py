"""The command line: `isofusion VERB ...`. Only the verb that was asked for is imported, so `--help` is instant.

Exit codes: 0 done, 2 bad input, 1 failed, 128 + signal when stopped.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from isofusion.errors import InputError, RunFailure, explain

VERBS = {
    "data": ("isofusion.cli.data", "app", "Look at data: samples, counts, packed rows."),
    "count": ("isofusion.cli.count", "command", "Parameters by role, FLOPs and memory of a model."),
    "study": ("isofusion.cli.study", "app", "Plan, lock, run and report a study."),
    "fit": ("isofusion.cli.fit", "command", "Fit scaling laws to a table of losses (needs no torch)."),
    "plan": ("isofusion.cli.plan", "command", "What to train: N, D and loss for a budget, from a paper or your runs."),
    "suggest": ("isofusion.cli.suggest", "command", "Which runs to train next, under a budget."),
    "laws": ("isofusion.cli.laws", "command", "Published scaling laws: coefficients, sources, caveats."),
}
CONTEXT = {"help_option_names": ["-h", "--help"]}


def _version(wanted: bool) -> None:
    if wanted:
        from isofusion import __version__

        typer.echo(f"isofusion {__version__}")
        raise typer.Exit()


def build(arguments: Sequence[str]) -> typer.Typer:
    """The app for these arguments: the verb they name is real, the others only show their help line."""
    app = typer.Typer(
        name="isofusion",
        help="Scaling laws for native multimodal models: data → models → ladder → fit → report.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings=CONTEXT,
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for verb, (module, attribute, help_line) in VERBS.items():
        if verb != wanted:
            app.command(verb, help=help_line)(lambda: None)
            continue
        target = getattr(importlib.import_module(module), attribute)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=verb, help=help_line)
        else:
            app.command(verb, no_args_is_help=False, context_settings=CONTEXT)(target)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Every foreseen trouble is one message on stderr and an exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _slow_work_told():
            build(arguments)(args=arguments, prog_name="isofusion")
    except InputError as error:
        _end(str(error), 2)
    except RunFailure as error:
        _end(str(error), 1)
    except KeyboardInterrupt:
        _end("stopped", 130)
    except BrokenPipeError:  # `isofusion ... | head`
        sys.stderr.close()
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "isofusion":
            raise
        _end(f"this needs the package {error.name!r}: pip install 'isofusion[train]'", 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"{where}{error.strerror or error}", 1)
    except Exception as error:
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib
            _end("this user has no home folder: set the variable HOME to a folder that can be written", 1)
        if type(error).__name__ == "ValidationError" and type(error).__module__.startswith("pydantic"):
            _end(explain(error), 2)  # type: ignore[arg-type]
        raise


@contextmanager
def _slow_work_told() -> Iterator[None]:
    """What works for long says how far it is through the logger `isofusion` (data/slow.py); shown on stderr."""
    log, handler = logging.getLogger("isofusion"), logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _end(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
