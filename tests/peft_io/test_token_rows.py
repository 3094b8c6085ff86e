"""``trainable_token_indices``: rows of an embedding that are trained alone, as in PEFT."""

import copy
import io
import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.peft_fields import (
    assert_same_first_step,
    both,
    forward,
    make_gpt2,
    make_llama,
    plain_names,
    tokens,
    trained_by_peft,
)
from support.peft_help import TENSORS, assert_close, assert_same, peft, snapshot, transformers
from torch.distributed.fsdp import fully_shard

import fastlora
from fastlora.model.inject import refuse_adapted
from fastlora.nn.token_rows import token_rows

KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
ROWS = [int(tokens()[0, 0]), 33, int(tokens()[1, 2]), 7]
FIELDS = dict(r=2, target_modules=["q_proj"], trainable_token_indices=ROWS)


def make_tied():
    return make_llama(tie_word_embeddings=True)


def make_padded():
    model = make_llama()
    model.model.embed_tokens.padding_idx = ROWS[2]
    return model


def make_by_frequency():
    model = make_llama()
    model.model.embed_tokens.scale_grad_by_freq = True
    return model


def make_gemma():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    config = transformers.Gemma3TextConfig(**sizes, num_key_value_heads=1, vocab_size=40, tie_word_embeddings=True)
    return transformers.Gemma3ForCausalLM(config).eval()


MAKES = [make_llama, make_tied, make_padded, make_by_frequency, make_gemma]


def injected(make=make_tied, **fields):
    """In float64, with rows and factors that are not those of the base."""
    model = fastlora.inject(make().double(), fastlora.LoraConfig(**{**FIELDS, **fields}))
    return randomized(model, "default", 3)


