"""Fields of ``peft.LoraConfig`` that choose: the same names, counts, outputs and first step as in PEFT."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_fields import (
    NO_DROPOUT,
    assert_same_first_step,
    both,
    forward,
    make_llama,
    plain_names,
    tokens,
    trained_by_peft,
)
from support.peft_help import TENSORS, assert_close, assert_same, peft, snapshot, transformers

import fastlora


class TestLayersToTransform:
    @pytest.mark.parametrize(
        "fields",
        [
            dict(layers_to_transform=[1]),
            dict(layers_to_transform=2),
            dict(layers_to_transform=[0, 2], layers_pattern="layers"),
            dict(layers_to_transform=[0], layers_pattern=["h", "layers"]),
            dict(layers_to_transform=[]),
        ],
    )
    def test_as_peft(self, fields, tmp_path):
        fields = dict(r=2, target_modules=["q_proj", "up_proj"], **fields)
        theirs, ours = both(make_llama, **fields)
        assert plain_names(ours) == plain_names(theirs)
        assert_same_first_step(theirs, ours)
        _, wanted = trained_by_peft(make_llama, tmp_path, **fields)
        assert_close(forward(fastlora.load(make_llama().double(), tmp_path)), wanted)

    def test_a_full_name_is_meant_whatever_its_layer(self):
        fields = dict(r=2, target_modules=["v_proj", "model.layers.0.self_attn.q_proj"], layers_to_transform=[2])
        theirs, ours = both(make_llama, **fields)
        assert plain_names(ours) == plain_names(theirs)

    def test_a_role(self):
        model = fastlora.inject(make_llama(), fastlora.LoraConfig(r=2, target_modules="qkv", layers_to_transform=1))
        assert {row.key.split(".")[2] for row in fastlora.summary(model).rows} == {"1"}

    @pytest.mark.parametrize(
        "fields, says",
        [
            (dict(layers_to_transform=[1, 7]), r"indices of layers that hold targets, of \[0, 1, 2\], got \[7\]"),
            (dict(layers_to_transform=[1], layers_pattern="h"), r"of \[\], got \[1\]"),
        ],
    )
    def test_nothing_there(self, fields, says):
        with pytest.raises(ValueError, match=says):
            fastlora.inject(make_llama(), fastlora.LoraConfig(target_modules=["q_proj"], **fields))


class TestWeightTying:
    def test_a_file_of_tied_adapters(self, tmp_path):
        tied = lambda: make_llama(tie_word_embeddings=True)  # noqa: E731
        fields = dict(r=2, ensure_weight_tying=True)
        trained_by_peft(tied, tmp_path / "free", target_modules=["q_proj"], **fields)
        fastlora.load(tied().double(), tmp_path / "free")
        trained_by_peft(tied, tmp_path / "tied", target_modules=["q_proj", "embed_tokens"], **fields)
        with pytest.raises(
            ValueError, match="ensure_weight_tying: 'model.embed_tokens' and 'lm_head' share one weight"
        ):
            fastlora.load(tied().double(), tmp_path / "tied")

    def test_nothing_tied_is_trained(self):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], ensure_weight_tying=True)
        fastlora.inject(make_llama(tie_word_embeddings=True), config)

    @pytest.mark.parametrize(
        "saved", [["embed_tokens"], ["lm_head"], ["lm_head", "model.norm", "embed_tokens"], ["model.norm"]]
    )
    def test_saved_whole(self, saved, tmp_path):
        tied = lambda: make_llama(tie_word_embeddings=True)  # noqa: E731
        fields = dict(r=2, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True)
        theirs, ours = both(tied, **fields)
        names = {name.replace(".modules_to_save", ""): n for name, n in plain_names(theirs).items()}
        assert plain_names(ours) == names
        assert_same_first_step(theirs, ours)
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
        _, wanted = trained_by_peft(tied, tmp_path / "theirs", **fields)
        ours = fastlora.load(tied().double(), tmp_path / "theirs")
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
        assert_close(forward(ours), wanted)
        fastlora.save(ours, tmp_path / "ours")
        mine, given = (load_file(tmp_path / name / TENSORS) for name in ("ours", "theirs"))
        assert mine.keys() == given.keys() and all(torch.equal(mine[k], given[k]) for k in given)
        there = peft.PeftModel.from_pretrained(tied().double(), str(tmp_path / "ours"))
        assert_close(forward(there), wanted)
        assert_close(forward(fastlora.to_peft(ours)), wanted)
        assert_close(forward(fastlora.load(tied().double(), tmp_path / "ours")), wanted)

    def test_two_copies_that_differ(self, tmp_path):
        tied = lambda: make_llama(tie_word_embeddings=True)  # noqa: E731
        fields = dict(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        fastlora.save(fastlora.inject(tied(), fastlora.LoraConfig(**fields)), tmp_path)
        tensors = load_file(tmp_path / TENSORS)
        tensors["base_model.model.lm_head.weight"] += 1
        save_file(tensors, tmp_path / TENSORS)
        (tmp_path / "fastlora.json").unlink()
        model = tied()
        before = snapshot(model)
        with pytest.raises(ValueError, match="'base_model.model.lm_head.weight' differs from that of 'model.embed_tok"):
            fastlora.load(model, tmp_path)
        assert_same(before, snapshot(model))

    @pytest.mark.parametrize("fields", [dict(modules_to_save=["model.norm"]), dict()])
    def test_tied_and_trained(self, fields):
        model = make_llama(tie_word_embeddings=True)
        fields = dict(fields, target_modules=["q_proj", "lm_head"])
        config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "ensure_weight_tying": True, **fields})
        with pytest.raises(ValueError, match="ensure_weight_tying: .*'lm_head' share one weight"):
            fastlora.inject(model, config)
        assert not fastlora.nn.linear.adapted_layers(model)
        fastlora.inject(make_llama(), config)


@pytest.mark.parametrize("value", [True, False])
def test_fan_in_fan_out_follows_the_class(value):
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=8, vocab_size=40, **NO_DROPOUT)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    fields = dict(r=2, target_modules=["c_attn"], fan_in_fan_out=value, init_lora_weights=False)
    theirs, ours = both(lambda: copy.deepcopy(gpt2), **fields)
    assert_same_first_step(theirs, ours)
    theirs, ours = both(make_llama, **{**fields, "target_modules": ["q_proj"]})
    assert_same_first_step(theirs, ours)


class Gate(torch.nn.Module):
    """A matrix of one row, as the gate of Qwen2-MoE's shared expert."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate = torch.nn.Linear(6, 8), torch.nn.Linear(8, 1)

    def forward(self, x):
        return self.gate(torch.tanh(self.up(x)))


