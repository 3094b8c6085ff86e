"""What a role takes, and what ``roles`` says of the rest."""

from __future__ import annotations

import logging

import pytest
import torch
from support.fused_zoo import FUSED
from support.helpers import config, randomise
from torch import nn
from torch.nn import functional as F

import fastlora
from fastlora.model.modules import role_targets
from fastlora.nn.linear import adapted_layers
from fastlora.testing import enable_torchvision

enable_torchvision()
transformers = pytest.importorskip("transformers")

SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(3))
SPEECH = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
DEEPSEEK = dict(
    SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, moe_intermediate_size=16, n_group=1, topk_group=1, num_experts_per_tok=2,
    first_k_dense_replace=1,
)  # fmt: skip
MAMBA = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
EXPERTS = dict(SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)


def of(name, **fields):
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(getattr(transformers, f"{name}Config")(**fields))


def leaves(model, role):
    return sorted({name.rpartition(".")[2] for name in role_targets(model, role)})


@pytest.mark.parametrize(
    "make, qkv, mlp",
    [
        (lambda: of("GPTJ", vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4), 3, ["fc_in", "fc_out"]),
        (lambda: of("Albert", **SIZES, embedding_size=16), 3, ["ffn", "ffn_output"]),
        (lambda: of("Hubert", **SPEECH), 3, ["intermediate_dense", "output_dense"]),
        (lambda: of("Wav2Vec2", **SPEECH), 3, ["intermediate_dense", "output_dense"]),
        (lambda: of("DINOv3ViT", **SPEECH), 3, ["down_proj", "up_proj"]),
        (lambda: of("DeepseekV3", **DEEPSEEK), 4, ["down_proj", "gate_proj", "up_proj"]),
    ],
    ids=["gptj", "albert", "hubert", "wav2vec2", "dinov3", "deepseek"],
)
def test_families_without_a_fused_matrix(make, qkv, mlp):
    model = make()
    assert len(leaves(model, "qkv")) == qkv and leaves(model, "mlp") == mlp
    for role in ("qkv", "attention", "mlp"):
        fastlora.inject(make(), config(r=2, target_modules=role))


def test_projections_of_latent_attention_learn():
    model = of("DeepseekV3", **DEEPSEEK).double()
    names = leaves(model, "qkv")
    assert names == ["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"]
    randomise(fastlora.inject(model, config(r=2, target_modules="attention")))
    y = model(input_ids=IDS)[0]
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)
    fastlora.merge(model)
    torch.testing.assert_close(model(input_ids=IDS)[0], y)


@pytest.mark.parametrize(
    "make, taken",
    [
        (lambda: of("Mamba", **MAMBA), ["in_proj", "out_proj", "x_proj"]),
        (lambda: of("Mamba2", **MAMBA, num_heads=8, head_dim=8), ["in_proj", "out_proj"]),
        (lambda: of("Lfm2", **SIZES, num_key_value_heads=2, layer_types=["conv"]), ["in_proj", "out_proj"]),
    ],
    ids=["mamba", "mamba2", "lfm2"],
)
def test_mixers_have_no_q_k_v(make, taken):
    model = make()
    assert leaves(model, "mixer") == taken and not role_targets(model, "qkv")
    with pytest.raises(ValueError, match="target_modules: expected a role"):
        fastlora.inject(model, config(r=2, target_modules="attention"))
    fastlora.inject(model, config(r=2, target_modules="mixer"))
    assert all(set(layer.slices) == {"weight"} for layer in adapted_layers(model).values())


def test_an_mlp_that_is_called_in_proj_is_no_attention():
    from transformers import BarkSemanticConfig, BarkSemanticModel

    model = BarkSemanticModel(
        BarkSemanticConfig(hidden_size=32, num_layers=1, num_heads=4, input_vocab_size=64, output_vocab_size=64)
    )
    assert leaves(model, "qkv") == ["att_proj"] and leaves(model, "attention") == ["att_proj", "out_proj"]
    assert set(role_targets(model, "attention")) == {"layers.0.attn.att_proj", "layers.0.attn.out_proj"}


