"""Several adapters on one model: which rows run with whose, sets that change, and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from support.adapters_help import IDS, NAMES, batch, gradients, model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        IDS.unsqueeze(1).expand(6, 4).contiguous(),
        IDS.repeat_interleave(4),
        ["default", "c", "b", None, "b", "default"],
    ],
    ids=["sample", "token matrix", "tokens", "names"],
)
def test_rows_run_with_their_own_adapter(ids):
    m, x = model(), batch()
    with fastlora.use_adapters(m, ids):
        y = m(x)
    for g, name in enumerate(NAMES):
        with fastlora.use_adapters(m, name):
            alone = m(x)
        assert torch.equal(y[g == IDS], alone[g == IDS])
        assert not torch.allclose(y[g != IDS], alone[g != IDS])
    with fastlora.disable_adapters(m):
        assert torch.equal(y[IDS < 0], m(x)[IDS < 0])


def factors(m, name):
    return {n: p for n, p in m.named_parameters() if f".{name}." in n}


def test_gradients_are_those_of_each_adapter_alone():
    m, x = model(), batch()
    with fastlora.use_adapters(m, IDS):
        loss = fastlora.per_adapter_mean(m(x).square().mean((1, 2)), IDS)
    loss.backward()
    got = {name: {n: p.grad for n, p in factors(m, name).items()} for name in NAMES}
    for g, name in enumerate(NAMES):
        m.zero_grad()
        with fastlora.use_adapters(m, name):
            m(x[g == IDS]).square().mean((1, 2)).mean().backward()
        for n, p in factors(m, name).items():
            torch.testing.assert_close(got[name][n], p.grad, rtol=1e-12, atol=1e-14)


def test_an_absent_adapter_has_no_gradient():
    m, x = model(), batch()
    with fastlora.use_adapters(m, torch.tensor([0, 0, 1, -1, 1, 0])):
        m(x).sum().backward()
    assert all(p.grad is None for p in factors(m, "c").values())
    assert all(p.grad is not None for name in ("default", "b") for p in factors(m, name).values())


def test_the_default_adapter_and_set_adapter():
    m, x = model(), batch()
    with fastlora.use_adapters(m, "b"):
        b = m(x)
    assert not torch.allclose(m(x), b)
    fastlora.set_adapter(m, "b")
    assert torch.equal(m(x), b)
    assert fastlora.adapter_names(m) == ["default", "b", "c"]


def test_contexts_nest_and_close_on_exceptions():
    m, x = model(), batch()
    plain = m(x)
    with fastlora.use_adapters(m, "b"):
        b = m(x)
        with fastlora.disable_adapters(m):
            base = m(x)
        with pytest.raises(ZeroDivisionError), fastlora.use_adapters(m, IDS):
            raise ZeroDivisionError
        assert torch.equal(m(x), b)
    assert torch.equal(m(x), plain)
    assert not torch.allclose(base, b)


def test_threads_have_their_own_context():
    m, x = model(), batch()
    want = {}
    for name in NAMES:
        with fastlora.use_adapters(m, name):
            want[name] = m(x)
    found, barrier = {}, threading.Barrier(3)

    def work(name):
        with fastlora.use_adapters(m, name):
            barrier.wait()
            found[name] = [m(x) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(name,)) for name in NAMES]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(y, want[name]) for name in NAMES for y in found[name])


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_checkpointing_repeats_with_the_ids_of_its_forward(reentrant):
    m, x = model(), batch().requires_grad_()

    def forward(checkpointed):
        m.zero_grad()
        with fastlora.use_adapters(m, IDS):
            y = x
            for block in m[:2]:
                y = checkpoint(block, y, use_reentrant=reentrant) if checkpointed else block(y)
            loss = m[2](y).square().sum()
        loss.backward()  # the context has closed
        return gradients(m)

    want, got = forward(False), forward(True)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-14)


def two_forwards(m, x, reentrant, other):
    losses = []
    for ids in (IDS, other):
        with fastlora.use_adapters(m, ids):
            losses.append(m[2](checkpoint(m[:2], x, use_reentrant=reentrant)).square().sum())
    return sum(losses)


def test_two_checkpointed_forwards_keep_their_own_ids():
    m, x, other = model(), batch().requires_grad_(), IDS.flip(0)
    two_forwards(m, x, False, other).backward()
    got = gradients(m)
    m.zero_grad()
    for ids in (IDS, other):
        with fastlora.use_adapters(m, ids):
            m(x).square().sum().backward()
    for name, want in gradients(m).items():
        torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-14)


def test_a_repetition_that_cannot_be_told_raises():
    m, x = model(), batch().requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be told from others with other adapters"):
        two_forwards(m, x, True, IDS.flip(0)).backward()
    m.zero_grad()
    with fastlora.use_adapters(m, IDS):
        loss = checkpoint(m, x, use_reentrant=True).square().sum()
    loss.backward()  # and the model goes on


def test_a_reference_pass_without_gradients_does_not_count():
    m, x = model(), batch().requires_grad_()
    wrapped = m.forward
    with fastlora.disable_adapters(m), torch.no_grad():
        m(x)
    m.forward = lambda x: wrapped(checkpoint(nn.Identity(), x, use_reentrant=True))
    with fastlora.use_adapters(m, "b"):
        checkpoint(m[:2], x, use_reentrant=True).square().sum().backward()
    assert all(p.grad is None for p in factors(m, "default").values())


def test_compiled_without_a_break_or_a_recompilation():
    m, x = model(torch.float32, blocks=1), batch(torch.float32)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    for ids in (IDS, IDS.flip(0), torch.tensor([2, 2, 0, 1, 0, -1])):
        with fastlora.use_adapters(m, ids):
            m.zero_grad()
            m(x).square().sum().backward()
            want = gradients(m)
            m.zero_grad()
            compiled(x).square().sum().backward()
        for name, grad in gradients(m).items():
            torch.testing.assert_close(grad, want[name])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_copies_have_their_own_contexts():
    m, x = model(), batch()
    with fastlora.use_adapters(m, "b"):
        for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            assert not torch.allclose(other(x), m(x))
            with fastlora.use_adapters(other, "b"):
                assert torch.equal(other(x), m(x))


def test_removing_leaves_the_others_and_retires_the_id():
    m, x = model(), batch()
    ids = torch.tensor([0, 2, 2, -1, 0, 0])
    with fastlora.use_adapters(m, ids):
        before = m(x)
    fastlora.delete_adapter(m, "b")
    with fastlora.use_adapters(m, ids):
        assert torch.equal(m(x), before)
    assert not factors(m, "b")
    assert fastlora.adapter_names(m) == ["default", None, "c"]
    with pytest.raises(
        ValueError, match=r"ids: expected -1 \(base only\), 0: default, 2: c, got 1 at position 2, which was removed"
    ):
        fastlora.use_adapters(m, IDS).__enter__()
    fastlora.add_adapter(m, "d", LoraConfig(r=1, target_modules="qkv"))
    assert fastlora.adapter_names(m) == ["default", None, "c", "d"]


def test_each_adapter_has_its_own_summary_ranks_tracker_files_and_merge(tmp_path):
    m, x = model(torch.float32), batch(torch.float32)
    assert fastlora.summary(m, "c").adapter_params == 2 * 1 * 16
    fastlora.set_ranks(m, {"0.query": 4}, adapter="c", reinit=True)
    assert [row.rank for row in fastlora.summary(m, "c").rows] == [4, 1]
    assert {row.rank for row in fastlora.summary(m).rows} == {2}
    with fastlora.use_adapters(m, "b"):
        b = m(x)
    fastlora.save(m, tmp_path, adapter="b")
    fresh = model(torch.float32)
    fastlora.delete_adapter(fresh, "b")
    fastlora.load(fresh, tmp_path, adapter="b")
    with fastlora.use_adapters(fresh, "b"):
        torch.testing.assert_close(fresh(x), b, rtol=0, atol=0)
    fastlora.merge(m, "b")
    torch.testing.assert_close(m(x), b)
    with pytest.raises(ValueError, match="is merged into"):
        fastlora.use_adapters(m, "c").__enter__()
    fastlora.unmerge(m)


REFUSED = {
    "unknown name": (lambda m: fastlora.use_adapters(m, "d"), r"ids: expected one of \['default', 'b', 'c'\], got 'd'"),
    "unknown in a list": (lambda m: fastlora.use_adapters(m, ["b", "defualt"]), "did you mean 'default'"),
    "unknown id": (
        lambda m: fastlora.use_adapters(m, torch.tensor([0, 3])),
        r"ids: expected -1 \(base only\), 0: default, 1: b, 2: c, got 3 at position 1",
    ),
    "id below -1": (
        lambda m: fastlora.use_adapters(m, torch.tensor([-2])),
        r"ids: expected -1 \(base only\), 0: default, 1: b, 2: c, got -2 at position 0",
    ),
    "dtype": (
        lambda m: fastlora.use_adapters(m, torch.tensor([0.0])),
        "ids: expected an int64 tensor .*, got torch.float32",
    ),
    "shape": (lambda m: fastlora.use_adapters(m, torch.tensor(0)), "ids: expected an int64 tensor"),
    "type": (lambda m: fastlora.use_adapters(m, 3), "ids: expected an int64 tensor, names, one name or ranges, got 3"),
    "seeds": (
        lambda m: fastlora.use_adapters(m, IDS, row_seeds=IDS[:2]),
        r"row_seeds: expected one for each of 6 ids, got torch\.int64 \(2,\)",
    ),
    "seed dtype": (
        lambda m: fastlora.use_adapters(m, IDS, row_seeds=IDS.float()),
        "row_seeds: expected an int64 tensor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_context_leaves_the_model_alone(name):
    m, x = model(), batch()
    before = m(x)
    call, message = REFUSED[name]
    with pytest.raises(TypeError if name == "type" else ValueError, match=message):
        call(m).__enter__()
    assert torch.equal(m(x), before)


@pytest.mark.parametrize("shape", [(5,), (6, 3), (23,)])
def test_ids_that_do_not_fit_the_batch(shape):
    m, x = model(), batch()
    with pytest.raises(ValueError, match=r"ids: .* given, but a layer sees an input of shape \(6, 4, 8\)"):
        with fastlora.use_adapters(m, torch.zeros(shape, dtype=torch.int64)):
            m(x)


BAD_SETS = {
    "same name": (
        lambda m: fastlora.add_adapter(m, "b", LoraConfig(target_modules="qkv")),
        r"name: expected one that is none of \['default', 'b', 'c'\], got 'b'",
    ),
    "dotted": (lambda m: fastlora.add_adapter(m, "a.b", LoraConfig(target_modules="qkv")), "name: expected"),
    "target": (
        lambda m: fastlora.add_adapter(m, "d", LoraConfig(target_modules=["qkx"])),
        "target_modules: expected .*, got 'qkx'",
    ),
    "rank": (lambda m: fastlora.add_adapter(m, "d", LoraConfig(r=9, target_modules="qkv")), "at most .* = 8, got 9"),
    "bias": (lambda m: fastlora.add_adapter(m, "d", LoraConfig(target_modules="qkv", bias="all")), "bias: expected"),
    "not adapted": (
        lambda m: fastlora.add_adapter(nn.Sequential(nn.Linear(2, 2)), "d", LoraConfig()), "model: has no adapters"
    ),
    "remove unknown": (lambda m: fastlora.delete_adapter(m, "d"), "name: expected one of"),
    "remove default": (lambda m: fastlora.delete_adapter(m, "default"), "runs by default; call fastlora.set_adapter"),
    "set unknown": (lambda m: fastlora.set_adapter(m, "d"), "name: expected one of"),
    "set removed": (lambda m: fastlora.set_adapter(fastlora.delete_adapter(m, "c"), "c"), "name: expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SETS)
def test_a_refused_change_leaves_the_set_alone(name):
    m = model()
    call, message = BAD_SETS[name]
    names = [n for n, _ in m.named_parameters() if name != "set removed" or ".c." not in n]
    with pytest.raises(ValueError, match=message):
        call(m)
    assert [n for n, _ in m.named_parameters()] == names


def test_ranks_and_adapters_stay_while_a_graph_is_alive():
    m, x = model(), batch()
    with fastlora.use_adapters(m, IDS):
        loss = m(x).sum()
    for change in (
        lambda: fastlora.set_ranks(m, {"0.query": 1}, adapter="c", reinit=True),
        lambda: fastlora.delete_adapter(m, "c"),
    ):
        with pytest.raises(ValueError, match="awaits its backward"):
            change()
    loss.backward()
    fastlora.set_ranks(m, {"0.query": 1}, adapter="c", reinit=True)
    with fastlora.use_adapters(m, "c"):
        y = m(x)
    del y
    fastlora.delete_adapter(m, "c")


def test_splits_must_agree():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    m = fastlora.inject(nn.Sequential(Fused()), LoraConfig(r=2, target_modules="qkv", split_qkv=True))
    with pytest.raises(ValueError, match="split_qkv: '0.qkv' is adapted as .*'q', 'k', 'v'.* already"):
        fastlora.add_adapter(m, "b", LoraConfig(r=2, target_modules=["qkv"], split_qkv=False))
    fastlora.add_adapter(m, "b", LoraConfig(r=2, target_modules=["qkv"], split_qkv=True))
    fastlora.add_adapter(m, "c", LoraConfig(r=1, target_modules=["qkv"]))
    assert m[0].qkv.ranks("c") == {"q": 1, "k": 1, "v": 1}


def test_a_parameter_group_for_each_adapter():
    m = model()
    groups = fastlora.param_groups(m, lr_lora={"default": 0.1, "b": 0.2, "c": 0.3})
    assert [(g["name"], g["adapter"], g["lr"]) for g in groups] == [
        ("lora", "default", 0.1), ("lora", "b", 0.2), ("lora", "c", 0.3)
    ]  # fmt: skip
    for group in groups:
        assert {id(p) for p in group["params"]} == {id(p) for p in factors(m, group["adapter"]).values()}
    with pytest.raises(ValueError, match=r"lr_lora: expected a rate for each of \['default', 'b', 'c'\], got \['b'\]"):
        fastlora.param_groups(m, lr_lora={"b": 0.2})


def test_per_adapter_mean_is_the_sum_of_means():
    losses, ids = torch.tensor([1.0, 2.0, 4.0, 8.0, 3.0]), torch.tensor([0, 1, 0, -1, 1])
    assert fastlora.per_adapter_mean(losses, ids) == 2.5 + 2.5
    with pytest.raises(ValueError, match=r"losses: expected the shape of ids \(5,\), got torch\.float32 \(2,\)"):
        fastlora.per_adapter_mean(losses[:2], ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_per_adapter_mean_counts_more_rows_than_the_dtype_of_the_losses_can(dtype):
    losses, ids = torch.ones(5000, dtype=dtype, requires_grad=True), torch.zeros(5000, dtype=torch.int64)
    ids[:200], ids[200:300] = 1, -1
    mean = fastlora.per_adapter_mean(losses, ids)
    mean.backward()
    assert mean.item() == pytest.approx(2) and mean.dtype == losses.grad.dtype == dtype
    for g, total in ((0, 1), (1, 1), (-1, 0)):
        assert float(losses.grad[ids == g].double().sum()) == pytest.approx(total, rel=2e-3)
