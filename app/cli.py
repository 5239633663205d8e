"""The command `taskcast`: all verbs, their errors as one sentence, their exit codes.

`remote.py` has the verbs over HTTP, `local.py` those on the store. The latter is imported only for its own verbs, by
name: it brings the store's and the server's libraries with it, and `taskcast get` should answer at once (measured:
0.3 s without them, 0.9 s with them). What this file must never do is show a traceback for something foreseen.
"""

import importlib
import os
import sys
from typing import Never

import typer

from app import remote
from app.errors import TaskcastError

USAGE = 2
BROKEN_PIPE = 141
"""As a shell says of `yes | head -1`: whoever read has left. A 1 would say that the task failed."""
PYDANTIC = "Input should be "

HELP = "Taskcast: tasks of AI agents, stored as events and streamed live."


def main() -> Never:
    """Ends the process, always with an exit code that says what happened."""
    try:
        code = command()(prog_name="taskcast", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code)
    except typer.TyperException as error:
        _fail(_usage(error), USAGE)
    except BrokenPipeError:
        _leave()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer and rich make it a 1
            _leave()
        raise
    except remote.Problem as problem:
        _fail(str(problem), problem.code)
    except TaskcastError as error:
        _fail(str(error), USAGE)
    except KeyboardInterrupt:  # while it was imported; typer sees to the rest
        sys.exit(130)


def command() -> typer.Typer:
    """With all verbs; or, when one over HTTP is asked for, with those only."""
    cli = typer.Typer(
        help=HELP,
        epilog=remote.EXIT_CODES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    found = remote.cli.registered_commands
    verbs = {one.name or one.callback.__name__ for one in found if one.callback}
    if verbs.isdisjoint(sys.argv[1:2]):
        local = importlib.import_module("app.local")
        parts = [local.cli, remote.cli, local.store_cli]
    else:
        parts = [remote.cli]
    for part in parts:
        cli.add_typer(part)
    return cli


def _usage(error: typer.TyperException) -> str:
    """In one sentence, instead of a box of five lines."""
    said = " ".join(error.format_message().split()).removesuffix(".")
    context = getattr(error, "ctx", None)
    if isinstance(error, typer.BadParameter) and error.param and error.message.startswith(PYDANTIC):
        meant = error.message.removeprefix(PYDANTIC).partition(",")[0].replace("valid integer", "whole number")
        said = f"{error.param.opts[0]} must be {meant}"
    return f"{said}. See {context.command_path if context else 'taskcast'} --help." if said else ""


def _leave() -> Never:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # else Python would complain when it flushes at its end
    sys.exit(BROKEN_PIPE)


def _fail(sentence: str, code: int) -> Never:
    sys.stderr.write(f"{sentence}\n" if sentence else "")
    sys.exit(code)


if __name__ == "__main__":
    main()
