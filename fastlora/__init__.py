"""fastlora: LoRA layers fused into the frozen matmul, with gradient and activation statistics inside the backward."""

from __future__ import annotations

import importlib as _importlib
import pathlib as _pathlib
from typing import TYPE_CHECKING

# A plain checkout keeps the Triton kernels beside this package; an installed one holds them inside.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import *  # noqa: F403
    from .api import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        """The public names, loaded at the first use of one: ``fastlora --help`` need not wait for torch."""
        if not name.startswith("_") or name == "__all__":
            api = _importlib.import_module(".api", __name__)
            names = getattr(api, "__all__", ())  # none yet while ``api`` itself is being imported
            globals().update({n: getattr(api, n) for n in names}, **({"__all__": names} if names else {}))
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_importlib.import_module(".api", __name__).__all__})
