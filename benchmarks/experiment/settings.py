"""What every run on a data set shares."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import BATCH, HEAD_RATE, TRAINED

HEAD = "classifier"


@dataclass(frozen=True)
class Settings:
    """``sentences`` of the training split are drawn anew for each seed."""

    sentences: int
    batch: int = BATCH
    max_tokens: int = 64
    lr_head: float = HEAD_RATE
    lr_floor: float = 1e-6
    clip: float = 1.0
    calibration_steps: int = 8

    @property
    def steps(self) -> int:
        return self.sentences // self.batch

    @property
    def tenth(self) -> int:
        return max(1, self.steps // 10)


def settings_for(data: str) -> Settings:
    return Settings(TRAINED[data])
