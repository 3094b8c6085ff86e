"""Layerwise policies: what they train, on real models; and what they refuse, with the model as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.helpers import FAMILIES, config
from support.model_state import assert_untouched, state_of
from torch import nn

import fastlora
from fastlora.model.trainable import (
    POLICIES,
    apply_policy,
    block_stacks,
    is_norm,
    norms_of,
    parameter_roles,
    task_heads,
)
from fastlora.nn.linear import adapted_layers


def vit_small():
    import timm

    with torch.device("meta"):
        return timm.create_model("vit_small_patch16_224", num_classes=100)


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


class Block(nn.Module):
    def __init__(self, d=8, norm=True):
        super().__init__()
        self.norm = nn.LayerNorm(d) if norm else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.fc2(self.fc1(self.norm(x)).relu())


def plain(depth=3, norm=True):
    return nn.Sequential(*[Block(norm=norm) for _ in range(depth)], nn.LayerNorm(8) if norm else nn.Identity())


class TestStatedCounts:
    """ViT-Small with 100 classes; adapters r = 8, alpha 16, one A for the whole qkv."""

    @pytest.mark.parametrize(
        "name, adapters, norms, stated",
        [
            ("deep_lora", 4 * 49_152, 8 * 2 * 768, 247_396),
            ("lora_only", 12 * 49_152, 0, 628_324),
            ("norm_only", 0, 25 * 768, 57_700),
            ("hybrid_parallel", 12 * 49_152, 24 * 768, 646_756),
            ("head_only", 0, 0, 38_500),
        ],
    )
    def test_counts(self, name, adapters, norms, stated):
        model = apply_policy(vit_small(), name, fastlora.LoraConfig(r=8, lora_alpha=16))
        counted = fastlora.summary(model)
        assert (counted.adapter_params, counted.norm_params, counted.head_params) == (adapters, norms, 38_500)
        assert counted.bias_params == 0 and counted.other_trainable == norms
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == stated
        groups = fastlora.param_groups(model)
        assert {g["name"]: sum(p.numel() for p in g["params"]) for g in groups} == {
            n: c for n, c in (("lora", adapters), ("norm", norms), ("head", 38_500)) if c
        }

    def test_deep_lora_is_where_it_should_be(self):
        model = apply_policy(vit_small(), "deep_lora", fastlora.LoraConfig(r=8, lora_alpha=16))
        leaves = ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
        assert sorted(adapted_layers(model)) == sorted(f"blocks.{i}.{leaf}" for i in range(8, 12) for leaf in leaves)
        norms = {f"blocks.{i}.norm{j}.{p}" for i in range(8) for j in (1, 2) for p in ("weight", "bias")}
        assert {n for n in trained(model) if ".lora_" not in n} == {*norms, "head.weight", "head.bias"}
        assert all(row.scale == 2.0 and row.rank == 8 for row in fastlora.summary(model).rows)

    def test_bitfit_trains_biases_and_the_head(self):
        model = apply_policy(vit_small(), "bitfit")
        expected = {n for n, _ in model.named_parameters() if n.endswith("bias")} | {"head.weight"}
        assert trained(model) == expected
        counted = fastlora.summary(model)
        assert counted.bias_params == 51_456 and counted.head_params == 38_500 and counted.adapter_params == 0
        groups = {g["name"]: g for g in fastlora.param_groups(model, lr_bias=0.5, weight_decay=0.1)}
        assert groups["bias"]["lr"] == 0.5 and groups["bias"]["weight_decay"] == 0.0 and set(groups) == {"bias", "head"}


BLOCKS = {  # name: (blocks of each stack, norms of a block)
    "timm_vit": ([["blocks.0", "blocks.1"]], 2),
    "bert": ([["bert.encoder.layer.0", "bert.encoder.layer.1"]], 2),
    "deberta": ([["deberta.encoder.layer.0", "deberta.encoder.layer.1"]], 2),
    "llama": ([["model.layers.0", "model.layers.1"]], 2),
    "vit": ([["vit.layers.0", "vit.layers.1"]], 2),
    "distilbert": ([["distilbert.transformer.layer.0", "distilbert.transformer.layer.1"]], 2),
}


class TestBlocks:
    @pytest.mark.parametrize("name", BLOCKS)
    def test_of_real_families(self, build, name):
        model, (stacks, norms) = build(name), BLOCKS[name]
        assert block_stacks(model) == stacks
        assert all(len(norms_of(model, block)) == norms for block in stacks[0])

    def test_stages_are_one_stack_and_towers_are_not(self):
        import timm

        sizes = dict(img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(1, 2), num_heads=(1, 2))
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **sizes)
        assert block_stacks(model) == [["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]]
        towers = nn.ModuleDict({"image": plain(3), "text": plain(2)})
        assert block_stacks(towers) == [["image.0", "image.1", "image.2"], ["text.0", "text.1"]]

    def test_t5_has_two_stacks(self):
        import transformers

        sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
        assert block_stacks(model) == [[f"{side}.block.{i}" for i in range(2)] for side in ("encoder", "decoder")]

    def test_plain_sequentials_experts_and_none(self):
        assert block_stacks(plain(3)) == [["0", "1", "2"]]
        assert block_stacks(plain(1)) == [] and block_stacks(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) == []
        model = plain(2)
        for block in model[:2]:
            block.fc1 = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 16)))
        assert block_stacks(model) == [["0", "1"]]  # experts hold no norm

    def test_norms_are_known_by_what_they_are(self, build):
        assert is_norm(nn.BatchNorm2d(2)) and not is_norm(nn.LayerNorm(2, elementwise_affine=False))
        assert norms_of(build("llama"))[-1] == "model.norm" and len(norms_of(build("llama"))) == 5

    @pytest.mark.parametrize(
        "name, heads",
        [("timm_vit", ["head"]), ("bert", ["classifier"]), ("roberta", ["classifier"]), ("llama", []), ("t5", [])],
    )
    def test_heads(self, build, name, heads):
        assert task_heads(build(name)) == heads


@pytest.mark.parametrize("family", ["timm_vit", "bert", "roberta", "deberta", "vit"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_trains_what_it_says_on_real_models(build, family, name):
    model, base = build(family), build(family)
    apply_policy(model, name, config())
    torch.testing.assert_close(FAMILIES[family].run(model), FAMILIES[family].run(base), rtol=1e-5, atol=1e-6)
    FAMILIES[family].run(model).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model)
    roles = parameter_roles(model, None)
    seen = {roles[id(p)] for p in model.parameters() if p.requires_grad}
    wanted = {"head"} | ({"lora"} if "lora" in name or name == "hybrid_parallel" else set())
    wanted |= {"norm"} if name in ("deep_lora", "norm_only", "hybrid_parallel") else set()
    wanted |= {"bias"} if name == "bitfit" else set()
    assert seen == wanted
    blocks = block_stacks(model)[0]
    adapted = {b for b in blocks for n in adapted_layers(model) if n.startswith(b)}
    assert adapted == {"deep_lora": {blocks[1]}, "lora_only": {*blocks}, "hybrid_parallel": {*blocks}}.get(name, set())
    torch.optim.AdamW(fastlora.param_groups(model)).step()
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert trained(again) == trained(model) and again.fastlora_policy == model.fastlora_policy


class TestOptions:
    def test_targets_ranks_and_depth(self, build):
        fields = config(target_modules="qkv", rank_pattern={"blocks.1.attn.qkv[v]": 2})
        model = apply_policy(build("timm_vit"), "deep_lora", fields)
        assert [(r.key, r.rank) for r in fastlora.summary(model).rows] == [
            (f"blocks.1.attn.qkv[{s}]", 2 if s == "v" else 4) for s in "qkv"
        ]
        assert fields.modules_to_save is None and fields.target_modules == "qkv"
        model = apply_policy(plain(5), "deep_lora", config(), deep=3)
        assert {n.partition(".")[0] for n in adapted_layers(model)} == {"2", "3", "4"}
        assert {n.partition(".")[0] for n in adapted_layers(apply_policy(plain(5), "deep_lora", config()))} == {
            "3",
            "4",
        }
        assert norms_of(apply_policy(plain(2), "deep_lora", config(), deep=2)) == ["0.norm", "1.norm", "2"]

    def test_what_was_frozen_is_trained_if_the_policy_says_so(self):
        for name in ("norm_only", "deep_lora"):
            model = apply_policy(plain(3).requires_grad_(False), name, config())
            assert {"0.norm.weight", "0.norm.bias"} <= trained(model) and ("2.norm.weight" in trained(model)) == (
                name == "norm_only"
            )

    def test_the_head_that_is_named(self, build):
        model = apply_policy(build("bert"), "head_only", config(modules_to_save=["pooler", "classifier"]))
        assert trained(model) == {f"{n}.{p}" for n in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")}
        assert fastlora.summary(model).head_params == 33 * 32 + 33 * 2

    @pytest.mark.parametrize("name", ["norm_only", "bitfit", "head_only"])
    def test_without_adapters_there_is_no_file(self, name, build, tmp_path):
        model = fastlora.apply_policy(build("timm_vit"), name)
        with pytest.raises(ValueError, match=f"policy '{name}' trains no adapter, and PEFT has no file without one"):
            fastlora.save(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()

    def test_what_is_trained_goes_into_the_file(self, build, tmp_path):
        model = apply_policy(build("timm_vit"), "deep_lora", config())
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        fastlora.save(model, tmp_path)
        again = build("timm_vit")
        fastlora.load(again, tmp_path)
        run = FAMILIES["timm_vit"].run
        torch.testing.assert_close(run(again), run(model))


BARE = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
BAD = [
    ("no blocks", BARE, ("deep_lora",), {}, "model: policy 'deep_lora' needs blocks: .* Sequential has none"),
    ("no blocks", BARE, ("lora_only",), {}, "model: policy 'lora_only' needs blocks"),
    ("no blocks", BARE, ("hybrid_parallel",), {}, "model: policy 'hybrid_parallel' needs blocks"),
    ("no norms", BARE, ("norm_only",), {}, "model: policy 'norm_only' trains norms; Sequential has none"),
    ("no norms", plain(3, norm=False), ("deep_lora",), {}, "needs blocks: .* each with a linear and a norm"),
    ("no biases", nn.Sequential(nn.Linear(2, 2, bias=False)), ("bitfit",), {}, "'bitfit' trains biases; Sequential"),
    ("no head", plain(3), ("head_only",), {}, "has no head that is known; name it in config.modules_to_save"),
    (
        "head",
        plain(3),
        ("head_only", config(modules_to_save=["haed"])),
        {},
        "modules_to_save: expected suffixes of module names of Sequential, got 'haed'",
    ),
    ("policy", plain(3), ("deep_lara",), {}, "name: expected one of .*did you mean 'deep_lora'"),
    ("policy", plain(3), (None,), {}, "name: expected one of"),
    (
        "config",
        plain(3),
        ("deep_lora", {"r": 4}),
        {},
        r"config: expected a fastlora\.LoraConfig or a peft\.LoraConfig, got \{'r': 4\}",
    ),
    (
        "targets",
        plain(3),
        ("deep_lora", config(target_modules=["fc3"])),
        {},
        r"target_modules: expected suffixes of module names of Sequential, got 'fc3' \(did you mean 'fc2'\?\)",
    ),
    ("rank", plain(3), ("deep_lora", config(r=9)), {}, "at most min"),
    (
        "pattern",
        plain(3),
        ("lora_only", config(rank_pattern={"fc": 2})),
        {},
        r"rank_pattern: expected patterns that match an adapted matrix, got 'fc' \(did you mean '2\.fc2'\?\)",
    ),
    (
        "deep",
        plain(3),
        ("deep_lora", config()),
        {"deep": 4},
        "deep: expected at most the 3 blocks of the stack of '0', got 4",
    ),
    (
        "deep",
        plain(3),
        ("deep_lora", config()),
        {"deep": 0},
        "deep: expected None for a third, or a number of blocks >= 1, got 0",
    ),
    ("deep", plain(3), ("lora_only", config()), {"deep": 1}, "deep: policy 'lora_only' does not tell deep"),
]


@pytest.mark.parametrize(
    "model, args, kwargs, message", [row[1:] for row in BAD], ids=[r[0] + str(i) for i, r in enumerate(BAD)]
)
def test_refused_by_name_with_the_model_as_it_was(model, args, kwargs, message):
    model = copy.deepcopy(model)
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    with pytest.raises(TypeError if "LoraConfig" in message else ValueError, match=message):
        apply_policy(model, *args, **kwargs)
    assert_untouched(model, before)


def test_names_that_match_outside_of_the_blocks_too_mean_those_inside(build):
    """``proj`` is the attention's output projection, and the convolution that makes patches."""
    model = build("timm_vit")
    assert isinstance(model.patch_embed.proj, nn.Conv2d)
    fastlora.apply_policy(model, "lora_only", fastlora.LoraConfig(r=2, target_modules=["qkv", "proj"]))
    wanted = {f"blocks.{i}.attn.{name}" for i in range(len(model.blocks)) for name in ("qkv", "proj")}
    assert set(adapted_layers(model)) == wanted


