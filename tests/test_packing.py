"""The layout of layers that run together: kept between batches, packed again only for the adapter that changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_adapters import IDS, NAMES, batch, gradients, model

import fastlora
from fastlora import LoraConfig
from fastlora.nn.packing import Packing, packing_of


def run(m, ids=IDS, x=None):
    m.zero_grad()
    with fastlora.adapters(m, ids):
        y = m(batch() if x is None else x)
    y.square().sum().backward()
    return y, gradients(m)


def kept(m) -> Packing:
    """The packing of q, k and v of the first block, which run together."""
    (packing,) = [p for p in m[0].query.packings.values() if len(p.layers) == 3]
    return packing


def packed_ranks(packing) -> dict[str, list[int]]:
    return {name: entry.ranks for name, entry in packing.entries.items()}


def expected(packing) -> dict[str, list[int]]:
    """The ranks read anew from the layers."""
    return {
        n: [
            rank
            for layer in packing.layers
            for rank in (layer.ranks(n) if n in layer.adapter_specs else {"": 0}).values()
        ]
        for n in packing.entries
    }


def test_a_batch_packs_nothing_that_is_packed_already():
    m = model()
    run(m)
    packing, before = kept(m), dict(kept(m).entries)
    assert sorted(before) == sorted(NAMES) and packed_ranks(packing) == expected(packing)
    for ids in (IDS, IDS.flip(0), torch.tensor([2, 2, 0, 0, -1, 0])):
        run(m, ids)
    assert kept(m) is packing and packing.entries.keys() == before.keys()
    assert all(packing.entries[name] is entry for name, entry in before.items())


def test_only_the_adapter_that_changed_is_packed_again():
    m = model()
    run(m)
    packing = kept(m)

    def after(change, ids=IDS) -> int:
        """How many entries are those of before."""
        before = dict(packing.entries)
        change()
        run(m, ids)
        assert kept(m) is packing and packed_ranks(packing) == expected(packing)
        return sum(packing.entries.get(name) is entry for name, entry in before.items())

    assert after(lambda: fastlora.set_ranks(m, {"0.key": 5}, adapter="b", reinit=True)) == 2
    assert packing.entries["b"].ranks == [3, 5, 3]
    add = lambda: fastlora.add_adapter(m, "d", LoraConfig(r=4, target_modules="qkv"))  # noqa: E731
    assert after(add, torch.tensor([0, 1, 2, 3, 3, -1])) == 3
    assert len(packing.entries) == 4
    ids = torch.tensor([0, 2, 2, 3, 3, -1])
    assert after(lambda: fastlora.remove_adapter(m, "b"), ids) == 3 and "b" not in packing.entries
    assert after(lambda: None, ids) == 3 and len(packing.entries) == 3


def test_scales_follow_a_file(tmp_path):
    """A loaded adapter may have another scale than the one before."""
    m, other = model(torch.float32), model(torch.float32)
    x = batch(torch.float32)
    fastlora.remove_adapter(other, "b")
    fastlora.add_adapter(
        other, "b", LoraConfig(r=3, lora_alpha=30, target_modules="attention", init_lora_weights=False)
    )
    fastlora.save(other, tmp_path, adapter="b")
    ids = torch.ones(6, dtype=torch.int64)
    run(m, ids, x)
    fastlora.load(m, tmp_path, adapter="b")
    y, _ = run(m, ids, x)
    with fastlora.adapters(other, "b"):
        torch.testing.assert_close(y, other(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_have_their_own(again):
    m = model()
    y, _ = run(m)
    other = again(m)
    assert not other[0].query.packings
    with torch.no_grad():
        for parameter in other[0].query.lora_B["b"].parameters():
            parameter.zero_()
    assert not torch.allclose(run(other)[0], y)
    assert kept(other).layers == (other[0].query, other[0].key, other[0].value)


def test_parameters_are_read_at_every_call():
    """``functional_call`` puts other tensors in their place."""
    m, x = model(), batch()
    y, _ = run(m)
    name = "0.query.lora_B.b.weight"
    doubled = {name: 2 * dict(m.named_parameters())[name].detach()}
    with fastlora.adapters(m, IDS):
        other = torch.func.functional_call(m, doubled, (x,))
    assert torch.equal(run(m)[0], y) and not torch.allclose(other[IDS == 1], y[IDS == 1])
    assert torch.equal(other[IDS != 1], y[IDS != 1])


def test_a_rank_that_changed_behind_the_layout_is_named():
    m = model()
    run(m)
    m[0].query.lora_A["b"].weight = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"adapter 'b': A is \(5, 8\) and B \(8, 3\), but its rank was 3"):
        run(m)


def test_rank_zero_and_adapters_of_some_layers():
    m = model()
    fastlora.set_ranks(m, {"0.key": 0}, adapter="b", reinit=True)
    run(m)
    assert packing_of(kept(m).layers) is kept(m)
    operands = kept(m).operands(NAMES)
    assert [a.shape[0] for a in operands.A] == [2, 2, 2, 3, 0, 3, 1, 0, 0]
    assert operands.starts == [0, 2, 4, 6, 0, 3, 3, 6, 0, 1, 1, 1]
