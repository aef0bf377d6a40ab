"""Other processes, which answer line by line: our own with other devices, and the peers in their own room."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dhlnn_jax.errors import UsageError
from dhlnn_jax.runtime import cache_folder

PEER_PACKAGES = ("torch==2.13.0", "pfhedge==0.23.0")  # pfhedge pins numpy 1.26: never in the same environment
PEERS = ("pfhedge", "torch_loop")  # names in scripts/peers.py
_PEERS_SCRIPT = Path(__file__).parents[1] / "scripts" / "peers.py"


class LineProcess:
    """A process that answers one JSON line for each JSON line that it is asked.

    Raises: UsageError, with the last line of its stderr, where it ends instead of answering.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self._name = Path(command[0]).name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._errors[:] = [*self._errors[-20:], line.strip()]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self._process.wait()
            self._reader.join(1.0)
            last = self._errors[-1] if self._errors else "no message"
            raise UsageError(f"{self._name} process ended: {last}")
        return json.loads(reply)

    def close(self) -> None:
        """Its input ends, and so does it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._reader.join(1.0)
        self._process.stdout.close()

    def __enter__(self) -> "LineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peers_folder() -> Path:
    """Where the peers' virtual environment is kept."""
    return cache_folder() / "peers"


def make_peers(folder: Path) -> Path:
    """Python of a virtual environment that has the peers, made if it is not there yet.

    Raises: UsageError in one line if it cannot be had.
    """
    python, finished = folder / "bin" / "python", folder / "finished"
    if finished.exists():
        return python
    torch, pfhedge = PEER_PACKAGES
    print(f"making the peers' environment in {folder} (a few minutes, 1 GB)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    reason = "no virtual environment"
    try:
        _call([sys.executable, "-m", "venv", str(folder)])
        # The processor's build where it is to be had, else the default one, which brings a GPU's libraries.
        index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "0"]
        for wanted in ([f"{torch}+cpu"], [f"{torch}+cpu", *index], [torch]):
            reason = _call([str(python), "-m", "pip", "install", "--quiet", pfhedge, *wanted])
            if not reason:
                finished.touch()
                return python
    except OSError as error:
        reason = str(error)
    raise UsageError(f"cannot install {' and '.join(PEER_PACKAGES)}: {reason}")


def _call(command: list[str]) -> str:
    """Nothing if the command succeeds, else the last line of what it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.returncode:
        return ""
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]


@contextmanager
def peers_process(wanted: bool, python: Path | None) -> Iterator[LineProcess | None]:
    """The running scripts/peers.py; None, after one line on stderr, where there are no peers.

    Args:
      python: one that has torch and pfhedge; None makes `peers_folder`.
    """
    process = None
    if wanted:
        try:
            if not _PEERS_SCRIPT.exists():
                raise UsageError(f"{_PEERS_SCRIPT} is not there: benchmark from a checkout")
            process = LineProcess([str(python or make_peers(peers_folder())), str(_PEERS_SCRIPT)])
            process.ask(do="versions")
        except (UsageError, OSError) as error:
            print(f"no peers: {error}", file=sys.stderr)
            process = None
    try:
        yield process
    finally:
        if process is not None:
            process.close()
