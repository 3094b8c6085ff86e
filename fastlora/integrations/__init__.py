"""For trainers of others: checkpoints that hold only what is trained. Callbacks are in ``hf`` and ``lightning``."""

from .adapters_only import AdaptersOnly, adapters_only
from .checkpoints import TrainingState, load_checkpoint, register_for_checkpointing, save_checkpoint

__all__ = [
    "AdaptersOnly",
    "TrainingState",
    "adapters_only",
    "load_checkpoint",
    "register_for_checkpointing",
    "save_checkpoint",
]
