"""Progress of long work: a bar where somebody looks at it, the log otherwise."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Report = Callable[[int, "int | None", float], None]
"""Called with (pieces done, pieces wanted or None, rank correlation with the estimate before or NaN)."""


def check_progress(progress: object) -> None:
    """Refuse what ``reporting`` cannot report to."""
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise ValueError(f"progress: expected True, False, None or a callable, got {progress!r}")


@contextmanager
def reporting(
    progress: bool | Report | None, steps: int | None, what: str = "calibrate", unit: str = "batch", delay: float = 0.0
) -> Iterator[Report]:
    """What to call after each piece of work: a batch, a layer. A bar shows up after ``delay`` seconds.

    True: a bar, which needs tqdm; None: a bar in a terminal with tqdm installed, the log otherwise; False: nothing; or
    a callable of one's own. Raises ``ValueError`` for anything else and ``ImportError`` for True without tqdm.
    """
    check_progress(progress)
    if progress is False:
        yield lambda done, wanted, correlation: None
    elif callable(progress):
        yield progress
    elif progress or (sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None):
        with _tqdm()(total=steps, desc=what, unit=unit, delay=delay) as bar:

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
