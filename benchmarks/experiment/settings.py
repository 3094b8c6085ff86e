"""What every run of the experiment shares."""

from __future__ import annotations

from dataclasses import dataclass

TARGETS = ("query", "key", "value")
HEAD = "classifier"


@dataclass(frozen=True)
class Settings:
    """One epoch over ``sentences`` of the train set, drawn anew for each seed; nothing is chosen on the dev set.

    Rates are customary ones, one for all adapter methods: no method was tuned.
    """

    sentences: int = 8000
    batch: int = 32
    max_tokens: int = 64
    rank: int = 8
    alpha: float = 16.0
    max_rank: int = 16
    lr_lora: float = 1e-3
    lr_head: float = 1e-3
    lr_full: float = 5e-5
    lr_floor: float = 1e-6
    clip: float = 1.0
    calibration_steps: int = 8
    penalty: float = 1e-4
    warmup_share: float = 0.4  # of the steps, until FW-LoRA's importance is frozen
    agreement_batches: int = 16

    @property
    def steps(self) -> int:
        return self.sentences // self.batch

    @property
    def importance_steps(self) -> int:
        return max(1, int(self.warmup_share * self.steps))
