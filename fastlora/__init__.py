"""fastlora: LoRA layers fused into the frozen matmul, with gradient and activation statistics inside the backward."""

from __future__ import annotations

import pathlib as _pathlib

# A plain checkout keeps the Triton kernels beside this package; an installed one holds them inside.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))

from . import nn
from .adapter_set import (
    adapter_names,
    adapters,
    add_adapter,
    hold_absent,
    per_adapter_mean,
    remove_adapter,
    set_adapter,
)
from .allocation import allocate
from .calibration import calibrate
from .config import LoraConfig
from .injection import inject, set_ranks
from .merging import disabled, merge, unmerge
from .overview import explain, summary
from .peft_io import load, save
from .policies import param_groups
from .scores import Scores, composite
from .temperature import ece, fit_temperature, reliability
from .tracker import Tracker, track

__version__ = "0.1.0"

__all__ = [
    "LoraConfig",
    "Scores",
    "Tracker",
    "adapter_names",
    "adapters",
    "add_adapter",
    "allocate",
    "calibrate",
    "composite",
    "disabled",
    "ece",
    "explain",
    "fit_temperature",
    "hold_absent",
    "inject",
    "load",
    "merge",
    "nn",
    "param_groups",
    "per_adapter_mean",
    "reliability",
    "remove_adapter",
    "save",
    "set_adapter",
    "set_ranks",
    "summary",
    "track",
    "unmerge",
]
