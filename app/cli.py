"""The command `taskcast`: all verbs, their errors as one sentence, their exit codes.

`remote.py` has the verbs over HTTP, `local.py` those on the store. The latter is imported only for its own verbs, by
name: it brings the store's and the server's libraries with it, and `taskcast get` should answer at once (measured:
0.3 s without them, 0.9 s with them). What this file must never do is show a traceback for something foreseen.
"""

import importlib
import sys
from typing import Never

import typer

from app import remote
from app.errors import TaskcastError

USAGE = 2

HELP = "Taskcast: tasks of AI agents, stored as events and streamed live."


def main() -> Never:
    """Ends the process, always with an exit code that says what happened."""
    try:
        command()(prog_name="taskcast")
    except remote.Problem as problem:
        _fail(str(problem), problem.code)
    except TaskcastError as error:
        _fail(str(error), USAGE)
    except KeyboardInterrupt:  # while it was imported; typer sees to the rest
        sys.exit(130)
    raise AssertionError("typer ends with SystemExit")


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


def _fail(sentence: str, code: int) -> Never:
    sys.stderr.write(f"{sentence}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
