"""What is asked of a family: roles, slices, gradients, statistics, files for and of PEFT, checkpointing, compile.

Everything is compared in float64 with the model whose weights are W + s B A, or with PEFT.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastlora
from fastlora.model.modules import (
    attention_blocks,
    features,
    fused_layouts,
    is_linear,
    is_projection,
    named_targets,
    refusal,
    role_targets,
)
from fastlora.nn.adapter import Slices
from fastlora.nn.experts import ExpertProjection
from fastlora.nn.linear import Linear, adapted_layers, matrix_key
from fastlora.nn.pointwise import Pointwise

Run = Callable[[nn.Module], Any]
OK, NONE = "ok", "-"
_CLOSE = dict(rtol=1e-7, atol=1e-9)
_ACTIVATIONS = {"silu", "gelu", "relu", "sigmoid", "tanh", "gelu_", "silu_", "relu_", "hardswish", "leaky_relu"}


def floats(out: Any) -> list[Tensor]:
    """Every floating tensor of an output, in order."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    entries = out.values() if isinstance(out, Mapping) else out if isinstance(out, (list, tuple)) else ()
    return [tensor for entry in entries for tensor in floats(entry)]


def loss_of(out: Any) -> Tensor:
    """A scalar that every entry of every output moves, by a factor of its own."""
    generator, total = torch.Generator().manual_seed(7), torch.zeros((), dtype=torch.float64)
    for y in floats(out):
        weights = torch.rand(y.shape, generator=generator, dtype=torch.float64)
        if y.requires_grad:
            total = total + (weights * y + y.square()).masked_fill(~y.isfinite(), 0.0).mean()
    return total


def same(found: Any, expected: Any, what: str) -> None:
    """``AssertionError`` unless the tensors of two outputs agree in float64, relative to the largest value of each."""
    for y, z in zip(floats(found), floats(expected), strict=True):
        torch.testing.assert_close(
            y.detach(), z.detach(), rtol=_CLOSE["rtol"], equal_nan=True,
            atol=1e-8 * float(z.detach().nan_to_num(0, 0, 0).abs().max() if z.numel() else 0) + 1e-12,
            msg=lambda text: f"{what}: {' '.join(text.split())}",
        )  # fmt: skip


def _as(found: Any, expected: Any) -> bool:
    try:
        same(found, expected, "")
    except AssertionError:
        return False
    return True


def randomised(model: nn.Module) -> nn.Module:
    """B of every adapter drawn anew, alike for models of the same structure."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for b in layer.lora_B.parameters():
                b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return model


def adapted(base: nn.Module, role: str) -> nn.Module:
    """A copy of ``base`` in which a role has adapters that do something."""
    refused, patterns = refusals(base, role), {}
    modules = named_targets(base)
    for name in role_targets(base, role):
        if name not in refused and min(features(modules[name])) < 2:
            patterns[name] = 1
    config = fastlora.LoraConfig(
        r=2, lora_alpha=3, target_modules=role, exclude_modules=[*refused] or None, rank_pattern=patterns
    )
    return randomised(fastlora.inject(copy.deepcopy(base), config))


def refusals(base: nn.Module, role: str) -> dict[str, str]:
    """The matrices of a role that cannot be adapted, and why."""
    found = {name: refusal(base, name) for name in role_targets(base, role)}
    return {name: reason for name, reason in found.items() if reason is not None}


def factors(layer: Linear) -> Iterator[tuple[str, Any, Tensor, Tensor, float]]:
    """Slice, its rows, A, B and s of each slice that has an adapter."""
    for part in layer.slices:
        A, B = (getattr(side["default"], part) for side in (layer.lora_A, layer.lora_B))
        if A is not None:
            yield part, layer.slices.rows(part), A, B, layer.adapter_specs["default"].scale[part]


def by_hand(base: nn.Module, model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of ``base`` with W + s B A in place of each weight, and these weights [N, K] by path."""
    merged, weights = copy.deepcopy(base), {}
    for path, layer in adapted_layers(model).items():
        owner, name = at(merged, path), "weight"
        if not isinstance(owner, nn.Module):  # a parameter of its owner: of nn.MultiheadAttention, or of experts
            parent, _, leaf = path.rpartition(".")
            owner, name = at(merged, parent), leaf if isinstance(layer, ExpertProjection) else "in_proj_weight"
        stored = owner._parameters.pop(name).detach()
        transposed = layer.transposed if isinstance(layer, ExpertProjection) else type(owner).__name__ == "Conv1D"
        convolved = isinstance(layer, Pointwise)
        W = (stored.flatten(1) if convolved else (stored.mT if transposed else stored).flatten(0, -2)).clone()
        for _, rows, A, B, s in factors(layer):
            W[rows] += s * (B @ A).detach()
        weights[path] = W.requires_grad_()
        shaped = W.view(stored.mT.shape if transposed else stored.shape)
        setattr(owner, name, shaped.mT if transposed else shaped)
    return merged, weights