def randomized(model, adapter, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and f".{adapter}" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return model


def by_formula(model, adapter="default", factors=True):
    """The base's output with W itself replaced, with or without the adapter's factors."""
    plain = copy.deepcopy(model)
    for path, rows in token_rows(plain, adapter).items():
        with torch.no_grad():
            plain.get_submodule(path).weight[list(rows.indices[adapter])] = rows.rows(adapter)
        rows.uninstall(adapter)
    with torch.no_grad():
        return forward(fastlora.set_adapter(plain, adapter) if factors else fastlora.unload(plain))


class TestAsPeft:
    @pytest.mark.parametrize("make", MAKES)
    def test_names_counts_outputs_and_first_step(self, make):
        theirs, ours = both(make, **FIELDS)
        assert plain_names(ours) == plain_names(theirs)
        assert any("trainable_tokens_delta" in name for name in plain_names(ours))
        assert_same_first_step(theirs, ours)

    @pytest.mark.parametrize("make", [make_llama, make_tied])
    def test_starts_as_the_base(self, make):
        ours = fastlora.inject(make(), fastlora.LoraConfig(**FIELDS))
        if make is make_llama:
            assert torch.equal(forward(ours), forward(make()))
        assert_close(forward(ours), forward(make()))  # the head's few products are summed in another order

    @pytest.mark.parametrize(
        "make, fields",
        [
            (make_tied, dict(trainable_token_indices={"embed_tokens": ROWS})),
            (make_tied, dict(ensure_weight_tying=True)),
            (make_gpt2, dict(target_modules=["c_attn"], trainable_token_indices={"wte": ROWS, "wpe": [0, 3]})),
        ],
    )
    def test_by_name(self, make, fields):
        theirs, ours = both(make, **{**FIELDS, **fields})
        assert plain_names(ours) == plain_names(theirs)
        assert_same_first_step(theirs, ours)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_dtypes(self, dtype):
        theirs = peft.get_peft_model(make_tied().to(dtype), peft.LoraConfig(**FIELDS))
        ours = fastlora.inject(make_tied().to(dtype), peft.LoraConfig(**FIELDS))
        mine = token_rows(ours)["model.embed_tokens"].rows("default")
        wanted = theirs.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
        assert mine.dtype == wanted.dtype and forward(ours).dtype == dtype
        assert torch.equal(mine, wanted)

    @pytest.mark.parametrize("make", MAKES)
    def test_their_file_here_and_ours_there(self, make, tmp_path):
        _, wanted = trained_by_peft(make, tmp_path / "theirs", **FIELDS)
        ours = fastlora.load(make().double(), tmp_path / "theirs")
        assert_close(forward(ours), wanted)
        fastlora.save(ours, tmp_path / "ours")
        mine, given = (load_file(tmp_path / name / TENSORS) for name in ("ours", "theirs"))
        assert mine.keys() == given.keys() and torch.equal(mine[KEY], given[KEY])
        again = peft.PeftModel.from_pretrained(make().double(), str(tmp_path / "ours"))
        assert_close(forward(again), wanted)
        assert_close(forward(fastlora.load(make().double(), tmp_path / "ours")), wanted)

    @pytest.mark.parametrize("make", [make_llama, make_tied])
    def test_in_memory(self, make):
        theirs, ours = both(make, **FIELDS)
        assert_close(forward(fastlora.from_peft(theirs)), forward(theirs))
        there = fastlora.to_peft(ours)
        assert_close(forward(there), forward(ours))
        assert plain_names(there) == plain_names(theirs)

    @pytest.mark.parametrize("make", [make_llama, make_tied])
    def test_merged(self, make):
        theirs, ours = both(make, **FIELDS)
        wanted = theirs.merge_and_unload().state_dict()
        mine = fastlora.merge_and_unload(ours).state_dict()
        assert mine.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert_close(mine[name], tensor)


class TestGradients:
    @pytest.mark.parametrize("make", MAKES)
    def test_of_the_weight_itself(self, make):
        """The gradient of W, in its rows."""
        ours = injected(make)
        forward(ours).square().mean().backward()
        rows = token_rows(ours)["model.embed_tokens"]
        plain = copy.deepcopy(ours)
        weight = plain.model.embed_tokens.weight
        with torch.no_grad():
            weight[ROWS] = rows.rows("default")
        token_rows(plain)["model.embed_tokens"].uninstall("default")
        weight.requires_grad_()
        forward(plain).square().mean().backward()
        assert weight.grad[ROWS].any()
        assert_close(rows.rows("default").grad, weight.grad[ROWS])
        assert ours.model.embed_tokens.weight.grad is None

    def test_checkpointed_and_compiled(self):
        ours = injected().train()
        rows = token_rows(ours)["model.embed_tokens"].rows("default")
        (wanted,) = torch.autograd.grad(forward(ours).square().mean(), rows)
        compiled = torch.compile(ours, backend="eager")
        (grad,) = torch.autograd.grad(forward(compiled).square().mean(), rows)
        assert_close(grad, wanted)
        ours.gradient_checkpointing_enable()
        ours.enable_input_require_grads()
        (grad,) = torch.autograd.grad(forward(ours).square().mean(), rows)
        assert_close(grad, wanted)


class TestSeveralAdapters:
    def models(self):
        model = injected()
        other = [ROWS[0], 2, int(tokens()[2, 3])]
        fastlora.add_adapter(model, "b", fastlora.LoraConfig(**{**FIELDS, "trainable_token_indices": other}))
        fastlora.add_adapter(model, "c", fastlora.LoraConfig(r=2, target_modules=["q_proj"]))
        return randomized(randomized(model, "b", 4), "c", 5)

    def test_each_has_its_own(self):
        model = self.models()
        outputs = {}
        for name in ("default", "b", "c"):
            outputs[name] = forward(fastlora.set_adapter(model, name))
            assert_close(outputs[name], by_formula(model, name))
        with fastlora.use_adapters(model, ["b", "default", None]), torch.no_grad():
            mixed = forward(model)
        with fastlora.disable_adapters(model), torch.no_grad():
            base = forward(model)
        assert_close(base, forward(make_tied().double()))
        assert_close(mixed, torch.stack([outputs["b"][0], outputs["default"][1], base[2]]))

    def test_those_of_no_sample_get_no_gradient(self):
        model = self.models()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        fastlora.freeze_unused_adapters(model, optimizer)
        rows = token_rows(model)["model.embed_tokens"]
        before = rows.rows("b").detach().clone()
        for name in ("default", "b"):
            rows.rows(name).grad = torch.zeros_like(rows.rows(name))
        with fastlora.use_adapters(model, "default"):
            forward(model).square().mean().backward()
        optimizer.step()
        assert torch.equal(rows.rows("b"), before)

    def test_deleted(self):
        model = self.models()
        fastlora.delete_adapter(model, "b")
        assert not any(name.endswith(".b") for name in dict(model.named_parameters()))
        assert list(token_rows(model)["model.embed_tokens"].indices) == ["default"]
        with pytest.raises(ValueError, match="'default' has trainable_token_indices, whose rows do not add up"):
            fastlora.add_weighted_adapter(
                model, adapters=["default", "c"], weights=[1.0, 1.0], adapter_name="both", combination_type="svd"
            )

    def test_a_file_beside_another(self, tmp_path):
        model = self.models()
        fastlora.save(model, tmp_path, "b")
        wanted = forward(fastlora.set_adapter(model, "b"))
        loaded = fastlora.load(injected(), tmp_path, "b")
        assert_close(forward(fastlora.set_adapter(loaded, "b")), wanted)
        assert_close(forward(fastlora.set_adapter(loaded, "default")), forward(fastlora.set_adapter(model, "default")))


class TestMergedAndUnloaded:
    @pytest.mark.parametrize("make", [make_llama, make_tied])
    def test_merged_and_back(self, make):
        model = injected(make)
        before, wanted = snapshot(model), forward(model)
        assert_close(forward(fastlora.merge(model)), wanted)
        rows = token_rows(model)["model.embed_tokens"].rows("default")
        kept = rows.detach().clone()
        rows.data.zero_()
        assert_close(forward(model), wanted)  # the weight's own are what runs
        rows.data.copy_(kept)
        assert not torch.equal(model.model.embed_tokens.weight, before[0]["model.embed_tokens.weight"][1])
        assert_same(before, snapshot(fastlora.unmerge(model)))
        assert_close(forward(model), wanted)

    @pytest.mark.parametrize("make", [make_llama, make_tied])
    def test_unloaded(self, make):
        model = fastlora.unload(injected(make))
        wanted = make().double()
        assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in wanted.named_modules()]
        assert torch.equal(forward(model), forward(wanted))
        assert not model.lm_head._forward_hooks and not model.model.embed_tokens._forward_hooks_with_kwargs
        refuse_adapted(model)

    def test_not_finite(self):
        model = injected()
        with torch.no_grad():
            token_rows(model)["model.embed_tokens"].rows("default")[0, 0] = torch.inf
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"merging 'model\.embed_tokens' gives weights that are not finite"):
            fastlora.merge(model)
        assert_same(before, snapshot(model))

    def test_saved_by_transformers_once_merged(self, tmp_path):
        model = fastlora.merge(injected())
        model.save_pretrained(tmp_path)
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
        assert_close(forward(again), forward(model))
        assert not any("token_adapter" in key for key in load_file(tmp_path / "model.safetensors"))


