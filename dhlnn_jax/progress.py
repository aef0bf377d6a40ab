"""A progress bar on stderr, for anything that may take over two seconds; in a log a line a minute."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_BETWEEN_LINES = 60.0  # seconds; a cluster's log shows that a job lives, and short runs leave none


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Context that yields `advance(steps=1, note="")`: a bar on a terminal, elsewhere a line a minute.

    Args:
      total: steps; None draws that it is busy, where steps are not known.

    Example:
      with progress_bar("reading order books", total=4) as advance:
          for stock in stocks:
              ...
              advance(note=f"stock {stock}")
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, note="")
        began = said = time.monotonic()

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal said
            progress.update(task, advance=steps, note=note)
            now = time.monotonic()
            if console.is_terminal or now - said < _BETWEEN_LINES:
                return
            said = now
            done = f"{progress.tasks[0].completed:.0f}" + ("" if total is None else f" of {total}")
            line = f"{description}: {done} after {(now - began) / 60:.0f} min"
            print(f"{line}, {note}" if note else line, file=sys.stderr, flush=True)

        yield advance