def at(model: nn.Module, path: str) -> Any:
    for part in path.split(".") if path else ():
        model = getattr(model, part, None)
    return model


def check_numbers(base: nn.Module, run: Run, role: str) -> tuple[str, str]:
    """Outputs and every gradient, and exact ``grad_sq``, against the weights written out."""
    model = adapted(base, role)
    merged, weights = by_hand(base, model)
    expected = run(merged)
    loss = loss_of(expected)
    if loss.requires_grad:
        loss.backward()
    with fastlora.track(model, estimator="exact") as tracker:
        out = run(model)
        if not _as(out, expected) and computes_in_float32(base, run):
            largest = max(float(y.abs().max()) for y in floats(expected))
            apart = max(float((y - z).abs().max()) for y, z in zip(floats(out), floats(expected), strict=True))
            assert apart < 1e-6 * largest, "outputs"
            return f"outputs agree to {apart / largest:.0e}: the model itself computes in float32 inside", NONE
        same(out, expected, "outputs")
        with torch.no_grad():
            plain = run(base)
        if _as(expected, plain) and not any(W.grad is not None and W.grad.any() for W in weights.values()):
            return NONE, NONE
        loss_of(out).backward()
        tracker.step()
        scores = dict(tracker.scores("grad_sq", missing="skip"))
    largest = max((float(W.grad.abs().max()) for W in weights.values() if W.grad is not None), default=0.0)
    statistics, apart = OK, 0.0
    for path, layer in adapted_layers(model).items():
        G = weights[path].grad
        for part, rows, A, B, s in factors(layer):
            if G is None:
                assert A.grad is None or not A.grad.any(), f"{path}: a gradient although the layer did not run"
                continue
            own = G[rows]
            dA, dB = (torch.zeros_like(p) if p.grad is None else p.grad for p in (A, B))  # none: an absent expert
            for name, found, exact in (("dA", dA, s * B.detach().T @ own), ("dB", dB, s * own @ A.detach().T)):
                if not torch.allclose(found, exact, rtol=1e-6, atol=1e-9 * largest + 1e-15):
                    error = float((found - exact).abs().max()) / (largest + 1e-300)
                    assert error < 1e-5 and computes_in_float32(base, run), f"{path}[{part}]: {name}"
                    apart = max(apart, error)
            key, exact = matrix_key(path, part), float(own.square().sum())
            if key not in scores and exact > 0:
                statistics = f"{key}: no value"
            elif abs(scores.get(key, 0.0) - exact) > (1e-4 if apart else 1e-6) * exact + 1e-18:
                statistics = f"{key}: {scores[key]:.3g}, exact {exact:.3g}"
    if apart:
        return f"gradients agree to {apart:.0e}: the model itself computes in float32 inside", statistics
    return OK, statistics


