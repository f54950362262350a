"""The log of the server on standard error, which holds nothing that a user wrote and never stops the server.

It is JSON, one object a line; on a terminal it is lines to read.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import time
import traceback
from typing import Any

STDERR = 2
MAX_WAITING = 10_000
"""Lines that wait for a standard error that nobody reads. Further ones are dropped, and counted."""


class JSONLines(logging.Formatter):
    """Writes one JSON object a line.

    Of an exception it writes class and place, never the message, which may quote a user. Of the words of other libraries
    it writes the first ones alone, up to where they begin to quote.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        return json.dumps(self.line_of(record), ensure_ascii=True)

    def line_of(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return what a line says of a record."""
        words = record.getMessage()
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": words if record.name == "ivl.serve" else " ".join(re.findall(r"^[A-Za-z .]{0,60}", words)).strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and (error := record.exc_info[1]) is not None:
            frames = traceback.extract_tb(error.__traceback__)[-8:]
            line["error"] = type(error).__name__
            line["at"] = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
        return line


class ReadableLines(JSONLines):
    """Writes the same for people: the local time, the event, then each fact by its name."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line of text."""
        line = self.line_of(record)
        event, level = line.pop("event"), line.pop("level")
        del line["time"]
        line.pop("id", None)  # for machines, which join lines by it
        facts = [f"{name} {_in_words(value)}" for name, value in line.items() if value not in ([], 0)]
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock} {'' if level == 'info' else f'{level}: '}{event}  {'  '.join(facts)}".rstrip()
        return "".join(c if c.isprintable() else "?" for c in text)


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


class LineWriter(logging.Handler):
    """Writes lines to standard error in a thread of its own, so that a pipe that nobody reads stops nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(ReadableLines() if os.isatty(STDERR) else JSONLines())
        self.num_dropped = 0
        self._lines: queue.Queue[str] = queue.Queue(MAX_WAITING)
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self.num_dropped += 1

    def _run(self) -> None:
        while True:
            self._write(self._lines.get())
            if dropped := self.num_dropped:
                self.num_dropped -= dropped
                fields = {"fields": {"lines": dropped}}
                self._write(self.format(logging.makeLogRecord({"name": "ivl.serve", "msg": "log lines dropped", **fields})))
            self._lines.task_done()

    def _write(self, line: str) -> None:
        data = f"{line}\n".encode()
        try:
            while data:  # not by sys.stderr, whose lock would keep the process from ending
                data = data[os.write(STDERR, data) :]
        except OSError:  # closed, or a full disk
            self.num_dropped += 1

    def flush(self) -> None:
        """Wait a second at most until every line is written."""
        end = time.monotonic() + 1
        while self._lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)


def set_up_log(level: int = logging.INFO) -> None:
    """Write the log of the server, and of the libraries below it, to standard error; of threads that fail, too."""
    os.environ["RUST_BACKTRACE"] = "0"  # that of a panic holds paths of this machine
    handler = LineWriter()
    logging.captureWarnings(capture=True)
    for name, least in (("ivl.serve", level), *((name, logging.WARNING) for name in ("uvicorn", "asyncio", "py.warnings"))):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
    threading.excepthook = lambda failed: logging.getLogger("ivl.serve").error(
        "thread failed", exc_info=failed.exc_value and (failed.exc_type, failed.exc_value, failed.exc_traceback)
    )
