"""The autograd node in C++ does what the one in Python does, bit for bit."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from support.node_help import gradients, in_python, inputs, model, same
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.ops import bound
from fastlora.ops.node import NODE, REASON

pytestmark = pytest.mark.skipif(NODE is None, reason=str(REASON))
CASES = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
    "dropout": {"lora_dropout": 0.3},
    "packed": {"prepack": True},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_node_in_python(monkeypatch, case):
    options = CASES[case]
    same(monkeypatch, lambda: gradients(model(**options).train(), inputs(options.get("dtype", torch.float32))))


@pytest.mark.parametrize("statistics", [("fisher",), ("grad_sq",), ("fisher", "act_var")])
def test_statistics_are_those_of_the_node_in_python(monkeypatch, statistics):
    def act():
        built, x, found = model(), inputs(), []
        with fastlora.track(built, statistics=statistics, every=1) as tracker:
            for _ in range(3):
                found += gradients(built, x, times=1)
                tracker.step()
            found += [torch.tensor(list(tracker.scores(name).values())) for name in statistics]
        return found

    same(monkeypatch, act)


@pytest.mark.parametrize("part", ["x", "A", "B", "some outputs", "one output", "no output"])
def test_only_what_is_asked_for(monkeypatch, part):
    def act():
        built, x = model(), inputs()
        x.requires_grad_(part not in ("A", "B"))
        if part in ("x", "A", "B"):
            for name, p in built.named_parameters():
                if "lora_" in name:
                    p.requires_grad_(f"lora_{part}" in name)
        asked = {"some outputs": (0, 2), "one output": (1,), "no output": ()}.get(part, (0, 1, 2))

        def run():
            y = built(x)
            total = sum((y[i].square().sum() for i in asked), start=(0 * x).sum() if part == "no output" else 0)
            total.backward()

        return gradients(built, x, run)

    same(monkeypatch, act)


def test_twice_through_one_graph_and_through_the_gradient(monkeypatch):
    def act():
        built, x = model(torch.float64), inputs(torch.float64)
        leaves = [x, *[p for p in built.parameters() if p.requires_grad]]
        y = sum(y.square().sum() for y in built(x))
        found = [g for _ in range(2) for g in torch.autograd.grad(y, leaves, retain_graph=True)]
        slopes = torch.autograd.grad(y, leaves, create_graph=True)
        return [*found, *torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves)]

    same(monkeypatch, act)


def test_batched_gradients(monkeypatch):
    def act():
        built, x = model(torch.float64), inputs(torch.float64)
        y = built(x)[0]
        directions = torch.randn(4, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
        return torch.autograd.grad(y, [x, built.q_proj.lora_A.default.weight], directions, is_grads_batched=True)

    same(monkeypatch, act)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(monkeypatch, reentrant):
    def act():
        built, x = model(lora_dropout=0.2).train(), inputs()

        def run():
            y = checkpoint(lambda t: torch.cat(built(t), -1), x, use_reentrant=reentrant)
            y.square().sum().backward()

        return gradients(built, x, run)

    same(monkeypatch, act)


def test_saved_tensors_go_through_hooks():
    built, x = model(), inputs()
    gradients(built, x)
    packed, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t) or t.clone(), lambda t: unpacked.append(t) or t
    ):
        y = built(x)
    sum(out.sum() for out in y).backward()
    assert len(packed) == len(unpacked) >= 8  # x, h, A and B


def test_a_weight_or_a_factor_that_changed_in_between_is_refused():
    for name, words in (
        ("q_proj.weight", "weight: expected as it was"),
        ("q_proj.lora_A.default.weight", "modified by"),
    ):
        built, x = model(), inputs()
        gradients(built, x)
        y = sum(out.sum() for out in built(x))
        with torch.no_grad():
            built.get_parameter(name).mul_(2)
        with pytest.raises(RuntimeError, match=words):
            y.backward()


def test_a_weight_that_was_swapped_is_noticed():
    built, x = model(), inputs()
    gradients(built, x)
    y = sum(out.sum() for out in built(x))
    weight = built.q_proj.weight
    torch.utils.swap_tensors(weight, torch.nn.Parameter(torch.randn_like(weight), requires_grad=False))
    with pytest.raises(RuntimeError, match="weight: expected as it was"):
        y.backward()


def test_an_error_of_python_s_backward_is_python_s(monkeypatch):
    built, x = model(torch.float64), inputs(torch.float64)
    gradients(built, x)

    def fail(*arguments):
        raise KeyError("of its own")

    monkeypatch.setattr(bound.BoundCall, "differentiated", fail)
    with pytest.raises(KeyError, match="of its own"):
        sum(y.sum() for y in built(x)).backward()


@pytest.mark.parametrize("gradients_too", [True, False])
def test_forward_mode(gradients_too):
    built, x = model(torch.float64), inputs(torch.float64)
    gradients(built, x)
    direction = torch.randn_like(x)
    with torch.set_grad_enabled(gradients_too), torch.autograd.forward_ad.dual_level():
        found = built(torch.autograd.forward_ad.make_dual(x.detach(), direction))
        tangents = [torch.autograd.forward_ad.unpack_dual(y).tangent for y in found]
    for tangent, after, before in zip(tangents, built(x + direction), built(x), strict=True):
        torch.testing.assert_close(tangent, after - before)


@pytest.mark.usefixtures("library_matmul")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("native", [True, False])
def test_tangents_of_gradients(monkeypatch, dtype, native):
    if not native:
        in_python(monkeypatch)
    built, x = model(dtype), inputs(dtype)
    gradients(built, x)
    y, leaves = torch.cat(built(x), dim=-1), [x, built.q_proj.lora_A.default.weight, built.q_proj.lora_B.default.weight]
    dy, direction = torch.randn_like(y), torch.randn_like(y)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(dy, direction)
        found = torch.autograd.grad(y, leaves, dual, retain_graph=True)
        tangents = [torch.autograd.forward_ad.unpack_dual(gradient).tangent for gradient in found]
    torch.testing.assert_close(tangents, list(torch.autograd.grad(y, leaves, direction)))


def test_gradients_under_vmap():
    built, x = model(torch.float64), inputs(torch.float64)
    gradients(built, x)
    y = built(x)[0]

    def gradient(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    directions = torch.randn(4, *y.shape, dtype=y.dtype)
    torch.testing.assert_close(torch.vmap(gradient)(directions), torch.stack([gradient(dy) for dy in directions]))


@pytest.mark.parametrize("lazy", ["x", "dy"])
def test_a_sign_that_only_the_dispatcher_knows_goes_python_s_way(monkeypatch, lazy):
    built, x = model(), inputs()
    gradients(built, x)
    calls, differentiated = [], bound.BoundCall.differentiated
    monkeypatch.setattr(
        bound.BoundCall, "differentiated", lambda self, *given: calls.append(0) or differentiated(self, *given)
    )
    parameter = built.q_proj.lora_A.default.weight

    def gradient(x, turn):
        y = built.q_proj(x)
        return torch.autograd.grad(y, parameter, turn(torch.ones_like(y)))[0]

    def turned(t):
        return torch.complex(t, -t).conj().imag  # t, stored as -t

    expected = gradient(x.detach(), lambda dy: dy)
    assert not calls
    found = gradient(turned(x.detach()), lambda dy: dy) if lazy == "x" else gradient(x.detach(), turned)
    assert calls and turned(x).is_neg() and torch.equal(found, expected)


def _attribute(built):
    built.q_proj.lora_A.default.weight.owner = built


def _hook(built):
    built.q_proj.lora_A.default.register_forward_hook(lambda *_: built and None)


@pytest.mark.parametrize("refer", [_attribute, _hook])
def test_a_model_that_its_factors_refer_to_is_freed(refer):
    built, x = model(), inputs()
    refer(built)
    gradients(built, x)
    alive = weakref.ref(built)
    del built
    gc.collect()
    assert alive() is None


def test_a_parameter_can_be_swapped():
    built, x = model(), inputs()
    gradients(built, x)
    parameter = built.q_proj.lora_A.default.weight
    torch.utils.swap_tensors(parameter, torch.nn.Parameter(torch.randn_like(parameter)))
    assert torch.equal(built(x)[0], copy.deepcopy(built)(x)[0])


def _tripled(module):
    module._parameters = {
        name: None if p is None else torch.nn.Parameter(3 * p.detach(), p.requires_grad)
        for name, p in module._parameters.items()
    }


def _other(layer):
    side = copy.deepcopy(layer.lora_A)
    _tripled(side.default)
    return side


def _other_side(layer):
    layer.lora_A = _other(layer)


def _other_modules(layer):
    layer.lora_A._modules = _other(layer)._modules


@pytest.mark.parametrize(
    "replace", [_tripled, lambda layer: _tripled(layer.lora_A.default), _other_side, _other_modules]
)
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_dicts_that_are_replaced_are_noticed(monkeypatch, replace, native, grouped):
    if not native:
        in_python(monkeypatch)
    built, x = model(), inputs()
    run = (lambda m: m(x)[0]) if grouped else (lambda m: m.q_proj(x))
    for _ in range(2):
        before = run(built)
    replace(built.q_proj)
    assert torch.equal(run(built), run(copy.deepcopy(built))) and not torch.equal(run(built), before)


class TestPending:
    def test_until_the_backward(self):
        built, x = model(), inputs()
        gradients(built, x)
        router = built.q_proj.router
        assert not router.awaits_backward("default")
        y = built(x)
        assert router.awaits_backward("default")
        sum(out.sum() for out in y).backward()
        assert not router.awaits_backward("default")

    def test_until_the_graph_is_gone(self):
        built, x = model(), inputs()
        gradients(built, x)
        gc.disable()
        try:
            y = built(x)
            assert built.q_proj.router.awaits_backward("default")
            del y
            assert not built.q_proj.router.awaits_backward("default")
        finally:
            gc.enable()

    def test_without_a_graph_nothing_waits(self):
        built, x = model(), inputs()
        gradients(built, x)
        with torch.no_grad():
            y = built(x)
        assert not y[0].requires_grad and not built.q_proj.router.awaits_backward("default")

    def test_behind_a_view_of_a_subclass(self):
        class Named(torch.Tensor):
            pass

        built, x = model(), inputs()
        weight = built.q_proj.weight.detach().as_subclass(Named)
        built.q_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        y = built.q_proj(x)
        assert built.q_proj.router.awaits_backward("default")
        y.sum().backward()
        assert not built.q_proj.router.awaits_backward("default")

    def test_of_python_s_nodes(self, monkeypatch):
        in_python(monkeypatch)
        self.test_until_the_backward()
        self.test_until_the_graph_is_gone()


def test_another_torch_s_node_is_not_used():
    code = """
import torch
import fastlora._node as built
built.torch_version = "1.0.0"
from fastlora.ops import node
assert node.NODE is None and "built for torch 1.0.0" in node.REASON, node.REASON
"""
    subprocess.run([sys.executable, "-c", code], check=True)
