"""The public names, which ``fastlora`` gives as its own at their first use."""

from __future__ import annotations

from . import nn, training
from ._utils.installed import refuse_mixed
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
from .model.combine import add_weighted_adapter
from .model.data_start import initialize_corda, initialize_lora_ga
from .model.eject import unload
from .model.eva import initialize_eva
from .model.inject import inject
from .model.merge import disable_adapters, merge, merge_and_unload, unmerge
from .model.ranks import reallocate, set_ranks
from .model.recommend import recommend
from .model.roles import roles
from .model.summary import explain, summary
from .model.trainable import apply_policy, param_groups
from .peft_io import from_peft, load, load_layout, save, to_peft
from .tracking.calibrate import calibrate
from .tracking.tracker import Tracker, track

refuse_mixed()

__all__ = [
    "LoraConfig",
    "Scores",
    "Tracker",
    "adapter_names",
    "use_adapters",
    "add_adapter",
    "add_weighted_adapter",
    "allocate",
    "calibrate",
    "disable_adapters",
    "explain",
    "from_peft",
    "freeze_unused_adapters",
    "initialize_corda",
    "initialize_eva",
    "initialize_lora_ga",
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
    "recommend",
    "roles",
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