def test_adapted_models_and_outside_targets_are_refused(build):
    model = fastlora.inject(build("bert"), config(target_modules="qkv"))
    with pytest.raises(ValueError, match="already has an adapter"):
        apply_policy(model, "norm_only")
    with pytest.raises(
        ValueError,
        match=r"target_modules: expected what matches modules inside the blocks .*, got \['pooler\.dense'\]",
    ):
        apply_policy(build("bert"), "deep_lora", config(target_modules=["pooler.dense"]))
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got '"):
        apply_policy("bert", "norm_only")


@pytest.mark.parametrize(
    "kwargs, kind, message",
    [
        ({"lr_lora": -1.0}, ValueError, "lr_lora: expected a finite number >= 0, got -1.0"),
        ({"lr_bias": float("nan")}, ValueError, "lr_bias: expected a finite"),
        ({"lr_head": "1e-3"}, TypeError, "lr_head: expected a finite number >= 0, got '1e-3'"),
        ({"weight_decay": True}, TypeError, "weight_decay: expected a finite"),
        ({"weight_decay": {"loar": 0.1}}, ValueError, "weight_decay: expected group names among .* got 'loar'"),
        (
            {"weight_decay": {"lora": -0.1}},
            ValueError,
            r"weight_decay\['lora'\]: expected a finite number >= 0, got -0.1",
        ),
    ],
)
def test_rates_of_parameter_groups(kwargs, kind, message):
    model = apply_policy(plain(3), "deep_lora", config())
    with pytest.raises(kind, match=message):
        fastlora.param_groups(model, **kwargs)
    groups = {g["name"]: g["weight_decay"] for g in fastlora.param_groups(model, weight_decay={"norm": 0.5})}
    assert groups == {"lora": 0.0, "norm": 0.5}


