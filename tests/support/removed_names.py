"""Trains adapted layers in a torch that lacks one of its private names: a process for each name, forked from this one.

Prints a JSON line a name: how it was taken away, what went wrong (null: every number was right), and which names
``torch_compat`` then reports as gone.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import json
import operator
import os
import pathlib
import sys
import traceback
from typing import Any

import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

COMPAT = "fastlora._utils.torch_compat"
# torch's own code reads these while it runs: they are gone while fastlora looks them up, and back afterwards.
NEEDED_BY_TORCH = {
    "torch._C._get_tracing_state", "torch._C.DispatchKey", "torch._C._current_graph_task_id",
    "torch.utils.checkpoint._CheckpointFrame", "torch.compiler._is_exporting_flag",
}  # fmt: skip


class Lacking:
    """An object without one attribute."""

    def __init__(self, whole: Any, name: str):
        self._whole, self._name = whole, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._whole, name)


def owner_of(name: str) -> tuple[Any, str]:
    *path, last = name.split(".")[1:]
    return functools.reduce(getattr, path, torch), last


def take_away(name: str) -> str:
    """Import fastlora where torch has no ``name``; how that was done."""
    if name.startswith("torch.ops."):
        library, last = name.split(".")[2:4]
        setattr(torch.ops, library, Lacking(getattr(torch.ops, library), last))
        return "replaced"
    try:
        owner, last = owner_of(name)
        kept = owner.__dict__[last]
        delattr(owner, last)
    except (AttributeError, KeyError, TypeError):
        hide(name.rpartition(".")[2])
        return "hidden"
    if name in NEEDED_BY_TORCH:
        import fastlora.api  # noqa: F401  looks its names up

        setattr(owner, last, kept)
        return "gone at import"
    return "deleted"


def hide(name: str) -> None:
    """``torch_compat`` that finds no attribute of this name: torch could not do without it."""
    root = pathlib.Path(importlib.util.find_spec("fastlora").origin).parent
    spec = importlib.util.spec_from_file_location(COMPAT, root / "_utils" / "torch_compat.py")
    module = importlib.util.module_from_spec(spec)

    def getattr_(owner: Any, wanted: str, *default: Any) -> Any:
        return builtins.getattr(owner, "\0" if wanted == name else wanted, *default)

    module.getattr, module.hasattr = getattr_, lambda owner, wanted: wanted != name and hasattr(owner, wanted)
    sys.modules[COMPAT] = module
    spec.loader.exec_module(module)


class Everything(TorchDispatchMode):
    """Sees every operator, so that none may be called past the dispatcher."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Attention(nn.Module):
    """Three projections of one input, as a group."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.q(x)) * self.k(x) + self.v(x)


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))


def adapted(**fields: Any) -> Any:
    import fastlora

    torch.manual_seed(1)
    model = fastlora.inject(Attention(), fastlora.LoraConfig(r=2, target_modules="qkv", **fields))
    fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=3, target_modules="qkv"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def by_formula(model: Any, names: list[str], x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients of every factor when row i runs with adapter ``names[i]``, in plain float64."""
    leaves = {n: p.detach().double().requires_grad_("lora" in n) for n, p in model.named_parameters()}

    def linear(module: str, row: torch.Tensor, name: str) -> torch.Tensor:
        A, B = (leaves[f"{module}.lora_{f}.{name}.weight"] for f in "AB")
        scale = model.get_submodule(module).adapter_specs[name].scale["weight"]
        return F.linear(row, leaves[f"{module}.weight"], leaves[f"{module}.bias"]) + scale * (row @ A.T @ B.T)

    rows = []
    for row, name in zip(x.double(), names, strict=True):
        q, k, v = (linear(module, row, name) for module in "qkv")
        rows.append(torch.tanh(q) * k + v)
    y = torch.stack(rows)
    y.square().sum().backward()
    return y.detach(), {n: p.grad for n, p in leaves.items() if p.grad is not None}


def close(found: torch.Tensor, exact: torch.Tensor, rtol: float = 1e-5) -> None:
    error = (found.double() - exact.double()).abs().max() / exact.abs().max()
    assert error <= rtol, f"error {error:.2g}, allowed {rtol:.2g}"


def check_step(model: Any, names: list[str], run: Any, rtol: float = 1e-5) -> None:
    """One forward, backward and step against the formula."""
    exact, grads = by_formula(model, names, X)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    y = run()
    close(y, exact, rtol)
    y.float().square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in grads:
            close(before[name] - parameter.detach(), 0.1 * grads[name], max(100 * rtol, 1e-4))


def plain() -> None:
    model = adapted()
    check_step(model, ["default"] * 6, lambda: model(X))


def under_a_mode() -> None:
    model = adapted()
    with Everything():
        check_step(model, ["default"] * 6, lambda: model(X))


def autocast() -> None:
    model = adapted()

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(X)
        assert y.dtype == torch.bfloat16
        return y

    exact, grads = by_formula(model, ["default"] * 6, X)
    y = run()
    close(y, exact, 0.02)
    y.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in grads:
            close(parameter.grad, grads[name], 0.05)


def checkpoints() -> None:
    import fastlora

    for reentrant in (False, True):
        model, names = adapted(), ["b", "default", "b", "b", "default", "b"]

        def run(model=model, names=names, reentrant=reentrant) -> torch.Tensor:
            x = X.clone().requires_grad_(reentrant)
            with fastlora.use_adapters(model, names):
                return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

        check_step(model, names, run)


