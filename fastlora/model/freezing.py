"""What adapting a model froze, and giving it back when the adapters are gone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

_NOTE = "fastlora_froze"


def freeze(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Freeze parameters; each module notes which of its own were trained before, by name.

    With the module the note is copied and pickled, and goes where another takes its place.
    """
    unwanted = {id(p): p for p in parameters if p.requires_grad}
    for module in model.modules():
        froze = [name for name, p in module._parameters.items() if id(p) in unwanted]
        if froze:
            vars(module)[_NOTE] = (*vars(module).get(_NOTE, ()), *froze)
    for parameter in unwanted.values():
        parameter.requires_grad_(False)


def give_back(model: nn.Module) -> None:
    """Let what ``freeze`` froze require gradients again; what was frozen before that stays so."""
    for module in model.modules():
        for name in vars(module).pop(_NOTE, ()):
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(True)