def test_a_rank_above_a_narrow_output(tmp_path):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    run = lambda model: model(x)  # noqa: E731
    fields = dict(r=4, target_modules=["up", "gate"])
    theirs, ours = both(Gate, **fields)
    assert plain_names(ours) == plain_names(theirs)
    assert_same_first_step(theirs, ours, run)
    _, wanted = trained_by_peft(Gate, tmp_path / "theirs", run=run, **fields)
    loaded = fastlora.load(Gate().double(), tmp_path / "theirs")
    assert_close(run(loaded), wanted)
    fastlora.save(loaded, tmp_path / "ours")
    assert_close(run(fastlora.load(Gate().double(), tmp_path / "ours")), wanted)
    assert_close(run(fastlora.merge(loaded)), wanted)
    with pytest.raises(ValueError, match="rank of gate: expected at most"):
        fastlora.inject(Gate(), fastlora.LoraConfig(r=4, target_modules=["up", "gate"]))


class TestFrozenWeightsInTheFile:
    def test_of_an_adapted_head(self, tmp_path):
        model, wanted = trained_by_peft(make_llama, tmp_path, r=2, target_modules=["q_proj", "lm_head"])
        assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / TENSORS)
        assert_close(forward(fastlora.load(make_llama().double(), tmp_path)), wanted)

    def test_of_resized_embeddings(self, tmp_path):
        def resized(rows=44):
            model = make_llama()
            torch.manual_seed(9)  # other rows than those in the file
            model.resize_token_embeddings(rows, mean_resizing=False)
            return model

        theirs, _ = trained_by_peft(resized, tmp_path, r=2, target_modules=["q_proj"])
        with torch.no_grad():
            theirs.get_input_embeddings().weight[-4:] = 3.0
            wanted = forward(theirs, tokens() + 4)
        theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
        assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / TENSORS)
        assert_close(forward(fastlora.load(resized().double(), tmp_path), tokens() + 4), wanted)
        with pytest.raises(ValueError, match=r"call model.resize_token_embeddings\(44\) first"):
            fastlora.load(make_llama().double(), tmp_path)


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(modules_to_save=["q_proj"]), "modules_to_save: .* is also a target"),
        (dict(exclude_modules=["q_proj"]), "exclude_modules: nothing is left"),
        (
            dict(exclude_modules=["self_attn"]),
            "exclude_modules: 'model.layers.\\d.self_attn' is no target but holds some",
        ),
        (
            dict(rank_pattern={"k_proj": 4}),
            "rank_pattern: expected patterns that match an adapted matrix, got 'k_proj'",
        ),
        (dict(alpha_pattern={"k_proj": 4}), "alpha_pattern: expected patterns that match"),
        (dict(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "quantize the model first"),
        (dict(init_lora_weights="orthogonal", rank_pattern={"q_proj": 3}), "expected an even rank"),
        (dict(init_lora_weights="olora", target_modules=["q_proj", "embed_tokens"]), "init_lora_weights: .*Embedding"),
        (dict(use_dora=True, target_modules=["q_proj", "embed_tokens"]), "use_dora: .*Embedding"),
        (dict(layers_to_transform=[0], target_modules=["lm_head"]), "layers_to_transform: expected indices of layers"),
    ],
)
def test_fields_that_contradict_each_other(fields, says):
    model = make_llama()
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=says):
        fastlora.inject(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}))
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


