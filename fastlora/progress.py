"""Progress of a pass over data: a bar where somebody looks at it, the log otherwise."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Report = Callable[[int, "int | None", float], None]
"""Called with (batches done, batches wanted or None, rank correlation with the estimate before or NaN)."""


@contextmanager
def reporting(progress: bool | Report | None, steps: int | None) -> Iterator[Report]:
    """What to call after each batch.

    True: a bar, which needs tqdm; None: a bar in a terminal with tqdm installed, the log otherwise; False: nothing; or
    a callable of one's own. Raises ``ValueError`` for anything else and ``ImportError`` for True without tqdm.
    """
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise ValueError(f"progress: expected True, False, None or a callable, got {progress!r}")
    if progress is False:
        yield lambda done, wanted, correlation: None
    elif callable(progress):
        yield progress
    elif progress or (sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None):
        with _tqdm()(total=steps, desc="calibrate", unit="batch") as bar:

            def advance(done: int, wanted: int | None, correlation: float) -> None:
                if not math.isnan(correlation):
                    bar.set_postfix({"rank correlation": f"{correlation:.3f}"}, refresh=False)
                bar.update()

            yield advance
    else:
        yield _log


def _tqdm() -> type:
    try:
        return importlib.import_module("tqdm").tqdm
    except ImportError as error:
        raise ImportError("progress: True needs tqdm (pip install tqdm); None logs instead") from error


def _log(done: int, wanted: int | None, correlation: float) -> None:
    shown = "all" if wanted is None else str(wanted)
    settled = "" if math.isnan(correlation) else f", rank correlation with the estimate before {correlation:.3f}"
    logger.info("calibrate: %d of %s batches%s", done, shown, settled)
