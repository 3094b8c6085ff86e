"""fastlora: LoRA layers fused into the frozen matmul, with gradient and activation statistics inside the backward."""

from __future__ import annotations

import pathlib as _pathlib

# A plain checkout keeps the Triton kernels beside this package; an installed one holds them inside.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))

from . import nn, training
from .config import LoraConfig
from .importance.allocation import allocate
from .importance.scores import Scores, breakdown, composite
from .model.adapters import (
    adapter_names,
    adapters,
    add_adapter,
    hold_absent,
    per_adapter_mean,
    remove_adapter,
    set_adapter,
)
from .model.inject import inject
from .model.merge import disabled, merge, unmerge
from .model.ranks import reallocate, set_ranks
from .model.summary import explain, summary
from .model.trainable import param_groups, policy, preset
from .peft_io import from_peft, load, load_layout, save, to_peft
from .tracking.calibrate import calibrate
from .tracking.tracker import Tracker, track

__version__ = "0.1.0"

__all__ = [
    "LoraConfig",
    "Scores",
    "Tracker",
    "adapter_names",
    "adapters",
    "add_adapter",
    "allocate",
    "breakdown",
    "calibrate",
    "composite",
    "disabled",
    "explain",
    "from_peft",
    "hold_absent",
    "inject",
    "load",
    "load_layout",
    "merge",
    "nn",
    "param_groups",
    "per_adapter_mean",
    "policy",
    "preset",
    "reallocate",
    "remove_adapter",
    "save",
    "set_adapter",
    "set_ranks",
    "summary",
    "to_peft",
    "track",
    "training",
    "unmerge",
]