class Lists(torch.nn.Module):
    """Heads in a list, a dictionary and both, beside an adapted layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        nn = torch.nn
        self.body, self.lists = nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 3), nn.ModuleList([nn.Linear(6, 3)])])
        self.named = nn.ModuleDict({"a": nn.Sequential(nn.Linear(6, 3)), "b": nn.LayerNorm(6)})

    def forward(self, x):
        x = self.named["b"](self.body(x))
        return self.lists[0](x) + self.lists[1][0](x) + self.named["a"](x)


def test_containers_are_saved_by_what_is_inside(tmp_path):
    """PEFT cannot wrap a container."""
    fields = dict(r=2, target_modules=["body"], modules_to_save=["lists", "named"])
    with pytest.raises(TypeError):
        peft.get_peft_model(Lists(), peft.LoraConfig(**fields))
    model = fastlora.inject(Lists(), fastlora.LoraConfig(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += parameter.requires_grad * torch.randn_like(parameter)
    fastlora.save(model, tmp_path)
    x = torch.randn(4, 6)
    assert_close(peft.PeftModel.from_pretrained(Lists(), tmp_path)(x), model(x))
    assert_close(fastlora.to_peft(model)(x), model(x))
    loaded = fastlora.load(Lists(), tmp_path)
    assert_close(loaded(x), model(x))
    assert all(p.requires_grad for n, p in loaded.named_parameters() if n.startswith(("lists", "named")))
    assert_close(fastlora.load(fastlora.inject(Lists(), fastlora.LoraConfig(**fields)), tmp_path)(x), model(x))


@pytest.mark.parametrize("kind", ["gaussian", "Gaussian", "olora", "OLoRA"])
def test_initialisations_that_peft_reads_in_any_case(kind, tmp_path):
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=kind))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += parameter.requires_grad * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == kind
    torch.testing.assert_close(forward(fastlora.load(make_llama(), tmp_path)), forward(theirs.eval()))


def test_others_are_what_they_are_in_peft(tmp_path):
    trained_by_peft(make_llama, tmp_path, r=2, target_modules=["q_proj"])
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "Orthogonal"'))
    with pytest.raises(ValueError, match="Unknown initialization"):
        peft.PeftModel.from_pretrained(make_llama(), tmp_path)
    with pytest.raises(ValueError, match="init_lora_weights: expected true, false or one of"):
        fastlora.load(make_llama(), tmp_path)