@torch.no_grad()
def computes_in_float32(base: nn.Module, run: Run) -> bool:
    """Whether a part of the float64 model gives float32, or nothing that float32 would not hold."""
    found: list[bool] = []

    def hook(module: nn.Module, args: tuple, out: Any) -> None:
        found.extend(y.dtype == torch.float32 or torch.equal(y, y.float().double()) for y in floats(out) if y.any())

    class Casts(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if isinstance(out, Tensor) and out.dtype == torch.float32 and isinstance(args[0] if args else 0, Tensor):
                found.append(args[0].dtype == torch.float64)
            return out

    handles = [module.register_forward_hook(hook) for module in base.modules()]
    with Casts():
        run(base)
    for handle in handles:
        handle.remove()
    return any(found)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the package warns of inside."""
    said: list[str] = []
    handler, logger, off = logging.Handler(logging.WARNING), logging.getLogger("fastlora"), logging.root.manager.disable
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logging.disable(logging.NOTSET)
    try:
        yield said
    finally:
        logging.disable(off)
        logger.removeHandler(handler)


def check_files(base: nn.Module, run: Run, role: str) -> str:
    """What PEFT makes of our file, and what we make of PEFT's."""
    import peft

    model = adapted(base, role).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = run(model)
        with _warnings() as said:
            fastlora.save(model, f"{folder}/ours")
        if said:
            return f"save says: {said[0]}"[:300]
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/ours").double().eval()
        if role == "attention" and any(isinstance(m, nn.MultiheadAttention) for m in base.modules()):
            return "PEFT applies the adapter of nn.MultiheadAttention's out_proj twice"
        found = run(theirs.base_model.model)
        if _as(found, run(base)):
            same(run(fastlora.to_peft(model).base_model.model), expected, "to_peft")
            return "PEFT's model from the file is the base model; to_peft is right"
        same(found, expected, "our file in PEFT")
        theirs.save_pretrained(f"{folder}/theirs", save_embedding_layers=False)
        again = fastlora.load(copy.deepcopy(base), f"{folder}/theirs").eval()
        same(run(again), expected, "PEFT's file here")
    return OK


class _Watch(TorchFunctionMode):
    """What attention and activations are given after ``armed``: arguments of the first call that tells slices apart."""

    def __init__(self, count: int):
        super().__init__()
        self.armed, self.closed, self.count = False, False, count
        self.scores = self.product = self.activated = self.split = None
        self.heads: list[list[Tensor]] = []  # of each attention in turn: an owner may have one over a text and an image

    def close(self) -> None:
        """Nothing counts that comes after the owner of the fused matrix."""
        self.closed, self.armed = self.closed or self.armed, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.armed:
            if name == "scaled_dot_product_attention" and self.scores is None:
                found = [*args, *[kwargs[k] for k in ("query", "key", "value") if k in kwargs]]
                self.heads.append([x.detach().clone() for x in found[:3]])
            elif name == "softmax" and self.scores is None and not self.heads:
                self.scores = args[0].detach().clone()
            elif name == "matmul" and self.product is None:
                self.product = [x.detach().clone() for x in args[:2]]
            elif name in _ACTIVATIONS and self.activated is None:
                self.activated = args[0].detach().clone()
        out = func(*args, **kwargs)
        if self.armed and self.split is None and name in ("split", "chunk", "unbind") and len(out) == self.count:
            self.split = [part.detach().clone() for part in out]
        return out


def _change(rows: Any, watch: _Watch) -> Callable[..., Any]:
    """A hook that changes some columns of one token of the first output of a layer."""

    def hook(module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        if watch.armed or watch.closed:
            return None
        watch.armed = True
        if rows is None:
            return None
        y = y.clone(memory_format=torch.contiguous_format)
        flat = y.view(-1, y.shape[-1]) if is_linear(module) else y[0].flatten(1).T
        count = flat[0, rows].shape[-1]
        flat[min(1, len(flat) - 1), rows] += 0.3 * torch.arange(1, count + 1, dtype=y.dtype).cos()
        return y

    return hook


@torch.no_grad()
def _seen(model: nn.Module, run: Run, owner: nn.Module, layer: nn.Module, count: int, rows: Any) -> _Watch:
    watch = _Watch(count)
    handles = [
        layer.register_forward_hook(_change(rows, watch)),
        owner.register_forward_hook(lambda *_: watch.close()),
    ]
    try:
        with watch:
            run(model)
    finally:
        for handle in handles:
            handle.remove()
    return watch


def check_slices(base: nn.Module, run: Run) -> str:
    """Change the rows of one slice: only what it is said to feed may move. One matrix of each kind of owner."""
    checked, kinds, unseen, base = 0, set(), [], copy.deepcopy(base)
    for module in base.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    above = {name: block.owner for block in attention_blocks(base) for name in block.layouts}
    for path, slices in fused_layouts(base).items():
        owner, layer = at(base, above.get(path, path.rpartition(".")[0])), at(base, path)
        kind = (type(owner), path.rpartition(".")[2], str(slices))
        if slices is None or kind in kinds or not is_projection(layer):
            continue
        kinds.add(kind)
        found = _slices_of(base, run, owner, layer, slices)
        checked += found == OK
        if found == NONE:
            unseen.append(path)
        elif found != OK:
            return f"{path}: {found}"
    return OK if checked else f"not run: {unseen[0]}" if unseen else NONE


def _slices_of(base: nn.Module, run: Run, owner: nn.Module, layer: nn.Module, slices: Slices) -> str:
    before = _seen(base, run, owner, layer, len(slices), None)
    if not before.closed:
        return NONE
    after = {part: _seen(base, run, owner, layer, len(slices), slices.rows(part)) for part in slices}
    if not is_linear(layer):
        return _split_of(before, after)
    found = {part: _moved(part, before, watch) for part, watch in after.items()}
    if type(owner).__name__ == "ChannelAttention":  # softmax(k^T v) q^T: its q is what others call v
        return OK if found["q"] == {"v"} and {"v"} not in (found["k"], found["v"]) else "q moves the scores"
    if found.get("q") == {"v"} and found.get("v") == {"v"}:
        return OK if found["k"] not in (None, {"v"}) else "no slice moves the softmax over keys"
    for part, moved in found.items():
        if moved not in (None, {part}):
            return f"rows of {part} move {', '.join(sorted(moved)) or 'nothing'}"
    return OK if any(moved is not None for moved in found.values()) else NONE


def _split_of(before: _Watch, after: Mapping[str, _Watch]) -> str:
    """Of convolutions: whether rows of a slice move its part alone of the forward's split, which is in this order."""
    order = [part for part in "qkv" if part in after]
    if before.split is None:
        return "no split into as many parts is seen"
    for part, watch in after.items():
        moved = [n for n, x, z in zip(order, before.split, watch.split, strict=True) if not torch.equal(x, z)]
        if moved != [part]:
            return f"rows of {part} move {', '.join(moved) or 'nothing'}"
    return OK


def _moved(part: str, before: _Watch, after: _Watch) -> set[str] | None:
    """Which slice moved, by what attention or the activation was given; None where that does not tell."""
    if part in ("gate", "up"):
        if before.activated is None:
            return None
        return {"up"} if torch.equal(before.activated, after.activated) else {"gate"}
    if part not in ("q", "k", "v"):
        return None
    if before.heads:
        calls = [zip("qkv", *pair, strict=True) for pair in zip(before.heads, after.heads, strict=True)]
        moved = [{name for name, x, z in call if not torch.equal(x, z)} for call in calls]
        return next(filter(None, moved), set())
    if before.scores is None and before.product is not None:
        q, k = (not torch.equal(x, z) for x, z in zip(before.product, after.product, strict=True))
        return {"q"} if q and not k else {"k"} if k and not q else {"q", "k"} if q else {"v"}
    if before.scores is None or before.scores.dim() < 2:
        return None
    moved = (before.scores != after.scores) & ~(before.scores.isinf() & after.scores.isinf())
    if not moved.any():
        return {"v"}
    rows, columns = (moved.any(d).double().mean() for d in (-1, -2))
    return {"q"} if rows < columns else {"k"} if columns < rows else None


@contextlib.contextmanager
def reasons(row: dict[str, Any], column: str) -> Iterator[None]:
    """An error inside goes into a column as one line."""
    try:
        yield
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a family raises is its row's reason
        row[column] = short(f"{type(error).__name__}: {error}")


_PLAIN = {
    r"(StrictDataclassClassValidationError: )?Class validation error for validator '\w+': (\w+: )?": "",
    r"ImportError: \w+ requires the (\w+) library.*": r"needs the \1 library",
    r"RuntimeError: mat1 and mat2 must have the same dtype, but got Float and Double": (
        "it casts to float32 inside, and does not run in float64"
    ),
}


def short(text: str) -> str:
    """One line of at most 160 characters, without places of one machine and listings without an order."""
    text = " ".join(text.split()).partition(" Incompatible modules:")[0]
    for pattern, plain in _PLAIN.items():
        text = re.sub(pattern, plain, text)
    return re.sub(r"'?(/[\w.-]+){2,}'?|https?:\S*|[\w-]+\.com\S*", "...", text)[:160]
