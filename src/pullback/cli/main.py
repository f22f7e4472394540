"""The entry point: runs a command and turns the user's mistakes into one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from pullback.core.errors import PullbackError

INTERRUPTED = 130  # what shells report for a command that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `pullback` command and exit: 0 done, 2 a mistake in the input (one line on stderr), 130 interrupted.

    Args:
        arguments: what follows `pullback` on the command line; `sys.argv[1:]` if None.
    """
    try:
        from pullback.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pullback":
            raise
        _fail(f"the command line needs {error.name}; install it with: pip install 'pullback[imaging]'")
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        print("pullback: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except PullbackError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pullback":
            raise
        _fail(f"this needs {error.name}; install it with: pip install 'pullback[imaging]'")
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    print("pullback: error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
