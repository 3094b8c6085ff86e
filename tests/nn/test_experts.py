"""Adapters on experts that are one parameter [E, N, K]: against the model's own eager loop over W + s B A."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from support.experts_zoo import IDS, MODELS, loss_of, moe, ranks_of
from support.helpers import config, randomise
from torch.func import functional_call

import fastlora
from fastlora.nn.experts import ExpertProjection
from fastlora.nn.linear import adapted_layers


def adapted(name="Mixtral", **fields):
    model = moe(name, **fields)
    names = fastlora.model.modules.role_targets(model, "experts")
    pattern = ranks_of(model, names)
    fastlora.inject(model, config(r=2, target_modules="experts", rank_pattern=pattern))
    return randomise(model)


def updated(model, base):
    """The base's weights with each expert's update written out, differentiable in A and B."""
    found = {}
    for path, layer in adapted_layers(model).items():
        parts = []
        for a, b, s in layer.pairs():
            update = s * b @ a
            parts.append(update.T if layer.transposed else update)
        found[path] = base.get_parameter(path) + torch.stack(parts)
    return found


@pytest.mark.parametrize("name", list(MODELS))
def test_outputs_and_gradients_are_those_of_the_written_out_weights(name):
    base, model = moe(name), adapted(name)
    layers = adapted_layers(model)
    assert all(isinstance(layer, ExpertProjection) for layer in layers.values())
    assert {r for layer in layers.values() for r in layer.ranks().values()} == {0, 1, 2, 3}
    x = model.get_input_embeddings()(IDS).detach()
    grads = []
    for run in (
        lambda e: model(inputs_embeds=e),
        lambda e: functional_call(base, updated(model, base), (), {"inputs_embeds": e}),
    ):
        model.zero_grad()
        seen = x.clone().requires_grad_()
        y = run(seen).logits
        y.square().mean().backward()
        factors = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        grads.append((y.detach(), seen.grad, factors))
    (y, dx, ours), (ref, dref, theirs) = grads
    torch.testing.assert_close(y, ref)
    torch.testing.assert_close(dx, dref)
    compared = 0
    for n, g in theirs.items():
        if ours[n] is None:  # an expert without rows
            assert not g.any()
        else:
            torch.testing.assert_close(ours[n], g)
            compared += bool(g.any())
    assert compared > 10


class TestTheBaseIsTheModels:
    @pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
    @pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
    def test_outputs_of_new_adapters(self, name, implementation):
        base = moe(name, implementation, torch.float32)
        model = fastlora.inject(copy.deepcopy(base), config(r=2, target_modules="experts"))
        assert model.config._experts_implementation == base.config._experts_implementation == implementation
        ours, theirs = model(input_ids=IDS).logits, base(input_ids=IDS).logits
        assert torch.equal(ours, theirs) if implementation == "grouped_mm" else torch.allclose(ours, theirs, atol=1e-5)
        with fastlora.disable_adapters(randomise(model)):
            assert torch.equal(model(input_ids=IDS).logits, theirs)
        assert not torch.allclose(model(input_ids=IDS).logits, theirs, atol=1e-3)

    def test_the_implementation_may_change_later(self):
        model = adapted()
        before = model(input_ids=IDS).logits
        model.set_experts_implementation("batched_mm")
        torch.testing.assert_close(model(input_ids=IDS).logits, before)
        model.config._experts_implementation = "sonicmoe"
        with pytest.raises(ValueError, match="experts_implementation: expected one of .*'sonicmoe'"):
            model(input_ids=IDS)

    @pytest.mark.parametrize("name", ["Mixtral", "Llama4Text"])
    def test_copies_and_files_of_the_whole_model(self, name, tmp_path):
        model = adapted(name)
        before = model(input_ids=IDS).logits
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        for p in model.parameters():
            p.data.zero_()
        for other in (twin, again):
            assert torch.equal(other(input_ids=IDS).logits, before)
            other.load_state_dict(model.state_dict())
            assert not other(input_ids=IDS).logits.any()

    def test_merge_unmerge_and_unload(self):
        for name in ("Mixtral", "GptOss", "Llama4Text"):
            base, model = moe(name), adapted(name)
            keys, before = list(base.state_dict()), model(input_ids=IDS).logits
            weights = {n: p.clone() for n, p in model.named_parameters()}
            fastlora.merge(model)
            torch.testing.assert_close(model(input_ids=IDS).logits, before)
            fastlora.unmerge(model)
            assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
            fastlora.merge(model, unload=True)
            torch.testing.assert_close(model(input_ids=IDS).logits, before)
            assert list(model.state_dict()) == keys
            assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
            assert all(m.config is model.config for m in model.modules() if hasattr(m, "is_concatenated"))


def test_several_adapters_in_one_batch_are_what_each_is_alone():
    model = adapted()
    fastlora.add_adapter(model, "b", config(r=3, target_modules="experts"))
    randomise(model)
    alone = {}
    for name in ("default", "b"):
        with fastlora.use_adapters(model, name):
            alone[name] = model(input_ids=IDS).logits
    with fastlora.disable_adapters(model):
        alone[None] = model(input_ids=IDS).logits
    for ids in (["b", "default"], ["default", None], [None, "b"]):
        with fastlora.use_adapters(model, ids):
            y = model(input_ids=IDS).logits
        torch.testing.assert_close(y, torch.stack([alone[name][i] for i, name in enumerate(ids)]))
    with fastlora.use_adapters(model, ["b", "default"]):
        model.zero_grad()
        loss_of(model).backward()
    assert all(p.grad is None or p.grad.any() for n, p in model.named_parameters() if "lora_" in n)


def test_checkpointing_repeats_the_same():
    model = adapted().train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss_of(model).backward()
        grads.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
    for n, g in grads[0].items():
        assert (g is None) == (grads[1][n] is None)
        if g is not None:
            torch.testing.assert_close(grads[1][n], g)


def test_experts_without_rows_have_no_gradient_and_do_not_decay():
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    model(input_ids=IDS[:1, :2]).logits.square().mean().backward()
    absent = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert 0 < len(absent) < len(before) and all("experts" in n for n in before)
    optimizer.step()
    assert {n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])} == absent
    assert not any(p.requires_grad for n, p in model.named_parameters() if "gate.weight" in n)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_compiled_code_computes_the_same(implementation):
    model = moe("Mixtral", implementation, torch.float32)
    randomise(fastlora.inject(model, config(r=2, target_modules="experts")))
    found = []
    compile_ = functools.partial(torch.compile, backend="aot_eager", fullgraph=implementation == "grouped_mm")
    for run in (model, compile_(model)):
        with fastlora.track(model, every=1, ema=None) as tracker:
            model.zero_grad()
            try:
                loss = loss_of(run)
                loss.backward()
            except RuntimeError:
                with pytest.raises(RuntimeError, match="data-dependent"):  # of the library's own, without us
                    loss_of(compile_(moe("Mixtral", implementation, torch.float32))).backward()
                pytest.skip(f"this transformers does not compile its own {implementation}")
            tracker.step()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # Of experts without rows compiled code has zeros, since it cannot know which they are.
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}
        found.append((loss.detach(), grads, dict(tracker.scores("grad_sq"))))
    torch.compiler.reset()
    (loss, grads, scores), (compiled, others, theirs) = found
    torch.testing.assert_close(compiled, loss)
    torch.testing.assert_close(others, grads)
    torch.testing.assert_close(theirs, scores)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            dict(use_dora=True),
            "use_dora: True is implemented for nn.Linear and Conv1D, and .*gate_up_proj' is of experts",
        ),
        (dict(init_lora_weights="pissa"), "init_lora_weights: 'pissa' is implemented for"),
        (dict(init_lora_weights="eva"), "init_lora_weights: expected one that needs no covariance, for experts as"),
        (dict(lora_dropout=0.1), "lora_dropout: expected 0 with experts, as in PEFT, of which .*gate_up_proj"),
        (
            dict(rank_pattern={"experts.down_proj[3]": 25}),
            r"rank of .*down_proj\[3\]: expected at most .* = 24, got 25",
        ),
        (dict(rank_pattern={"experts.down_proj[6]": 1}), "rank_pattern: expected patterns that match"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(fields, message):
    model = moe()
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=message):
        fastlora.inject(model, config(target_modules="experts", **{"r": 2, **fields}))
    assert list(model.named_modules()) == before and all(p.requires_grad for p in model.parameters())


def test_routes_to_experts_that_are_not_there_are_refused():
    experts = adapted().model.layers[0].mlp.experts
    x, weights = torch.randn(3, 32, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    for bad in (6, -1):
        with pytest.raises(ValueError, match="top_k_index: expected experts 0 to 5"):
            experts(x, torch.tensor([[0, 1], [2, bad], [3, 4]]), weights)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_other_backends_compute_the_same(backend):
    model, other = (
        randomise(fastlora.inject(moe(dtype=torch.float32), config(r=2, target_modules="experts", backend=b)))
        for b in ("auto", backend)
    )
    for m in (model, other):
        loss_of(m).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_the_backend_that_multiplies_by_the_weight_is_refused():
    model = moe(dtype=torch.float32)
    before = [*model.state_dict()]
    why = "backend: 'triton' multiplies by the weight itself, and experts leave '.*' to the model"
    with pytest.raises(ValueError, match=why):
        fastlora.inject(model, config(r=2, target_modules="experts", backend="triton"))
    assert [*model.state_dict()] == before


def test_ids_that_do_not_go_with_the_tokens_are_refused():
    model = adapted()
    with fastlora.use_adapters(model, torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="ids: expected one a sample or one a token, got 3 for 8 tokens"):
            model.model.layers[0].mlp(torch.randn(2, 4, 32, dtype=torch.float64))


def test_ranks_wait_for_the_backward():
    model = fastlora.inject(moe(), config(r=2, target_modules="experts"))
    loss, ranks = loss_of(model), {"model.layers.0.mlp.experts.down_proj[0]": 1}
    with pytest.raises(ValueError, match="a forward of 'default' awaits its backward"):
        fastlora.set_ranks(model, ranks)
    loss.backward()
    fastlora.set_ranks(model, ranks)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_base_keeps_its_precision_under_autocast(implementation):
    model, found = moe("Mixtral", implementation, torch.float32), []
    experts = next(module for name, module in model.named_modules() if name.endswith("experts"))
    experts.register_forward_hook(lambda module, args, y: found.append(y.detach()))
    for inject in (False, True):
        if inject:  # B is zero
            fastlora.inject(model, config(r=2, target_modules="experts"))
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS)
    assert found[0].dtype is found[1].dtype and torch.equal(*found)
