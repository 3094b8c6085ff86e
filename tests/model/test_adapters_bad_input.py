"""What many adapters in one batch refuse: every error names the adapter or the argument and the sizes."""

from __future__ import annotations

import pytest
import torch
from support.adapters_help import IDS, batch, gradients, model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig
from fastlora.ops import reference
from fastlora.ops.layout import build_segments


def state(m):
    """Everything that a refused call could have changed."""
    layers = [m[i].query for i in range(2)]
    return (
        [(n, p.shape, p.detach().clone(), p.requires_grad) for n, p in m.named_parameters()],
        [(layer.adapter_names, layer.ranked, dict(layer.adapter_specs)) for layer in layers],
        list(layers[0].router.slots),
        layers[0].router.default.adapter,
        dict(m.fastlora_configs),
    )


def same(a, b) -> bool:
    return a[1:] == b[1:] and all(
        x[:2] == y[:2] and torch.equal(x[2], y[2]) and x[3] == y[3] for x, y in zip(a[0], b[0], strict=True)
    )


@pytest.mark.parametrize(
    "ranges, ids",
    [
        ({"b": (0, 2), "default": (2, 5), None: (5, 6)}, [1, 1, 0, 0, 0, -1]),
        ({None: (4, 6), "c": (0, 4)}, [2, 2, 2, 2, -1, -1]),
        ({"b": (0, 6), "c": (6, 6), "default": (0, 0)}, [1] * 6),
        ({"b": (2, 24), None: (0, 2)}, [-1, -1, *[1] * 22]),
    ],
    ids=["samples", "any order", "empty ones", "tokens"],
)
def test_ranges_by_name(ranges, ids):
    m, x = model(), batch()
    with fastlora.use_adapters(m, torch.tensor(ids)):
        want = m(x)
    with fastlora.use_adapters(m, ranges):
        assert torch.equal(m(x), want)
        assert not m[0].query.router.current().batch.rows(x).order.numel()  # no permutation is made or followed


REFUSED_RANGES = {
    "overlap": ({"b": (0, 4), "c": (3, 6)}, "ids: expected 'c' to begin at 4, where 'b' ends, got 3"),
    "inside": ({"b": (0, 6), "c": (2, 3)}, "ids: expected 'c' to begin at 6, where 'b' ends, got 2"),
    "gap": ({"b": (0, 2), "c": (4, 6)}, "ids: expected 'c' to begin at 2, got 4; None names the base for rows between"),
    "gap at first": ({"b": (1, 6)}, "ids: expected 'b' to begin at 0, got 1; None names the base for rows between"),
    "backwards": ({"b": (3, 1)}, r"0 <= begin <= end for 'b', got \(3, 1\)"),
    "negative": ({"b": (-1, 1)}, r"for 'b', got \(-1, 1\)"),
    "not a range": ({"b": 3}, "for 'b', got 3"),
    "not integers": ({"b": (0, 2.0)}, r"for 'b', got \(0, 2.0\)"),
    "unknown": ({"d": (0, 6)}, r"ids: expected one of \['default', 'b', 'c'\], got 'd'"),
}


@pytest.mark.parametrize("name", REFUSED_RANGES)
def test_ranges_that_are_refused(name):
    m = model()
    before = state(m)
    ranges, message = REFUSED_RANGES[name]
    with pytest.raises(ValueError, match=message):
        fastlora.use_adapters(m, ranges).__enter__()
    assert same(state(m), before)


def test_ranges_that_do_not_fit_the_input():
    m, x = model(), batch()
    with pytest.raises(ValueError, match=r"ids: \(7,\) given, but a layer sees an input of shape \(6, 4, 8\)"):
        with fastlora.use_adapters(m, {"b": (0, 3), "c": (3, 7)}):
            m(x)


@pytest.mark.parametrize("argument", ["ids", "row_seeds"])
def test_another_device_is_named(argument):
    m = model()
    far = torch.zeros(6, dtype=torch.int64, device="meta")
    given = {"ids": far} if argument == "ids" else {"ids": IDS, "row_seeds": far}
    with pytest.raises(ValueError, match=rf"{argument}: expected on the CPU or the model's device \(cpu\), got meta"):
        fastlora.use_adapters(m, **given).__enter__()


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("change", ["ranks", "removed"])
def test_changes_while_a_checkpointed_graph_is_alive(reentrant, change):
    """Refused beforehand, or when the forward is repeated, of which reentrant checkpointing keeps no graph."""
    m, x = model(), batch().requires_grad_()
    with fastlora.use_adapters(m, IDS):
        loss = checkpoint(m, x, use_reentrant=reentrant).sum()

    def alter():
        if change == "ranks":
            fastlora.set_ranks(m, {"0.query": 1}, adapter="b", reinit=True)
        else:
            fastlora.delete_adapter(m, "b")

    if reentrant:
        alter()
        with pytest.raises(RuntimeError, match="adapter 'b' was given other factors after the forward"):
            loss.backward()
    else:
        before = state(m)
        with pytest.raises(ValueError, match=r"'b' awaits its backward"):
            alter()
        assert same(state(m), before)
        loss.backward()
        assert gradients(m)


