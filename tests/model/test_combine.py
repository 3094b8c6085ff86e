"""Weighted combinations of adapters: the same factors as PEFT's, and what cannot be combined."""

import pytest
import torch
from support.peft_help import peft
from torch import nn

import fastlora
from fastlora.model.combine import COMBINATIONS


class Three(nn.Module):
    """A linear that both adapters have, one that the second alone has, a convolution and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.conv(self.embed(x).transpose(1, 2)).transpose(1, 2))))


X = torch.arange(8).view(2, 4)
BASE = ["embed", "up"]


def models(r=(2, 2), targets=(BASE, [*BASE, "down"]), **fields):
    """PEFT's and ours with adapters default and b, whose factors are equal."""
    config = lambda i: peft.LoraConfig(r=r[i], lora_alpha=3 + i, target_modules=targets[i], **fields)  # noqa: E731
    theirs = peft.get_peft_model(Three().double(), config(0))
    theirs.add_adapter("b", config(1))
    ours = fastlora.inject(Three().double(), config(0))
    fastlora.add_adapter(ours, "b", config(1))
    generator = torch.Generator().manual_seed(1)
    named = {n.replace("embedding_", "").removesuffix(".weight"): p for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            named["base_model.model." + name.removesuffix(".weight")].data.copy_(
                parameter.data.view_as(named["base_model.model." + name.removesuffix(".weight")])
            )
    return theirs, ours


def output(ours, name):
    with fastlora.use_adapters(ours, name):
        return ours(X)


OPTIONS = dict(density=0.6)


@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize("weights", [(1.0, 0.5), (0.7, -0.4)])
def test_as_peft(kind, weights, tmp_path, monkeypatch):
    # PEFT draws other numbers before, and for an embedding in the other layout.
    monkeypatch.setattr(torch, "bernoulli", lambda t: (torch.arange(t.numel()) % 3 > 0).view(t.shape).to(t.dtype))
    drawn = kind.startswith("dare") and kind.endswith("svd")
    targets = (["up"], ["up", "down"]) if drawn else (BASE, [*BASE, "down"])
    theirs, ours = models((2, 3) if kind in ("svd", "cat", "ties_svd") else (2, 2), targets)
    theirs.base_model.add_weighted_adapter(["default", "b"], list(weights), "c", combination_type=kind, **OPTIONS)
    theirs.set_adapter("c")
    fastlora.add_weighted_adapter(
        ours, ["default", "b"], list(weights), adapter_name="c", combination_type=kind, **OPTIONS
    )
    # PEFT rounds the weights to float32.
    torch.testing.assert_close(output(ours, "c"), theirs(X), rtol=1e-6, atol=1e-6)
    assert not any(p.requires_grad for n, p in ours.named_parameters() if ".c." in n)
    fastlora.set_adapter(ours, "c")
    fastlora.save(ours, tmp_path)
    torch.testing.assert_close(fastlora.load(Three().double(), tmp_path)(X), output(ours, "c"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_random_pruning_keeps_the_expectation(kind):
    """With every entry kept DARE is what it prunes; with half of them it is that on average (linear)."""
    _, ours = models(targets=(["up"], ["up"]))
    plain = kind.replace("dare_ties", "ties").replace("dare_linear", "linear")
    plain = "svd" if plain == "linear_svd" else plain
    fastlora.add_weighted_adapter(
        ours, ["default", "b"], [1.0, 0.5], adapter_name="all", combination_type=kind, density=1.0
    )
    fastlora.add_weighted_adapter(
        ours, ["default", "b"], [1.0, 0.5], adapter_name="plain", combination_type=plain, density=1.0
    )
    torch.testing.assert_close(ours.up.delta("all"), ours.up.delta("plain"))
    torch.manual_seed(0)
    fastlora.add_weighted_adapter(
        ours, ["default", "b"], [1.0, 0.5], adapter_name="some", combination_type=kind, density=0.5
    )
    assert not torch.equal(ours.up.delta("some"), ours.up.delta("plain"))


def test_cat_is_exact_and_split_matrices_stay_split():
    model = nn.ModuleDict({"attn": fastlora_attention()})
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules="qkv"))
    fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=3, target_modules="qkv", rank_pattern={"attn.qkv[k]": 0}))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    fastlora.add_weighted_adapter(model, ["default", "b"], [2.0, -1.0], adapter_name="c", combination_type="cat")
    layer = model["attn"].qkv
    assert layer.ranks("c") == {"q": 5, "k": 2, "v": 5}
    torch.testing.assert_close(layer.delta("c"), 2 * layer.delta("default") - layer.delta("b"), rtol=1e-5, atol=1e-5)


def fastlora_attention():
    from timm.models.vision_transformer import Attention

    return Attention(12, num_heads=2)


@pytest.mark.parametrize(
    "fields, kind, says",
    [
        (
            dict(r=(2, 3)),
            "linear",
            "combination_type: 'linear' takes equal ranks, and 'embed' has .*'b': 3.; use 'svd'",
        ),
        (dict(use_dora=True, targets=(["up"], ["up"])), "svd", "adapters: 'default' has use_dora or lora_bias in 'up'"),
    ],
)
def test_what_does_not_add_up(fields, kind, says):
    config = lambda i: fastlora.LoraConfig(  # noqa: E731
        r=fields.get("r", (2, 2))[i],
        target_modules=fields.get("targets", (BASE, BASE))[i],
        use_dora=fields.get("use_dora", False),
    )
    model = fastlora.inject(Three(), config(0))
    fastlora.add_adapter(model, "b", config(1))
    with pytest.raises(ValueError, match=says):
        fastlora.add_weighted_adapter(model, ["default", "b"], [1.0, 1.0], adapter_name="c", combination_type=kind)
    assert fastlora.adapter_names(model) == ["default", "b"]


def test_groups_of_lora_plus():
    """As peft.optimizers.create_loraplus_optimizer: B learns lr_ratio times as fast."""
    model = fastlora.inject(Three(), fastlora.LoraConfig(r=2, target_modules=["up", "down", "embed"], lora_bias=False))
    groups = fastlora.param_groups(model, lr_lora=1e-3, lr_ratio=16.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {group["name"] for group in groups} == {"lora", "lora_B"}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert rates[id(parameter)] == pytest.approx(16e-3 if ".lora_B" in name and "embed" not in name else 1e-3)
    fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=2, target_modules=["up"]))
    groups = fastlora.param_groups(model, lr_lora={"default": 1e-3, "b": 1e-2}, lr_ratio=4.0)
    assert {(g["name"], g["adapter"]): g["lr"] for g in groups} == {
        ("lora", "default"): 1e-3, ("lora_B", "default"): 4e-3, ("lora", "b"): 1e-2, ("lora_B", "b"): 4e-2
    }  # fmt: skip
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    assert [g["name"] for g in fastlora.param_groups(model)] == ["lora", "lora"]
