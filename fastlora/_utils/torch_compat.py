"""The only door to torch's private names: each is looked up once, and says what happens where torch has it no more.

``fastlora doctor`` lists them. ``nn.Module``'s ``_parameters``, ``_modules`` and ``_buffers``, which every subclass is
written against, are used as they are; the names of data-parallel training are in ``distributed``.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction


class PrivateName(NamedTuple):
    """A private name of torch: whether this torch has it, and what happens where one has not."""

    name: str
    there: bool
    when_gone: str


NAMES: list[PrivateName] = []


def private(name: str, when_gone: str) -> Any:
    """What torch has under a private name, None without; ``when_gone`` says what happens then."""
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    NAMES.append(PrivateName(name, found is not None, when_gone))
    return found


def private_attributes(owner: str, example: Any, names: Sequence[str], when_gone: str) -> bool:
    """Whether an object has private attributes that are set on instances only."""
    there = [getattr(example, name, None) is not None for name in names]
    NAMES.extend(PrivateName(f"{owner}.{n}", t, when_gone) for n, t in zip(names, there, strict=True))
    return all(there)


# Operators and the dispatcher.

_DISPATCHED = "every call of an operator goes through the dispatcher"
_below_adinplace = private("torch._C._AutoDispatchBelowADInplaceOrView", _DISPATCHED)
_dispatch_modes = private("torch._C._len_torch_dispatch_stack", _DISPATCHED)
_functorch_stack = private("torch._C._functorch.peek_interpreter_stack", _DISPATCHED)
_tracing_state = private("torch._C._get_tracing_state", _DISPATCHED)
_CAN_TELL = None not in (_below_adinplace, _dispatch_modes, _functorch_stack, _tracing_state)
_LEVEL = "torch.autograd.forward_ad._current_level"  # of forward mode, -1 outside
_no_level = private(_LEVEL, "tangents are lost without gradients, and refused with them") is None
_forward_mode: Any = types.SimpleNamespace(_current_level=-1) if _no_level else torch.autograd.forward_ad
_export_gone = "compiled code of torch 2.11 and 2.12 takes torch's own operators, and none with a tracker"
_flag_of_export = private("torch.compiler._is_exporting_flag", _export_gone) is not None
_KEYS_GONE = "autocast is switched off by torch.autocast(enabled=False) inside of an operator"
_exclude = private("torch._C._ExcludeDispatchKeyGuard", _KEYS_GONE)
_key_set = private("torch._C.DispatchKeySet", _KEYS_GONE)
_key = private("torch._C.DispatchKey", _KEYS_GONE)
_any_autocast = private("torch._C._is_any_autocast_enabled", "a tensor's device is asked at every call")
_below_autograd = private(
    "torch._C._AutoDispatchBelowAutograd", "the keys of autograd are excluded by torch._C._ExcludeDispatchKeyGuard"
)
_function_base = private("torch._C._FunctionBase", "torch.autograd.Function.apply runs with its search for wrappers")
_registrations = private(
    "torch._C._dispatch_get_registrations_for_dispatch_key",
    "operators of the native library are taken to have a CPU kernel and no CUDA kernel",
)
_unsafe_view = private("torch.ops.aten._unsafe_view.default", "an output that is a view is copied")
_is_view = private("torch.Tensor._is_view", "every output is taken for a view, and handed on under another header")
_NOT_PLANNED = "calls on a GPU are not planned: Triton launches every kernel"
dispatch_mode = private("torch.utils._python_dispatch.TorchDispatchMode", _NOT_PLANNED)
_batched = private(
    "torch._C._functorch.is_legacy_batchedtensor", "is_grads_batched=True raises inside native operators"
)
_mode_stack = private(
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack", "FLOP counters count our operators as nothing"
)
_has_schema = private_attributes("torch._ops.OpOverload", torch.ops.aten.mm.default, ("_schema",), _NOT_PLANNED)
_assert_async = private("torch._assert_async", "ids on a GPU are checked with a wait for it")
_version = private(
    "torch.Tensor._version",
    "no tensor counts as unchanged: projections run one by one; adapters that never learn, weights that change between "
    "forward and backward, and steps that a tracker is not told of are not noticed",
)

_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))
_AUTOGRAD_KEYS = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def _excluding(*names: str) -> Callable[[], Any] | None:
    """A guard under which dispatch keys are not there, or None where torch has no such guard."""
    if None in (_exclude, _key_set, _key):
        return None
    keys = _key_set(getattr(_key, names[0]))
    for name in names[1:]:
        keys = keys | _key_set(getattr(_key, name))
    return lambda: _exclude(keys)


def _no_guard() -> Any:
    raise RuntimeError(
        "this torch has neither torch._C._AutoDispatchBelowAutograd nor torch._C._ExcludeDispatchKeyGuard: fastlora "
        "runs in eager mode only, without torch.compile, torch.func and tensor subclasses"
    )


without_graph: Callable[[], Any] = _below_autograd or _excluding(*_AUTOGRAD_KEYS) or _no_guard
# Neither views nor versions are tracked: what a kernel that is called directly makes and changes is new.
untracked: Callable[[], Any] = _below_adinplace or contextlib.nullcontext
_no_autocast = {device: _excluding(key) for device, key in _AUTOCAST_KEYS.items()}


def without_autocast(device_type: str) -> Any:
    """A context in which operators do not meet autocast again: for the kernel that autocast has called."""
    guard = _no_autocast.get(device_type)
    return torch.autocast(device_type, enabled=False) if guard is None else guard()


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on where a tensor is; torch knows none for tensors without storage."""
    if _any_autocast is not None and not _any_autocast():
        return False
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