def test_changes_between_checkpointed_steps_are_fine():
    m, x = model(), batch().requires_grad_()
    for rank in (1, 4, 2):
        fastlora.set_ranks(m, {"0.query": rank}, adapter="b", reinit=True)
        with fastlora.use_adapters(m, IDS):
            checkpoint(m, x, use_reentrant=True).sum().backward()


@pytest.mark.parametrize(
    "ids, adapters, message",
    [([0, 2], 2, r"ids\[1\] is 2"), ([-2], 1, r"ids\[0\] is -2"), ([0], 0, r"ids\[0\] is 0")],
)
@pytest.mark.parametrize("build", [build_segments, reference.build_segments], ids=["chosen", "reference"])
def test_segments_name_the_id_and_its_position(build, ids, adapters, message):
    with pytest.raises(RuntimeError, match=message):
        build(torch.tensor(ids), adapters)


def test_a_failed_addition_leaves_nothing_behind():
    """The second target is refused after the first could have been adapted."""
    m = model()
    before = state(m)
    config = LoraConfig(r=4, rank_pattern={"1.dense": 9}, target_modules=["query", "dense"])
    with pytest.raises(ValueError, match="1.dense.*at most .* = 8, got 9"):
        fastlora.add_adapter(m, "d", config)
    assert same(state(m), before)
    with pytest.raises(
        ValueError, match=r"ranks: expected keys of the adapter's matrices, got '1\.quer' \(did you mean '1\.query'\?\)"
    ):
        fastlora.set_ranks(m, {"0.query": 1, "1.quer": 2}, adapter="b", reinit=True)
    assert same(state(m), before)


def test_a_tracked_or_merged_adapter_stays():
    m = model()
    with fastlora.track(m, adapter="b", every=1):
        before = state(m)
        with pytest.raises(ValueError, match="'b' is tracked; close its tracker first"):
            fastlora.delete_adapter(m, "b")
        assert same(state(m), before)
    fastlora.merge(m, "c")
    before = state(m)
    with pytest.raises(ValueError, match="'c' is merged into '0.query'; call fastlora.unmerge first"):
        fastlora.delete_adapter(m, "c")
    assert same(state(m), before)


def test_layers_with_different_sets_are_refused():
    m, other = model(), model()
    mixed = nn.ModuleList([m, fastlora.delete_adapter(other, "c")])
    with pytest.raises(ValueError, match="its layers have different sets of adapters"):
        fastlora.use_adapters(mixed, IDS).__enter__()


def test_names_that_a_module_dict_uses_itself():
    taken = [name for name in dir(nn.ModuleDict()) if "." not in name]
    assert {"items", "forward", "keys", "update", "training", "_parameters"} < set(taken)
    m = model()
    before, base = state(m), nn.Sequential(nn.Linear(4, 4))
    calls = (
        lambda name: fastlora.add_adapter(m, name, LoraConfig(r=2, target_modules=["query"])),
        lambda name: fastlora.add_weighted_adapter(m, ["default", "b"], [1, 1], adapter_name=name),
        lambda name: fastlora.inject(base, LoraConfig(r=2, target_modules=["0"]), adapter=name),
    )
    for name in taken:
        for call in calls:
            with pytest.raises(ValueError, match="expected a name that nn.ModuleDict does not use itself"):
                call(name)
    assert same(before, state(m)) and type(base[0]) is nn.Linear


@pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "lora_B", "0", "-1", "None", "import", "a b", "é", "q/k"])
def test_names_that_mean_something_elsewhere(name, tmp_path):
    torch.manual_seed(0)
    config, x = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False), batch()
    m = fastlora.add_adapter(model(), name, config)
    fastlora.set_adapter(m, name)
    want = m(x)
    m.load_state_dict(m.state_dict())
    fastlora.save(m, tmp_path)
    with fastlora.use_adapters(m, [name] * len(x)):
        torch.testing.assert_close(m(x), want)
    with torch.no_grad():
        [p.zero_() for n, p in m.named_parameters() if f"lora_B.{name}" in n]
    torch.testing.assert_close(fastlora.load(m, tmp_path)(x), want)
    assert fastlora.summary(m, name).adapter_params and fastlora.merge(m, name)(x).allclose(want)
