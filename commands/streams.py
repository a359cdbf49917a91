"""Standard streams that may go away: a closed pipe (`| head -1`) or terminal never ends the work."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Lasting:
    """A text stream that falls silent, instead of raising, when nobody reads it any more.

    What its encoding cannot spell is replaced. Everything else is the wrapped stream's.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write what can be written; returns the length of the text, as if all were."""
        if self.stream is not None:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding or "ascii"
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError):  # a pipe without a reader, a terminal that was closed
                self._silence()
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, or fall silent if nobody reads any more."""
        if self.stream is not None:
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self._silence()

    def _silence(self) -> None:
        stream, self.stream = self.stream, None
        # The interpreter flushes at exit what is left in the buffer.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, stream.fileno())
            os.close(sink)

    def isatty(self) -> bool:
        """Whether a terminal is there, still."""
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor. Raises OSError once it is closed."""
        if self.stream is None:
            raise OSError("the stream was closed")
        return self.stream.fileno()

    @property
    def encoding(self) -> str:
        """Of the wrapped stream."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stream"], name)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Both standard streams as `Lasting` ones inside the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, Lasting):
                stream.flush()
        sys.stdout, sys.stderr = before
