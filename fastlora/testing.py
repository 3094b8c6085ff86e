"""Help for tests, benchmarks and the demo; never called on ``import fastlora``."""

from __future__ import annotations

import importlib
import sys

import torch

_KEPT: list[torch.library.Library] = []


def enable_torchvision() -> bool:
    """Let torchvision import beside a torch without CUDA, whose build lacks torchvision's operators.

    Only then are the schemas of ``torchvision::nms`` and ``torchvision::qnms`` defined, which import needs and which
    nothing here calls. Returns whether it was necessary.
    """
    if torch.version.cuda is not None or _KEPT:
        return False
    try:
        importlib.import_module("torchvision")
        return False
    except ModuleNotFoundError:
        return False
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
    return True