class TestExperts:
    def test_they_are_named_where_a_role_leaves_them_out(self, caplog):
        model = of("Mixtral", **EXPERTS)
        with caplog.at_level(logging.WARNING, "fastlora"):
            fastlora.inject(model, config(r=2, target_modules="all-linear"))
        assert "leaves out layers.0.mlp.experts.gate_up_proj, layers.0.mlp.experts.down_proj" in caplog.text

    def test_a_role_that_means_them_alone_is_refused(self):
        model = of("Mixtral", **EXPERTS)
        with pytest.raises(ValueError, match=r"'mlp' takes nothing: .*experts.gate_up_proj"):
            fastlora.inject(model, config(r=2, target_modules="mlp"))
        rows = {row.name: row for row in fastlora.roles(model).rows}
        assert rows["layers.0.mlp.experts.down_proj"].roles == ("experts",)
        assert rows["layers.0.mlp.experts.down_proj"].shape == (4, 32, 48)

    def test_the_role_takes_parameters_and_lists_of_linears(self):
        model = of("Mixtral", **EXPERTS)
        assert leaves(model, "experts") == ["down_proj", "gate_up_proj"]
        lists = nn.ModuleDict({
            "experts": nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2)]),
            "shared_experts": nn.ModuleList([nn.Linear(4, 4)]),
            "expertise": nn.ModuleList([nn.Linear(4, 4)]),
        })  # fmt: skip
        both = nn.ModuleDict({"a": model, "b": lists})
        linears = [f"b.experts.{i}.{j}" for i in (0, 1) for j in (0, 1)]
        parameters = [f"a.layers.0.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
        assert role_targets(both, "experts") == parameters + linears
        fastlora.inject(both, config(r=2, target_modules="experts"))
        assert list(adapted_layers(both)) == parameters + linears
        rows = {row.name: row for row in fastlora.roles(both).rows}
        assert rows[parameters[0]].remark == "adapted" and rows[parameters[0]].roles == ("experts",)
        assert f"{parameters[0]} " in str(fastlora.explain(both))

    def test_experts_that_the_registry_does_not_run_are_named(self, monkeypatch):
        model = of("Mixtral", **EXPERTS)
        monkeypatch.delattr(type(model.layers[0].mlp.experts), "_apply_gate")
        with pytest.raises(
            ValueError, match="'experts' takes nothing: .*down_proj are parameters of experts that trans"
        ):
            fastlora.inject(model, config(r=2, target_modules="experts"))
        assert "which no role takes: transformers' registry" in str(fastlora.roles(model))

    def test_suffixes_of_parameters_are_target_parameters(self):
        model = of("Mixtral", **EXPERTS)
        with pytest.raises(ValueError, match="target_modules: expected suffixes of module names"):
            fastlora.inject(model, config(r=2, target_modules=["experts.down_proj"]))
        with pytest.raises(ValueError, match=r"target_parameters: .*'down_proy' \(did you mean .*down_proj"):
            fastlora.inject(model, config(r=2, target_parameters=["down_proy"]))
        with pytest.raises(ValueError, match="target_parameters: .* got 'q_proj.weight' of torch.nn.*Linear, which"):
            fastlora.inject(model, config(r=2, target_parameters=["q_proj.weight"]))
        fields = dict(target_modules="attention", target_parameters=["experts.down_proj"])
        fastlora.inject(model, config(r=2, **fields, rank_pattern={"experts.down_proj[1]": 0}))
        layer = adapted_layers(model)["layers.0.mlp.experts.down_proj"]
        assert layer.ranks() == {"0": 2, "1": 0, "2": 2, "3": 2} and len(adapted_layers(model)) == 5

    @pytest.mark.parametrize(
        "spoil, reason",
        [
            (lambda e: setattr(e, "is_transposed", True), "are not the layout that it says: is_transposed=True"),
            (lambda e: setattr(e, "num_experts", 5), "is_transposed=False, 5 experts"),
            (lambda e: setattr(e, "_is_expert_parallel", True), "spread over processes"),
            (lambda e: e.to(torch.float8_e4m3fn), "it is in float8_e4m3fn, quantized"),
            (lambda e: setattr(e, "forward", lambda *args: args[0]), "is not the one that transformers' registry"),
        ],
    )
    def test_what_cannot_be_adapted_is_named(self, spoil, reason):
        model = of("Mixtral", **EXPERTS)
        spoil(model.layers[0].mlp.experts)
        classes = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=f"layers.0.mlp.experts.gate_up_proj' cannot be adapted: .*{reason}"):
            fastlora.inject(model, config(r=2, target_modules="experts"))
        assert [type(m) for m in model.modules()] == classes
        assert reason in str(fastlora.roles(model))