def statistics() -> None:
    """Exact norms of the weights' gradients, of a scaled loss."""
    import fastlora

    model = adapted()
    fastlora.set_adapter(model, "b")
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    with fastlora.track(model, estimator="exact", every=1, adapter="b") as tracker:
        scaler.scale(model(X).square().sum()).backward()
        tracker.step(scaler=scaler)
        found = tracker.scores("grad_sq")
    weights = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    y = torch.func.functional_call(Attention().double(), merged(model, weights), (X.double(),))
    y.square().sum().backward()
    for module in "qkv":
        close(torch.tensor(found[module]), weights[f"{module}.weight"].grad.square().sum(), 1e-4)


def merged(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base's parameters with the update of adapter b in the weights."""
    found = {}
    for module in "qkv":
        scale = model.get_submodule(module).adapter_specs["b"].scale["weight"]
        A, B = (weights[f"{module}.lora_{f}.b.weight"] for f in "AB")
        found[f"{module}.weight"] = weights[f"{module}.weight"] + scale * (B @ A)
        found[f"{module}.bias"] = weights[f"{module}.bias"]
    return found


def lists() -> None:
    """What runs over lists of tensors: one launch, or one after another."""
    from fastlora._utils import torch_compat
    from fastlora.ops.multi_tensor import output_variances
    from fastlora.ops.penalty import weighted_penalty
    from fastlora.training import Diagnostics

    a, b = [torch.tensor([3.0, 4.0]), torch.tensor([2.0])], [torch.tensor([1.0, 2.0]), torch.tensor([4.0])]
    assert [t.tolist() for t in torch_compat.multiply_each(a, b)] == [[3.0, 8.0], [8.0]]
    assert [t.tolist() for t in torch_compat.apart([a[0][:1], a[1]])] == [[1.0 * a[0][0].item()], a[1].tolist()]
    assert [t.tolist() for t in torch_compat.divide_each(a, torch.tensor(2.0))] == [[1.5, 2.0], [1.0]]
    assert [t.tolist() for t in torch_compat.subtract_each(a, b)] == [[2.0, 2.0], [-2.0]]
    assert [float(t) for t in torch_compat.norm_of_each(a, 2)] == [5.0, 2.0]
    torch_compat.add_to_each_(b, a)
    assert [t.tolist() for t in b] == [[4.0, 6.0], [6.0]]
    sums = torch.tensor([[2.0, 4.0, 2.0], [4.0, 16.0, 2.0]], dtype=torch.float32)
    close(output_variances([sums], [[1, 1]]), torch.tensor([1.0, 4.0]))
    A, B = torch.ones(1, 2, requires_grad=True), torch.ones(3, 1, requires_grad=True)
    close(weighted_penalty([A], [B], [2.0], [torch.tensor(0.5)], 0.1), torch.tensor(0.1 * 0.5 * 4 * 6))
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([{"params": [weight], "name": "lora"}], lr=0.5)
    diagnostics = Diagnostics(optimizer)
    weight.square().sum().backward()
    optimizer.step()
    found = diagnostics.epoch()["lora"]
    assert (found.gradient_norm, found.update_norm) == (10.0, 5.0), found


def wrappers() -> None:
    """Names under ``torch.compile``'s wrapper, hooks that are taken off, and conditions on a device."""
    from fastlora._utils import torch_compat

    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: torch.zeros(()), always_call=True)
    torch_compat.remove_forward_hooks(hooked, lambda hook: True)
    if torch_compat.has_hooks(nn.Linear(2, 2)):
        return  # hooks cannot be seen: nothing to take off
    assert hooked(torch.ones(1, 2)).shape == (1, 2)
    torch_compat.assert_async(torch.tensor(True), "right")
    try:
        torch_compat.assert_async(torch.tensor(False), "some are wrong")
    except RuntimeError as error:
        assert "some are wrong" in str(error)
    else:
        raise AssertionError("a false condition passed")
    y = torch.ones(4)[1:]
    assert torch_compat.as_no_view(y).add_(1).tolist() == [2.0, 2.0, 2.0]


def state_dicts() -> None:
    """A state dict without the base, taken and loaded twice."""
    from fastlora.integrations.adapters_only import adapters_only

    model = adapted()
    for _ in range(2):
        with adapters_only(model):
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert state and all("lora_" in name for name in state)
        y = model(X)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0 if parameter.requires_grad else 0.0)
        model.load_state_dict(state)
        assert torch.equal(model(X), y)


def compiled() -> None:
    from fastlora._utils.distributed import unwrapped

    model = adapted()
    assert unwrapped(torch.compile(model, backend="eager")) is model


SCENARIOS = (plain, under_a_mode, autocast, checkpoints, statistics, lists, wrappers, state_dicts)


def tried(name: str) -> dict[str, Any]:
    how = take_away(name) if name else "nothing"
    import fastlora  # noqa: F401
    from fastlora._utils import torch_compat

    for scenario in (*SCENARIOS, *((compiled,) if "_orig_mod" in name else ())):
        try:
            scenario()
        except Exception:
            return {"name": name, "how": how, "wrong": f"{scenario.__name__}: {traceback.format_exc()}"}
    # The names that are looked up late import much of torch, which may not survive without this one.
    names = torch_compat.NAMES if name in map(operator.attrgetter("name"), torch_compat.NAMES) else None
    gone = [n.name for n in names or torch_compat.private_names() if not n.there]
    return {"name": name, "how": how, "wrong": None, "gone": gone}


def forked(name: str) -> dict[str, Any]:
    """``tried`` in a process that is thrown away."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            found = tried(name)
        except BaseException:
            found = {"name": name, "how": "", "wrong": traceback.format_exc()}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(text) if text else {"name": name, "how": "", "wrong": f"the process died: status {status}"}


if __name__ == "__main__":
    for one in sys.argv[1:]:
        sys.stdout.write(json.dumps(forked(one)) + "\n")
        sys.stdout.flush()
