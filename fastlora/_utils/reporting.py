"""Progress of long work, and aligned text tables."""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from .errors import wrong_type

logger = logging.getLogger(__name__)

Report = Callable[[int, "int | None", float], None]
"""Called with (pieces done, pieces wanted or None, rank correlation with the estimate before or NaN)."""
PATIENCE = 1.0  # seconds of work before a bar that nobody asked for shows up


def check_progress(progress: object) -> None:
    """Refuse what ``reporting`` cannot report to."""
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise wrong_type("progress", "True, False, None or a callable", progress)


@contextmanager
def reporting(progress: bool | Report | None, steps: int | None, what: str, unit: str) -> Iterator[Report]:
    """What to call after each piece of work: a batch, a layer.

    True: a bar, which needs tqdm; None: a bar after a second in a terminal with tqdm installed, the log otherwise;
    False: nothing; or a callable of one's own. Raises ``TypeError`` for anything else and ``ImportError`` for True
    without tqdm.
    """
    check_progress(progress)
    if progress is False:
        yield lambda done, wanted, correlation: None
    elif callable(progress):
        yield progress
    elif progress or (sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None):
        with _tqdm()(total=steps, desc=what, unit=unit, delay=0.0 if progress else PATIENCE) as bar:

            def advance(done: int, wanted: int | None, correlation: float) -> None:
                if not math.isnan(correlation):
                    bar.set_postfix({"rank correlation": f"{correlation:.3f}"}, refresh=False)
                bar.update()

            yield advance
    else:
        yield functools.partial(_log, what, f"{unit}es" if unit.endswith("ch") else f"{unit}s")


def _tqdm() -> type:
    try:
        return importlib.import_module("tqdm").tqdm
    except ImportError as error:
        raise ImportError("progress: True needs tqdm (pip install tqdm); None logs instead") from error


def _log(what: str, units: str, done: int, wanted: int | None, correlation: float) -> None:
    shown = "all" if wanted is None else str(wanted)
    settled = "" if math.isnan(correlation) else f", rank correlation with the estimate before {correlation:.3f}"
    logger.info("%s: %d of %s %s%s", what, done, shown, units, settled)


def text_table(head: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Rows in columns under a line: names to the left, what follows to the right."""
    cells = [tuple(map(str, row)) for row in (head, *rows)]
    rule = tuple("-" * max(map(len, column)) for column in zip(*cells, strict=True))
    return "\n".join(aligned_lines([cells[0], rule, *cells[1:]]))


def aligned_lines(table: list[tuple[str, ...]]) -> list[str]:
    first, *rest = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join([line[0].ljust(first), *map(str.rjust, line[1:], rest)]) for line in table]


class Tabular(ABC):
    """Prints as a table with lines below it, in rich's consoles as one of theirs."""

    _numbers: ClassVar[range] = range(0)  # columns that rich puts to the right

    @abstractmethod
    def _parts(self) -> tuple[Sequence[str], Sequence[Sequence], Sequence[str]]:
        """The head, the rows, and the lines below."""

    def __str__(self) -> str:
        head, rows, below = self._parts()
        return "\n".join([text_table(head, rows), *below])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        head, rows, below = self._parts()
        table = Table()
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i in self._numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))  # ``[q]`` of a key is no markup
        return Group(table, *map(Text, below))
