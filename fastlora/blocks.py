"""The repeated blocks of a model and its norms, found by structure: what layerwise policies speak of."""

from __future__ import annotations

import re

from torch import nn

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)
_NORM_NAME = re.compile(r"(layer|rms|batch|group)norm", re.IGNORECASE)
_LINEAR_NAMES = ("Conv1D",)  # transformers' linear with a transposed weight


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with parameters of its own; other libraries' are known by name."""
    if not isinstance(module, _NORMS) and not _NORM_NAME.search(type(module).__name__):
        return False
    return any(True for _ in module.parameters(recurse=False))


def norms_of(model: nn.Module, name: str = "") -> list[str]:
    """Full names of the norms inside a module of the model."""
    return [n for n, m in model.named_modules() if is_norm(m) and (not name or n == name or n.startswith(name + "."))]


def block_stacks(model: nn.Module) -> list[list[str]]:
    """Names of the repeated blocks, shallow to deep, one list for each stack (an encoder, a tower).

    A block is one of several children of one class in an ``nn.Sequential`` or ``nn.ModuleList``, each with a linear and
    a norm inside; of nested ones the innermost counts. Stages (``layers.0.blocks``, ``layers.1.blocks``) are one stack.
    """
    found: dict[str, list[str]] = {}
    for path, container in model.named_modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList)):
            continue
        children = [(n, child) for n, child in container._modules.items() if child is not None and _is_block(child)]
        if children and len({type(child) for _, child in children}) == 1:
            found[path] = [f"{path}.{n}" if path else n for n, _ in children]
    inner = {p: b for p, b in found.items() if not any(q != p and _inside(q, b) for q in found)}
    stacks: dict[str, list[str]] = {}
    for path, blocks in inner.items():
        stacks.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", path), []).extend(blocks)
    return [blocks for blocks in stacks.values() if len(blocks) > 1]


def _is_block(module: nn.Module) -> bool:
    linear = norm = False
    for part in module.modules():
        linear |= isinstance(part, nn.Linear) or type(part).__name__ in _LINEAR_NAMES
        norm |= is_norm(part)
    return linear and norm and not is_norm(module)


def _inside(path: str, blocks: list[str]) -> bool:
    return any(path == block or path.startswith(block + ".") for block in blocks)
