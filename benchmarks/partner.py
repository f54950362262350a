"""A benchmark process that stays loaded and answers with lines of JSON, so that sides can take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any


class Partner:
    """`python -W ignore *arguments` in this repository. log: where its standard error goes; None is ours."""

    def __init__(self, *arguments: str, environment: dict[str, str], log: IO[str] | None = None) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, **environment}, cwd=Path(__file__).parents[1],
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; what libraries print besides is passed over.

        Raises:
            RuntimeError: if the process ends before.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):
                return json.loads(line)
        told = "; see above"
        if self.log is not None:
            self.log.seek(0)
            told = f":\n{self.log.read()}"
        raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended with code {self.process.wait()}{told}")  # type: ignore[arg-type]

    def run(self, said: str = "go") -> dict[str, Any]:
        """The answer to a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{said}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