@pytest.mark.parametrize("name", ["deep_lora", "lora_only", "hybrid_parallel"])
def test_a_suffix_that_matches_outside_of_the_blocks_too(build, name, tmp_path):
    """``patch_embed.proj`` is no target of a policy that adapts blocks; the files say so, and PEFT reads them."""
    peft = pytest.importorskip("peft")
    model = apply_policy(build("timm_vit"), name, fastlora.LoraConfig(r=2, target_modules=["proj"]))
    adapted = list(adapted_layers(model))
    assert adapted and all(path.startswith("blocks.") and path.endswith("attn.proj") for path in adapted)
    fastlora.save(model, tmp_path)
    again = peft.PeftModel.from_pretrained(build("timm_vit"), str(tmp_path))
    assert {n.partition(".lora_A")[0].removeprefix("base_model.model.") for n, _ in again.named_parameters() if "lora_A" in n} == set(adapted)  # fmt: skip  # noqa: E501


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.fc(self.embedding(ids))))


@pytest.mark.parametrize("saved", [["head"], ["embedding"]])
def test_one_end_of_tied_embeddings_cannot_be_saved(saved):
    """PEFT would untie it: refused before anything is trained."""
    model = Tied()
    with pytest.raises(ValueError, match="modules_to_save: a parameter is shared with .*, which PEFT would untie"):
        fastlora.inject(model, config(target_modules=["fc"], modules_to_save=saved))
    assert not adapted_layers(model) and model.head.weight is model.embedding.weight


