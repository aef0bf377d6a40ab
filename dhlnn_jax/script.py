"""What all scripts do alike: one line and an exit code for every mistake, help, the config file first."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from dhlnn_jax.errors import UsageError


def exit_code(script: str, body: Callable[[], None], *, interrupted: str = ", nothing was written") -> int:
    """Runs a script's body, whose results go to stdout, and progress and mistakes to stderr.

    Args:
      script: its file name, which begins every message.
      interrupted: what is said after this word.
    Returns: 0: done. 1: training failed, in one line. 2: a mistake in what was given, in one line. 130:
      interrupted. After help: what `show_help` or argparse ended with.
    Raises: every other exception: mistakes in the program are not hidden.
    """
    try:
        body()
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except UsageError as error:
        code, message = 2, str(error)
    except OSError as error:
        code, message = 2, error.strerror or str(error)
        if error.filename:
            message += f": {error.filename}"
    except FloatingPointError as error:
        code, message = 1, str(error)
    except KeyboardInterrupt:
        code, message = 130, f"interrupted{interrupted}"
    print(f"{script}: {message}", file=sys.stderr)
    return code


def show_help(text: Callable[[], str], arguments: Sequence[str]) -> None:
    """Prints the help and ends the script: with 0 if asked for, with 2 and on stderr if nothing was given."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(text(), end="", file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)


class Parser(argparse.ArgumentParser):
    """Refuses with a UsageError, and takes whole names only: --seed is an override, not short for --seeds."""

    def __init__(self, **how: Any):
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def config_line(parser: Parser, arguments: Sequence[str]) -> tuple[str, argparse.Namespace, list[str]]:
    """The parts of `CONFIG [options] [--section.key value ...]`; without arguments or with -h, the help.

    Args:
      parser: of the options, --seeds among them.
    Returns: CONFIG, or "" where an option is first, for `config_first`; the options; the overrides.
    Raises: UsageError for a malformed option, and seeds that are not 1 to 100.
    """
    show_help(parser.format_help, arguments)
    config = "" if arguments[0].startswith("-") else arguments[0]
    options, overrides = parser.parse_known_args(arguments[1 if config else 0 :])
    if not 1 <= options.seeds <= 100:
        raise UsageError(f"--seeds must be from 1 to 100, got {options.seeds}")
    return config, options, overrides


def config_first(config: str, usage: str) -> str:
    """The config file. Raises: UsageError, which shows the usage, if this is an option or empty."""
    if not config or config.startswith("-"):
        raise UsageError(f"the config file comes first: {usage}; see --help")
    return config
