"""Statistics are counted by the node as if their leaves were in the graph; hooks, threads and second backwards."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.node_help import gradients, inputs, model, same
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.ops.node import NODE, REASON

pytestmark = pytest.mark.skipif(NODE is None, reason=str(REASON))
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