CAPTURED = ("cuda",)  # kinds of devices whose work a graph can capture


def capturing(device_type: str) -> bool:
    """Whether this thread's work on devices of a kind is captured into a CUDA graph, and not run."""
    return device_type in CAPTURED and torch.cuda.is_current_stream_capturing()


def nothing_watches() -> bool:
    """Whether no mode, transform, tracer or compiler sees what the dispatcher is called for."""
    return (
        _CAN_TELL
        and not torch.compiler.is_compiling()
        and _dispatch_modes() == 0
        and _functorch_stack() is None
        and _tracing_state() is None
        and _forward_mode._current_level < 0
    )


def differentiated_again(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward has to be torch's own operators: gradients that have gradients or tangents, or are batched."""
    return (
        torch.is_grad_enabled()
        or _forward_mode._current_level >= 0
        or (_functorch_stack is not None and _functorch_stack() is not None)
        or (_batched is not None and True in [g is not None and _batched(g) for g in grads])
    )


def active_modes() -> Sequence[Any]:
    """The dispatch modes that are on."""
    return () if torch.compiler.is_compiling() or _mode_stack is None else _mode_stack()


def wants_plain_operators() -> bool:
    """Whether what runs has to be torch's own operators: under ``torch.func``, ``torch.jit.trace`` and export."""
    if not torch.compiler.is_compiling():
        return being_traced()
    # Before torch 2.13 all code that is compiled is told by ``is_exporting`` that it is exported.
    return torch.compiler._is_exporting_flag if _flag_of_export else torch.compiler.is_exporting()


def being_traced() -> bool:
    """Whether a compiler, ``torch.func``, forward mode or ``torch.jit.trace`` looks at what runs."""
    return (
        torch.compiler.is_compiling()
        or _forward_mode._current_level >= 0
        or (_functorch_stack is not None and _functorch_stack() is not None)
        or (_tracing_state is not None and _tracing_state() is not None)
    )


def can_skip_dispatcher(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing watches the dispatcher and no tensor is a subclass, so that a kernel may be called without it.

    On a small layer going through the dispatcher to a kernel written in Python costs more than the kernel.
    """
    return nothing_watches() and _PLAIN.issuperset(map(type, tensors))


def apply_directly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without its search for dead functorch wrappers, which ``nothing_watches`` rules out."""
    if _function_base is None or not issubclass(function, _function_base):
        return function.apply
    return vars(_function_base)["apply"].__get__(None, function)


def kernels_of(library: str, device_type: str, on_cpu: Iterable[str]) -> list[str]:
    """A library's operators that have a kernel for a device; where torch does not tell, ``on_cpu`` for a CPU only."""
    if _registrations is None:
        return list(on_cpu) if device_type == "cpu" else []
    found, start = _registrations(device_type.upper()), f"{library}::"
    return [name.removeprefix(start) for name in found if name.startswith(start)]


def unsafe_view(y: Tensor, shape: Sequence[int]) -> Tensor:
    """``y`` in another shape, which autograd does not take for a view: nobody else has it."""
    return y.reshape(shape).clone() if _unsafe_view is None else _unsafe_view(y, shape)


def as_no_view(y: Tensor) -> Tensor:
    """A new tensor that autograd does not take for a view: it lets nobody change a view that an operator made."""
    return unsafe_view(y, y.shape) if _is_view is None or _is_view(y) else y


def assert_async(condition: Tensor, message: str) -> None:
    """``RuntimeError`` where a condition on a device is false: at once on a CPU, later on a GPU."""
    if _assert_async is not None:
        _assert_async(condition, message)
    elif not bool(condition):
        raise RuntimeError(message)


def counts_versions(tensor: Tensor) -> bool:
    """Whether changes in place of a tensor are counted."""
    return _version is not None and not tensor.is_inference()


def version_of(tensor: Tensor) -> Any:
    """What changes whenever a tensor is changed in place; equal to nothing where torch does not count."""
    try:
        return object() if _version is None else tensor._version
    except RuntimeError:  # of inference tensors, nobody counts changes
        return object()


def seen(x: Tensor) -> tuple[Any, bool, bool, torch.dtype | None]:
    """A tensor's version and the modes under which a layer meets it: alike, one result stands for another."""
    try:
        version = object() if _version is None else x._version
    except RuntimeError:
        version = object()
    cast = (_any_autocast is None or _any_autocast()) and autocasting(x)
    dtype = torch.get_autocast_dtype(x.device.type) if cast else None
    return version, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), dtype


schema_of = operator.attrgetter("_schema") if _has_schema else None  # of an operator's overload


# Lists of tensors in one launch.


def _foreach(name: str, single: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """``torch._foreach_<name>``, one launch over a list; where torch has none, ``single`` of one after another."""

    def one_by_one(tensors: Sequence[Tensor], others: Any) -> list[Tensor]:
        listed = others if isinstance(others, (list, tuple)) else [others] * len(tensors)
        return [single(tensor, other) for tensor, other in zip(tensors, listed, strict=True)]

    return private(f"torch._foreach_{name}", "one launch a tensor") or one_by_one


# Of a list of tensors and a list of as many others, or one number or tensor for all.
multiply_each = _foreach("mul", torch.mul)
divide_each = _foreach("div", torch.div)
subtract_each = _foreach("sub", torch.sub)
add_to_each_ = _foreach("add_", Tensor.add_)
copy_each_ = _foreach("copy_", Tensor.copy_)
norm_of_each = _foreach("norm", torch.linalg.vector_norm)


def apart(views: Sequence[Tensor]) -> list[Tensor]:
    """Copies that share no memory, in one launch."""
    copies = [torch.empty_like(view, memory_format=torch.contiguous_format) for view in views]
    if copies:
        copy_each_(copies, list(views))
    return copies


# oneDNN's linear.

_NO_ONEDNN = "the CPU's products run by F.linear; fastlora.explain says so"
_ONEDNN = {
    name: private(f"torch.ops.mkldnn.{name}", _NO_ONEDNN)
    for name in ("_linear_pointwise", "_reorder_linear_weight")
    if torch.backends.mkldnn.is_available()
}


def onednn_reason() -> str | None:
    """Why oneDNN's linear cannot be called here, or None."""
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    gone = [name for name, found in _ONEDNN.items() if found is None]
    return f"this torch has no mkldnn::{gone[0]}" if gone else None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``; the weight may be one that ``onednn_pack`` packed."""
    return _ONEDNN["_linear_pointwise"](x, weight, bias, "none", [], "")


def onednn_linear_add(x: Tensor, added: Tensor, weight: Tensor) -> Tensor:
    """``x W^T + added``, which may be written over."""
    return _ONEDNN["_linear_pointwise"].binary(x, added, weight, None, "add")


def onednn_pack(weight: Tensor, rows: int) -> Tensor:
    """oneDNN's own layout of a weight, for products with about this many rows."""
    return _ONEDNN["_reorder_linear_weight"](weight, rows)


# Backward passes and activation checkpointing.

_graph_task = private(
    "torch._C._current_graph_task_id", "a recomputation is told by its callers: a backward or a checkpoint's"
)
_top_hooks = private(
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "projections run one by one; a recomputation that might belong to several forwards with other adapters raises",
)
_frame_class = private(
    "torch.utils.checkpoint._CheckpointFrame",
    "a recomputation that might belong to several forwards with other adapters raises",
)
_BACKWARD = frozenset(
    (torch.autograd.backward.__code__, torch.autograd.grad.__code__, CheckpointFunction.backward.__code__)
)
_CHECKPOINTS = CheckpointFunction.forward.__code__.co_filename


def _callers() -> Iterable[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def in_backward() -> bool:
    """Whether the autograd engine is running: there, a forward is a recomputation under activation checkpointing."""
    if _graph_task is not None:
        return _graph_task() != -1
    # On a GPU the engine's own threads have no caller of backward, but the checkpoint's hook.
    return any(c in _BACKWARD or (c.co_filename == _CHECKPOINTS and c.co_name == "unpack_hook") for c in _callers())


def in_reentrant_checkpoint() -> bool:
    """Whether a caller is an autograd function, as a reentrant checkpoint is: without gradients, and repeated."""
    return any(code.co_name == "forward" and code.co_varnames[:1] == ("ctx",) for code in _callers())


def unseen_checkpoints() -> int:
    """How many checkpoints are open that put no hooks on saved tensors, since nothing is saved without gradients."""
    if torch.is_grad_enabled():
        return 0
    return sum(c.co_filename == _CHECKPOINTS and c.co_name in ("checkpoint", "forward") for c in _callers())


# The innermost hooks on saved tensors, those of non-reentrant checkpointing among them; None without any. Where torch
# does not tell, what is equal to nothing else: there may be a checkpoint anywhere.
saving_hooks: Callable[[], Any] = (lambda: (object(),)) if _top_hooks is None else functools.partial(_top_hooks, False)


def checkpoint_frame(hooks: Any) -> Any:
    """What identifies one non-reentrant checkpoint, from its hooks in the forward and in the recomputation alike."""
    if _frame_class is None:
        return None
    pack = getattr(hooks[0], "_torchdynamo_orig_callable", hooks[0])
    for cell in getattr(pack, "__closure__", None) or ():
        held = cell.cell_contents
        held = held() if isinstance(held, weakref.ref) else held
        if isinstance(held, _frame_class):
            return held
    return None


# Modules.

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_has_hooks = private_attributes("torch.nn.Module", nn.Module(), _HOOKS, "projections run one by one")
private_attributes("torch.nn.Module", nn.Module(), _FLAGS, "hooks that are taken off leave their flags behind")
private_attributes("torch.nn.Module.state_dict", nn.Module().state_dict(), ("_metadata",),
                   "load_checkpoint refuses a model whose adapters have all rank 0")  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    """Whether a module may have hooks on its forward or backward."""
    return bool(
        not _has_hooks
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def forward_hooks(module: nn.Module) -> tuple[Any, Any]:
    """The module's hooks before and after its forward; where torch does not tell, what counts as one."""
    return (module._forward_pre_hooks, module._forward_hooks) if _has_hooks else ((None,), (None,))


def metadata_of_root(state: OrderedDict[str, Tensor], values: dict[str, Any]) -> OrderedDict[str, Tensor]:
    """The state dict, with ``values`` for the hooks of the module that loads it; for no other module."""
    state._metadata = OrderedDict({"": values})
    return state


def remove_forward_hooks(module: nn.Module, unwanted: Callable[[Any], bool]) -> None:
    """Take the forward hooks off a module for which ``unwanted`` is true."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(module, name, {})
        for key in [key for key, hook in hooks.items() if unwanted(hook)]:
            del hooks[key]
            for flag in _FLAGS:
                getattr(module, flag, {}).pop(key, None)


def inside_compiled(module: nn.Module) -> nn.Module | None:
    """The module that ``torch.compile`` wrapped as this one, or None."""
    inner = getattr(module, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return inner
    return next(module.children()) if type(module).__name__ == "OptimizedModule" else None


def scale_of(scaler: Any) -> Tensor | None:
    """What a ``GradScaler`` multiplies the loss by, not read back from its device; None before its first loss."""
    if hasattr(scaler, "_scale"):
        return scaler._scale
    return torch.tensor(scaler.get_scale(), dtype=torch.float64)  # waits for the device


def set_requires_grad(parameters: Iterable[torch.Tensor], learns: bool) -> None:
    """``requires_grad_`` that compiled models notice.

    torch 2.11 goes on with code that was compiled for what had gradients before (pytorch issue 139476): parameters that
    are let go would get none. There everything that was compiled is dropped; 2.13 compiles again by itself.
    """
    changed = [p for p in parameters if p.requires_grad is not learns]
    for parameter in changed:
        parameter.requires_grad_(learns)
    if changed and torch.__version__ < (2, 13) and "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _later_names() -> list[PrivateName]:
    """Names of classes that are expensive to import: looked up when they are asked for."""
    compiled = torch.compile(nn.Identity(), backend="eager")
    scaler = torch.amp.GradScaler("cpu")
    return [
        PrivateName("OptimizedModule._orig_mod", hasattr(compiled, "_orig_mod"), "the wrapper's only child is it"),
        PrivateName("GradScaler._scale", hasattr(scaler, "_scale"), "get_scale() is asked, which waits for the device"),
    ]


def private_names() -> list[PrivateName]:
    """Every private name of torch that is used here."""
    return [*NAMES, *_later_names()]