class TestCopies:
    def test_deepcopy_and_pickle(self):
        model = injected()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert_close(forward(other), forward(model))
            with torch.no_grad():
                token_rows(other)["model.embed_tokens"].rows("default").zero_()
            assert not torch.allclose(forward(other), forward(model))
            assert_close(forward(other), by_formula(other))

    def test_state_dict(self):
        model, other = injected(), fastlora.inject(make_tied().double(), fastlora.LoraConfig(**FIELDS))
        other.load_state_dict(model.state_dict())
        assert_close(forward(other), forward(model))

    @pytest.mark.parametrize("make", [make_llama, make_tied])
    def test_sharded(self, make, tmp_path):
        model = injected(make)
        wanted, whole = forward(model), token_rows(model)["model.embed_tokens"].rows("default")
        (grad,) = torch.autograd.grad(wanted.square().mean(), whole)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            sharded = copy.deepcopy(model)
            for layer in sharded.model.layers:
                fully_shard(layer)
            fully_shard(sharded)
            output = forward(sharded)
            assert_close(output, wanted)
            output.square().mean().backward()
            assert_close(token_rows(sharded)["model.embed_tokens"].rows("default").grad.full_tensor(), grad)
            fastlora.save(sharded, tmp_path / "adapter")
        finally:
            dist.destroy_process_group()
        assert_close(forward(fastlora.load(make().double(), tmp_path / "adapter")), wanted)

    def test_onto_the_meta_device(self, tmp_path):
        model = injected()
        fastlora.save(model, tmp_path)
        with torch.device("meta"):
            empty = make_tied().double()
        loaded = fastlora.load(empty, tmp_path)
        loaded.load_state_dict(make_tied().double().state_dict(), strict=False, assign=True)
        loaded.tie_weights()
        rows = token_rows(loaded)["model.embed_tokens"]
        assert_close(rows.rows("default"), token_rows(model)["model.embed_tokens"].rows("default"))

    def test_a_replaced_embedding_is_told(self, tmp_path):
        model = injected()
        model.model.embed_tokens = torch.nn.Embedding(40, 16)
        with pytest.raises(ValueError, match=r"another module has replaced 'model\.embed_tokens'"):
            fastlora.save(model, tmp_path / "adapter")

    def test_a_resized_embedding_keeps_them(self):
        model = injected()
        wanted = forward(model)
        model.resize_token_embeddings(44, mean_resizing=False)
        assert_close(forward(model)[..., :40], wanted)