class Attention(nn.Module):
    """4 query heads, 1 key and 1 value head in one matrix of a class that is in no table."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(64, 96, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in self.qkv(x).split([64, 16, 16], dim=-1))
        y = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class TestAnUnknownOwner:
    def test_stays_one_matrix_and_says_so(self, caplog):
        model = nn.Sequential(Attention())
        assert "how q, k and v lie in that of test_roles.Attention is not known" in str(fastlora.roles(model)).replace(
            f"{__name__}.", "test_roles."
        )
        with caplog.at_level(logging.WARNING, "fastlora"):
            fastlora.inject(model, config(r=2, target_modules="qkv"))
        assert "0.qkv" in caplog.text and "one matrix" in caplog.text
        assert model[0].qkv.ranks() == {"weight": 2}

    def test_a_rank_for_a_slice_that_it_may_not_have_is_refused(self):
        with pytest.raises(ValueError, match="rank_pattern"):
            fastlora.inject(nn.Sequential(Attention()), config(r=2, target_modules="qkv", rank_pattern={"0.qkv[k]": 0}))

    def test_slices_as_told(self):
        split = {"qkv": {"q": 64, "k": 16, "v": 16}}
        fields = dict(target_modules="qkv", init_lora_weights=False, rank_pattern={"0.qkv[k]": 0}, split_qkv=split)
        model = fastlora.inject(nn.Sequential(Attention()), config(r=2, **fields))
        changed = model[0].qkv.delta().abs().sum(1) > 0
        assert changed[:64].all() and not changed[64:80].any() and changed[80:].all()

    @pytest.mark.parametrize("rows", [{"q": 64, "k": 16}, {"q": 64, "k": 16, "v": 17}, {"q": 97}])
    def test_slices_that_do_not_tile_the_rows_are_refused(self, rows):
        model = nn.Sequential(Attention())
        before = {n: (type(m), [id(p) for p in m.parameters()]) for n, m in model.named_modules()}
        with pytest.raises(ValueError, match=r"split_qkv\['qkv'\]: expected slices of the 96 rows of '0\.qkv', got"):
            fastlora.inject(model, config(r=2, target_modules="qkv", split_qkv={"qkv": rows}))
        assert before == {n: (type(m), [id(p) for p in m.parameters()]) for n, m in model.named_modules()}
        assert all(p.requires_grad for p in model.parameters())

    def test_slices_that_are_known_to_be_others_are_refused(self):
        model = FUSED["gpt_neox"].make()
        split = {"query_key_value": {"q": 32, "k": 32, "v": 32}}
        with pytest.raises(ValueError, match=r"split_qkv\['query_key_value'\]: expected the slices of"):
            fastlora.inject(model, config(r=2, target_modules=["query_key_value"], split_qkv=split))


@pytest.mark.parametrize("name", ["phi3", "modernbert"])
@torch.no_grad()
def test_gate_is_what_the_activation_sees(name):
    torch.manual_seed(0)
    model = FUSED[name].make().double().eval()
    fastlora.inject(model, config(r=2, target_modules="mlp", init_lora_weights=True))
    path, layer = next((n, x) for n, x in adapted_layers(model).items() if len(x.slices) > 1)
    owner, seen = model.get_submodule(path.rpartition(".")[0]), []
    act = getattr(owner, "activation_fn", None) or owner.act
    act.register_forward_hook(lambda module, args, y: seen.append(args[0].clone()))

    def run():
        seen.clear()
        y = FUSED[name].run(model)
        return seen[0], y

    for part, moves in (("up", False), ("gate", True)):
        before, y = run()
        nn.init.normal_(layer.lora_B["default"].get_parameter(part))
        after, changed = run()
        assert torch.equal(before, after) is not moves and not torch.equal(y, changed)


def test_exact_subclasses_become_ours_and_come_back():
    from transformers.models.falcon.modeling_falcon import FalconLinear

    from fastlora.model.eject import eject

    model = FUSED["falcon"].make()
    kinds = [type(m) for m in model.modules()]
    assert FalconLinear in kinds
    fastlora.inject(model, config(r=2, target_modules="all-linear"))
    eject(model)
    assert [type(m) for m in model.modules()] == kinds


def test_networks_of_positions_and_heads_are_no_mlps():
    import timm

    sizes = dict(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=5)
    model = timm.create_model("vit_relpos_small_patch16_224", **sizes)
    assert all(name.startswith("blocks.0.mlp.fc") for name in role_targets(model, "mlp"))
    with torch.device("meta"):
        former = timm.create_model("caformer_s18", num_classes=5)
    assert not any(name.startswith("head") for name in role_targets(former, "mlp"))


def test_convolutions_over_channels():
    import timm

    model = timm.create_model("mobilevitv2_050", num_classes=5)
    blocks = [f"stages.2.1.transformer.{i}" for i in range(2)]
    mlps = role_targets(model, "mlp")
    assert {f"{block}.mlp.fc{i}" for block in blocks for i in (1, 2)} <= set(mlps)
    assert all(".mlp." in name for name in mlps)
    assert role_targets(model, "all-linear") == []
    row = next(row for row in fastlora.roles(model).rows if row.name == f"{blocks[0]}.attn.qkv_proj")
    assert row.slices == {"q": 1, "k": 64, "v": 64} and row.roles == ("qkv", "attention") and row.shape == (129, 64)
    fastlora.inject(model, fastlora.LoraConfig(target_modules="qkv"))
    assert model.get_submodule(row.name).ranks() == {"q": 1, "k": 8, "v": 8}  # one row can have no more


def test_gates_of_channels_are_no_mlps():
    import timm

    model = timm.create_model("mobilenetv3_small_050", num_classes=5)
    assert any(name.endswith("se.conv_reduce") for name, _ in model.named_modules())
    with_fc = nn.ModuleDict({"se": timm.layers.SEModule(16)})
    assert isinstance(with_fc["se"].fc1, nn.Conv2d)
    assert role_targets(model, "mlp") == [] == role_targets(with_fc, "mlp")


def test_convolutions_whose_owner_is_unknown_stay_one_matrix():
    owner = nn.ModuleDict({"qkv": nn.Conv2d(8, 24, 1), "proj": nn.Conv2d(8, 8, 1), "pwise": nn.Conv2d(8, 24, 1)})
    rows = {row.name: row for row in fastlora.roles(nn.ModuleDict({"attn": owner})).rows}
    assert [*rows] == ["attn.qkv", "attn.proj"] and "q, k and v lie" in rows["attn.qkv"].remark
    grouped = nn.ModuleDict({"qkv": nn.Conv2d(8, 24, 1, groups=2), "proj": nn.Conv2d(8, 8, 3, padding=1)})
    assert fastlora.roles(grouped).rows == ()


def test_an_mlp_of_fc_and_proj():
    """litgpt's GptNeoxMLP."""
    mlp = nn.ModuleDict({"fc": nn.Linear(8, 16), "proj": nn.Linear(16, 8)})
    assert role_targets(nn.ModuleDict({"mlp": mlp}), "mlp") == ["mlp.fc", "mlp.proj"]
    assert role_targets(nn.ModuleDict({"fc": nn.Linear(8, 16), "proj": nn.Linear(16, 8)}), "mlp") == ["proj"]


def test_a_table_of_an_adapted_model():
    model = FUSED["falcon_grouped"].make()
    before = {row.name: row.slices for row in fastlora.roles(model).rows}
    fastlora.inject(model, config(r=2, target_modules="qkv"))
    rows = {row.name: row for row in fastlora.roles(model).rows}
    assert {name: row.slices for name, row in rows.items()} == before
    assert [row.remark for row in rows.values() if row.slices] == ["adapted"] * 2
    assert "q:32 k:16 v:16 in 2 blocks" in str(fastlora.roles(model))
    with pytest.raises(TypeError, match="model: expected"):
        fastlora.roles(3)
