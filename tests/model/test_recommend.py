"""``recommend``: ranks that keep to the budget, and a model that nobody has touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastlora


class Blocks(nn.Module):
    """Linears of several shapes, one that the loss does not reach, a normalisation with running statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.wide, self.narrow = nn.Linear(12, 16), nn.Linear(16, 40), nn.Linear(40, 3)
        self.norm, self.dropout, self.unused = nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 16)

    def forward(self, x):
        h = self.dropout(self.norm(self.first(x)))
        self.seen = self.unused(h)
        return self.narrow(self.wide(h).tanh())


BATCHES = list(torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1)))
SIZES = {"first": (12, 16), "wide": (16, 40), "narrow": (40, 3)}


def loss_fn(model, batch):
    return model(batch).square().mean()


def recommend(model, budget, **options):
    return fastlora.recommend(model, BATCHES, loss_fn, budget, steps=3, progress=False, **options)


@pytest.mark.parametrize("budget", [28, 71, 126, 127, 300, 1000, 2000])
def test_the_budget_is_kept_and_ranks_are_as_even_as_it_allows(budget):
    found = recommend(Blocks(), budget)
    ranks = {key: found.ranks[key] for key in SIZES}
    assert found.ranks["unused"] == 0 and set(found.targets) == {key for key, rank in ranks.items() if rank}
    assert found.params == sum(rank * sum(SIZES[key]) for key, rank in ranks.items()) <= budget
    even = max(r for r in range(41) if sum(min(r, *s) * sum(s) for s in SIZES.values()) <= budget)
    assert all(min(even, *SIZES[key]) <= rank <= min(even + 1, *SIZES[key]) for key, rank in ranks.items())
    more = [sum(SIZES[key]) for key, rank in ranks.items() if rank == even and rank < min(SIZES[key])]
    assert all(found.params + cost > budget for cost in more), "a rank more would have been paid for"


def test_what_is_left_goes_to_the_largest_gradient_for_its_size():
    model = Blocks()
    with torch.no_grad():
        model.narrow.weight.mul_(3)
    exact = copy.deepcopy(model)
    squares = dict.fromkeys(SIZES, 0.0)
    torch.manual_seed(5)
    for batch in BATCHES:
        exact.zero_grad()
        loss_fn(exact, batch).backward()
        for key in SIZES:
            squares[key] += float(getattr(exact, key).weight.grad.double().square().sum())
    torch.manual_seed(5)
    found = recommend(model, 127 + 56)  # rank 1 everywhere, and 56 more: enough for any one matrix
    best = max(SIZES, key=lambda key: squares[key] / sum(SIZES[key]))
    assert found.ranks[best] == 2 and best != max(squares, key=squares.get)
    for row in found.rows:
        share = squares.get(row.key, 0.0) / sum(squares.values())
        assert row.share == pytest.approx(share, rel=1e-4)


def test_the_config_makes_these_ranks():
    model = Blocks()
    found = recommend(model, 300)
    fastlora.inject(model, found.config)
    made = fastlora.summary(model)
    assert {row.key: row.rank for row in made.rows} == found.ranks
    assert made.adapter_params == found.params
    assert {row.scale for row in made.rows if row.rank} == {2.0}


def test_the_model_is_not_touched():
    model = Blocks()
    model.first.weight.requires_grad_(False)
    model.wide.weight.grad = torch.ones_like(model.wide.weight)
    model.dropout.eval()
    before = copy.deepcopy(model.state_dict())
    state, classes = torch.get_rng_state(), [type(m) for m in model.modules()]
    grads = {name: (p, p.grad, p.requires_grad) for name, p in model.named_parameters()}
    recommend(model, 300)
    assert [type(m) for m in model.modules()] == classes and torch.equal(torch.get_rng_state(), state)
    assert {name: (p, p.grad, p.requires_grad) for name, p in model.named_parameters()} == grads
    assert model.training and not model.dropout.training and not hasattr(model, "seen")
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._state_dict_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_no_weight_is_copied():
    model = Blocks()
    places = {p.data_ptr() for p in model.parameters()}
    seen = set()

    def look(twin, batch):
        assert twin is not model
        seen.update(p.data_ptr() for name, p in twin.named_parameters() if "lora_" not in name)
        return loss_fn(twin, batch)

    fastlora.recommend(model, BATCHES, look, 300, steps=1, progress=False)
    assert seen == places


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            assert self.head.weight is self.embed.weight
            return self.head(self.body(self.embed(ids)))

    found = fastlora.recommend(Tied(), [torch.arange(10)], loss_fn, 100, steps=1, progress=False)
    assert found.ranks["body"] > 0


def test_the_table_gives_reasons():
    text = str(recommend(Blocks(), 300))
    assert "no gradient reaches it" in text and "parameters of a budget of 300" in text and "docs/ranks.md" in text
    scarce = str(recommend(Blocks(), 60))
    assert "less than rank 1 everywhere" in scarce and "a small gradient for its size" in scarce
    assert str(recommend(Blocks(), 300)) == text


def test_a_budget_for_nothing_is_refused():
    with pytest.raises(ValueError, match="budget: expected at least 28, the parameters of one rank"):
        recommend(Blocks(), 27)