def make_bert():
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=16, vocab_size=40)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval()


def make_shared():
    """Tied by hand: the config does not say so."""
    model = make_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def make_untied():
    """Not tied although the config says so."""
    model = make_tied()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def make_renormed():
    model = make_llama()
    model.model.embed_tokens.max_norm = 1.0
    return model


class Reader(torch.nn.Module):
    """Multiplies by the weight of its embedding without calling a layer."""

    def __init__(self):
        super().__init__()
        self.table, self.q_proj = torch.nn.Embedding(40, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.q_proj(self.table(x)) @ self.table.weight.t()


REFUSED = {
    "read by its owner": (Reader, dict(trainable_token_indices={"table": [1]}), "reads table.weight, where they"),
    "too large": (make_llama, dict(trainable_token_indices=[1, 40]), r"below 40, got \[40"),
    "negative": (make_llama, dict(trainable_token_indices=[1, -1]), "expected an integer >= 0"),
    "twice": (make_llama, dict(trainable_token_indices=[1, 1]), r"one or several different indices .*, got \[1, 1\]"),
    "none": (make_llama, dict(trainable_token_indices=[]), r"one or several different indices .*, got \[\]"),
    "none by name": (make_llama, dict(trainable_token_indices={}), "one or several different indices"),
    "of a name": (make_llama, dict(trainable_token_indices={"embed_tokens": [2, 2]}), r"\['embed_tokens'\]: expected"),
    "text": (make_llama, dict(trainable_token_indices="1"), "expected one or several different indices"),
    "a boolean": (make_llama, dict(trainable_token_indices=[True]), "expected an integer >= 0, got True"),
    "no such name": (make_llama, dict(trainable_token_indices={"wte": [1]}), "names of embeddings and linears of Lla"),
    "no embedding": (make_llama, dict(trainable_token_indices={"model.norm": [1]}), "LlamaRMSNorm, no torch.nn.Embed"),
    "the head": (make_tied, dict(trainable_token_indices={"lm_head": [1]}), "has the weight of 'model.embed_tokens'"),
    "two names": (make_llama, dict(trainable_token_indices={"embed_tokens": [1], "tokens": [1]}), "one list for"),
    "saved": (make_llama, dict(modules_to_save=["embed_tokens"]), "is in modules_to_save, too"),
    "adapted": (make_llama, dict(target_modules=["q_proj", "embed_tokens"]), "'model.embed_tokens' is also a target"),
    "adapted head": (make_tied, dict(target_modules=["q_proj", "lm_head"]), "'lm_head' is also a target"),
    "a head with a bias": (make_bert, dict(target_modules=["query"]), "has a bias, which PEFT leaves out"),
    "shared": (make_shared, {}, "shares its weight with 'lm_head', which would keep the old rows"),
    "not shared": (make_untied, {}, "have weights of their own although tie_word_embeddings is set"),
    "renormed": (make_renormed, {}, "max_norm or sparse gradients"),
}  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize("case", REFUSED)
    def test_with_the_model_as_it_was(self, case):
        make, fields, says = REFUSED[case]
        model = make()
        before, names = snapshot(model), [n for n, _ in model.named_modules()]
        with pytest.raises((ValueError, TypeError), match=says):
            fastlora.inject(model, fastlora.LoraConfig(**{**FIELDS, **fields}))
        assert_same(before, snapshot(model))
        assert names == [n for n, _ in model.named_modules()]
        assert all(p.requires_grad for p in model.parameters())

    def test_as_another_adapter(self):
        model = injected()
        for fields, says in (
            (dict(target_modules=["embed_tokens"]), "'model.embed_tokens' cannot be adapted: it has trained rows"),
            (dict(target_modules=["lm_head"]), "'lm_head' cannot be adapted: it has trained rows"),
        ):
            before = snapshot(model)
            with pytest.raises(ValueError, match=says):
                fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=2, **fields))
            assert_same(before, snapshot(model))

    def test_policies_without_adapters(self):
        config = fastlora.LoraConfig(r=2, trainable_token_indices=[1])
        with pytest.raises(ValueError, match="trainable_token_indices: expected None with 'norm_only'"):
            fastlora.apply_policy(make_llama(), "norm_only", config)

    @pytest.mark.parametrize(
        "change, says",
        [
            (dict(trainable_token_indices=ROWS[:3]), r"trainable_tokens_delta' has shape \(4, 16\)"),
            (dict(trainable_token_indices=None), r"unexpected: .*trainable_tokens_delta"),
            (dict(trainable_token_indices={"lm_head": ROWS}), r"missing: .*lm_head\.token_adapter"),
            (dict(trainable_token_indices=[-1]), "expected an integer >= 0"),
            (dict(trainable_token_indices=[*ROWS[:3], 99]), r"below 40, got \[99\]"),
            (dict(trainable_token_indices={"model.norm": ROWS}), "names of embeddings or linears, got 'model.norm'"),
        ],
    )
    def test_files(self, change, says, tmp_path):
        fastlora.save(injected(), tmp_path)
        config = tmp_path / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
        model = make_tied().double()
        before = snapshot(model)
        with pytest.raises(ValueError, match=says) as error:
            fastlora.load(model, tmp_path)
        assert str(tmp_path) in str(error.value)
        assert_same(before, snapshot(model))

    def test_a_file_of_other_rows(self, tmp_path):
        fastlora.save(injected(), tmp_path)
        model = injected(trainable_token_indices=ROWS[::-1])
        before = snapshot(model)
        with pytest.raises(ValueError, match="trainable_token_indices are others in the model than in the file"):
            fastlora.load(model, tmp_path)
        assert_same(before, snapshot(model))
