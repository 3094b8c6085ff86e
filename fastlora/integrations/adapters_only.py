"""State dicts without the frozen base, through torch's public hooks on one model: whoever saves it saves adapters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .._utils.distributed import refuse_partitioned, whole
from .._utils.errors import check_model
from .._utils.torch_compat import metadata_of_root
from ..model.merge import before_merge
from ..model.saving_check import running
from ..model.state_differences import named, refuse_other, trained_names
from ..nn.linear import adapted_layers

_PARTIAL = "fastlora_partial"  # in what torch keeps of each module beside a state dict
_AVERAGING = {("timm", "apply_update_"), ("timm", "_update"), ("timm", "set")}


def adapters_only(model: nn.Module) -> AdaptersOnly:
    """Until closed, ``model.state_dict()`` leaves out the frozen base; use with ``with`` or call ``close``.

    What stays: every adapter, ``modules_to_save``, whatever else requires gradients, and buffers, under their usual
    names. ``load_state_dict`` of such a dict, strict or not, also after closing, keeps the base as it is and is
    compared with the model first: ``ValueError`` names differing ranks, targets and trained modules, with the model as
    it was. So the checkpoints of any trainer shrink to what is trained, and load. A merged model gives what it was
    before, and loads nothing until ``unmerge``. ``model`` may contain the adapted model, and may get its adapters
    later; full state dicts load as ever. A deep copy that is made meanwhile, such as an average, is closed along with
    ``model``; one that was pickled gives complete state dicts. Raises ``TypeError`` for what is no model.

    >>> from fastlora.integrations import adapters_only
    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> with adapters_only(model):
    ...     sorted(model.state_dict())
    ...
    ['0.lora_A.default.weight', '0.lora_B.default.weight']
    """
    return AdaptersOnly(model)


class AdaptersOnly:
    """See :func:`adapters_only`.

    >>> from fastlora.integrations import adapters_only
    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> handle = adapters_only(model)
    >>> handle.close()
    >>> len(model.state_dict())
    4
    """

    def __init__(self, model: nn.Module):
        _take_partial(check_model(model))
        self._leave_out = _LeaveOut()
        self._handle = model.register_state_dict_post_hook(self._leave_out)

    def __enter__(self) -> AdaptersOnly:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """State dicts are complete again."""
        self._leave_out.closed = True
        self._handle.remove()


class _LeaveOut:
    """The hook of a model and of its deep copies, which nobody else could close."""

    def __init__(self, closed: bool = False):
        self.closed = closed

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if not self.closed:
            _leave_out_base(module, state, prefix, metadata)

    def __deepcopy__(self, memo: dict) -> _LeaveOut:
        return self

    def __reduce__(self) -> tuple:
        return _LeaveOut, (True,)


def _take_partial(model: nn.Module) -> None:
    """Let state dicts without the base load, until the adapters are unloaded."""
    if "fastlora_before_load" not in vars(model):
        before = _BeforeLoad()
        vars(model)["fastlora_before_load"] = model.register_load_state_dict_pre_hook(before)
        vars(model)["fastlora_after_load"] = model.register_load_state_dict_post_hook(_AfterLoad(before))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the frozen base; of a sharded model whole tensors, for which every rank calls this."""
    with adapters_only(model):
        return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def load_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of what ``trained_state`` gave, also where no name says that it is without the base."""
    with adapters_only(model):
        model.load_state_dict(metadata_of_root(OrderedDict(state), {_PARTIAL: True}))


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if not adapted_layers(module):
        return
    refuse_partitioned(module)
    # Whoever shards a model on the meta device fills it from a state dict, of which the base is a part.
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    # timm's averages pair the values of two state dicts by their order; one of them may be complete.
    if _AVERAGING & running():
        return
    _take_partial(module)  # adapters may have been unloaded, and others have come
    metadata[_PARTIAL] = True
    trained = trained_names(module)
    frozen = [prefix + name for name in named(module) if name not in trained]
    for name in frozen:
        state.pop(name, None)
    # Quantized weights keep their scales under the weight's name.
    parts = tuple(name + "." for name in frozen)
    for key in [key for key in state if key.startswith(parts)]:
        del state[key]
    base = before_merge(module)
    for name, parameter in named(module).items() if base else ():
        # With keep_vars the parameter itself is asked for.
        if id(parameter) in base and not isinstance(state.get(prefix + name, parameter), nn.Parameter):
            state[prefix + name] = base[id(parameter)]


class _BeforeLoad:
    """Compares before anything is copied, and remembers which keys may be missing."""

    def __init__(self):
        self.optional: set[str] = set()

    def __call__(self, module: nn.Module, state: Mapping, prefix: str, metadata: Mapping, *_: Any) -> None:
        self.optional = refuse_other(module, state, prefix, partial=_PARTIAL in metadata)


class _AfterLoad:
    def __init__(self, before: _BeforeLoad):
        self.before = before

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in self.before.optional]
