"""The autograd node in C++ does what the one in Python does, bit for bit."""

import copy
import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.nn import adapter
from fastlora.ops import bound
from fastlora.ops.node import NODE, REASON

pytestmark = pytest.mark.skipif(NODE is None, reason=str(REASON))
K = 24


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(K, n) for n in (16, 8, 8))

    def forward(self, x):
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


def model(dtype=torch.float32, **config):
    torch.manual_seed(0)
    built = Attention().to(dtype)
    fastlora.inject(built, fastlora.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], **config))
    with torch.no_grad():
        for name, p in built.named_parameters():
            if "lora_B" in name:
                p.normal_()
    return built


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(3, 5, K, dtype=dtype, requires_grad=True)


def gradients(built, x, run=None, times=3):
    """Of several steps: what the first ones learn is used by the others."""
    found = []
    for step in range(times):
        torch.manual_seed(step)
        x.grad = None
        built.zero_grad()
        (run or (lambda: sum(y.square().sum() for y in built(x)).backward()))()
        found += [x.grad, *[p.grad for p in built.parameters()]]
    return found


def in_python(monkeypatch):
    monkeypatch.setattr(bound, "NODE", None)
    monkeypatch.setattr(adapter, "NODE", None)


def same(monkeypatch, act):
    """What ``act`` gives with the node in C++ and in Python."""
    mine = act()
    in_python(monkeypatch)
    theirs = act()
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


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


KINDS = ("grad_sq", "act_var")


def tracked(**config):
    """A model with statistics, past the calls that plan it; its tracker and the leaves that they are counted in."""
    built, x = model(**config), inputs()
    tracker = fastlora.track(built, statistics=KINDS, every=1)
    gradients(built, x)
    tracker.step()
    probes = [layer.probes["default"] for layer in tracker.layers.values()]
    return built, x, tracker, [leaf for probe in probes for leaf in (*probe.Z.values(), probe.V)]


def squares(built, x):
    return sum(y.square().sum() for y in built(x))


def test_statistics_take_no_edge_of_the_graph():
    built, x, tracker, leaves = tracked()
    y = built(x)
    assert len(y[0].grad_fn.next_functions) == 7  # x, three A and three B
    sum(out.sum() for out in y).backward()
    assert None not in [leaf.grad for leaf in leaves]
    tracker.close()


@pytest.mark.parametrize("how", ["often", "named", "grad", "again", "frozen", "inside", "one output"])
def test_statistics_are_counted_as_leaves_of_the_graph_are(monkeypatch, how):
    def act():
        built, x, tracker, leaves = tracked()
        factors = [p for p in built.parameters() if p.requires_grad]
        if how == "frozen":
            for p in factors:
                p.requires_grad_(False)
        y = squares(built, x)
        if how == "often":
            for _ in range(3):
                y.backward(retain_graph=True)
            squares(built, x).backward()
        elif how == "named":
            y.backward(inputs=factors[:1])
        elif how == "grad":
            torch.autograd.grad(y, [x, *factors])
        elif how == "again":
            y.backward(create_graph=True)
            squares(built, x).backward()
        elif how == "one output":
            built(x)[1].sum().backward()
        elif how == "inside":  # a backward inside of a backward
            (checkpoint(lambda t: torch.cat(built(t), -1), x, use_reentrant=True).square().sum() + y).backward()
        else:
            y.backward()
        found = [None if leaf.grad is None else leaf.grad.detach().clone() for leaf in leaves]
        assert (how in ("named", "grad")) == all(grad is None for grad in found)
        tracker.close()
        return [*found, *[None if t.grad is None else t.grad.detach() for t in (x, *factors)]]

    same(monkeypatch, act)


def test_a_gradient_of_a_leaf_is_nobody_else_s():
    built, x, tracker, leaves = tracked()
    y = squares(built, x)
    y.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad.zero_()
        leaf.grad = None
    y.backward()
    assert all(torch.equal(leaf.grad, grad) and grad.any() for leaf, grad in zip(leaves, first, strict=True))
    tracker.close()


def test_backwards_of_several_threads_add_up():
    built, x, tracker, leaves = tracked()
    graphs = [squares(built, x.detach().clone().requires_grad_()) for _ in range(24)]
    for leaf in leaves:
        leaf.grad = None
    graphs[0].backward(retain_graph=True)
    one = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda graph: graph.backward(), graphs))
    for leaf, grad in zip(leaves, one, strict=True):
        torch.testing.assert_close(leaf.grad, 24 * grad)
    tracker.close()


def test_a_second_backward_is_refused_as_torch_refuses_it():
    built, x = model(), inputs()
    gradients(built, x)
    y = squares(built, x)
    y.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        y.backward()
    y = built(x)[0]
    torch.autograd.grad(y.sum(), x)
    with pytest.raises(RuntimeError, match="a second time"):
        y.grad_fn(torch.ones_like(y), None, None)


@pytest.mark.parametrize("watched", ["tensor", "accumulated", "accumulator", "output", "node"])
def test_hooks_of_leaves_outputs_and_nodes_run(monkeypatch, watched):
    def act():
        built, x, tracker, _ = tracked()
        A, seen = built.k_proj.lora_A.default.weight, []
        note = lambda grad: seen.append(grad.detach().clone())  # noqa: E731
        if watched == "tensor":
            A.register_hook(lambda grad: note(grad) or 2 * grad)
        elif watched == "accumulated":
            A.register_post_accumulate_grad_hook(lambda p: note(p.grad))
        elif watched == "accumulator":
            kept = A.view_as(A).grad_fn.next_functions[0][0]  # as data-parallel training keeps it
            kept.register_hook(lambda *_: note(A.grad))
        A.grad = None
        y = built(x)
        if watched == "output":
            y[1].retain_grad()
            y[1].register_hook(note)
        elif watched == "node":
            y[0].grad_fn.register_prehook(lambda dy: note(dy[0]))
            y[0].grad_fn.register_hook(lambda given, _: note(given[2]))
        sum(out.square().sum() for out in y).backward()
        assert seen
        tracker.close()
        return [*seen, A.grad, *([y[1].grad] if watched == "output" else [])]

    same(monkeypatch, act)
