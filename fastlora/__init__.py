"""fastlora: LoRA layers fused into the frozen matmul, with gradient and activation statistics inside the backward."""

from __future__ import annotations

import importlib as _importlib
import pathlib as _pathlib
from typing import TYPE_CHECKING

# A plain checkout keeps the Triton kernels beside this package; an installed one holds them inside.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))

<<<<<<< HEAD
from . import nn, training
from .config import LoraConfig
from .importance.allocation import allocate
from .importance.scores import Scores
from .model.adapters import (
    adapter_names,
    add_adapter,
    delete_adapter,
    freeze_unused_adapters,
    per_adapter_mean,
    set_adapter,
    use_adapters,
)
from .model.inject import inject, unload
from .model.merge import disable_adapters, merge, merge_and_unload, unmerge
from .model.ranks import reallocate, set_ranks
from .model.summary import explain, summary
from .model.trainable import apply_policy, param_groups
from .peft_io import from_peft, load, load_layout, save, to_peft
from .tracking.calibrate import calibrate
from .tracking.tracker import Tracker, track

__version__ = "0.1.0"

__all__ = [
    "LoraConfig",
    "Scores",
    "Tracker",
    "adapter_names",
    "use_adapters",
    "add_adapter",
    "allocate",
    "calibrate",
    "disable_adapters",
    "explain",
    "from_peft",
    "freeze_unused_adapters",
    "inject",
    "load",
    "load_layout",
    "merge",
    "merge_and_unload",
    "nn",
    "param_groups",
    "per_adapter_mean",
    "apply_policy",
    "reallocate",
    "delete_adapter",
    "save",
    "set_adapter",
    "set_ranks",
    "summary",
    "to_peft",
    "track",
    "training",
    "unload",
    "unmerge",
]
=======
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
>>>>>>> main
