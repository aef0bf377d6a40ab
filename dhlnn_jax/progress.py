"""A progress bar on stderr, for anything that may take over two seconds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[..., None]]:
    """Context that yields `advance(steps=1, note="")`; drawn only where stderr is a terminal.

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

        def advance(steps: int = 1, note: str = "") -> None:
            progress.update(task, advance=steps, note=note)

        yield advance
