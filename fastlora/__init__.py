"""fastlora: LoRA layers fused into the frozen matmul, with gradient and activation statistics inside the backward."""

from __future__ import annotations

import pathlib as _pathlib

# A plain checkout keeps the Triton kernels beside this package; an installed one holds them inside.
if not (_pathlib.Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_pathlib.Path(__file__).parent.parent))

from . import nn, schedule
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
from .diagnostics import Diagnostics
from .handover import from_peft, to_peft
from .injection import inject
from .merging import disabled, merge, unmerge
from .migration import load_layout
from .overview import explain, summary
from .peft_io import load, save
from .policies import param_groups, policy
from .presets import preset
from .ranks import reallocate, set_ranks
from .score_table import breakdown
from .scores import Scores, composite
from .temperature import ece, fit_temperature, reliability
from .tracker import Tracker, track

__version__ = "0.1.0"

__all__ = [
    "Diagnostics",
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
    "ece",
    "explain",
    "fit_temperature",
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
    "reliability",
    "remove_adapter",
    "save",
    "schedule",
    "set_adapter",
    "set_ranks",
    "summary",
    "to_peft",
    "track",
    "unmerge",
]