def test_both_ends_of_tied_embeddings_are_trained_as_one_and_read_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Tied()
    model = fastlora.inject(copy.deepcopy(base), config(target_modules=["fc"], modules_to_save=["embedding", "head"]))
    ids = torch.arange(9)[None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        nn.functional.cross_entropy(model(ids)[0], ids[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.head.weight is model.embedding.weight and not torch.equal(model.head.weight, base.head.weight)
    fastlora.save(model, tmp_path)
    expected = model(ids)
    again = fastlora.load(copy.deepcopy(base), tmp_path)
    assert again.head.weight is again.embedding.weight
    torch.testing.assert_close(again(ids), expected)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(theirs(ids), expected)


@pytest.mark.parametrize("utils", [nn.utils, nn.utils.parametrizations], ids=["hook", "parametrized"])
@pytest.mark.parametrize("norm, said", [("weight_norm", "WeightNorm"), ("spectral_norm", "SpectralNorm")])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_normed_weights_are_refused_by_name(utils, norm, said):
    """At ``inject``, and by ``merge`` where the norm came later."""
    model = nn.Sequential(nn.Linear(8, 8))
    getattr(utils, norm)(model[0])
    before = type(model[0])
    with pytest.raises(ValueError, match=f"'0' cannot be adapted: its weight is computed at each forward by {said}"):
        fastlora.inject(model, config(target_modules=["0"]))
    assert type(model[0]) is before
    model = fastlora.inject(nn.Sequential(nn.Linear(8, 8)), config(target_modules=["0"]))
    getattr(utils, norm)(model[0])
    expected = model.eval()(torch.ones(1, 8))
    with pytest.raises(ValueError, match=f"'0' cannot be merged into: its weight is computed .* by {said}"):
        fastlora.merge(model)
    torch.testing.assert_close(model(torch.ones(1, 8)), expected)
