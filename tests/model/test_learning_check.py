"""Adapters that never learn are found after the first backward; what merely rests is warned of once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.helpers import config, said
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora

PASSED_BY = r"never ran although .*: block\.reader \(in .*Reader\)"


class Reader(nn.Module):
    """Calls one linear and reads the weight of another, in a way that no source tells."""

    def __init__(self):
        super().__init__()
        self.caller, self.reader = nn.Linear(8, 8), nn.Linear(8, 8)
        self.reading = True

    def forward(self, x):
        layer = getattr(self, "reader")  # noqa: B009
        x = self.caller(x)
        return F.linear(x, layer.weight, layer.bias) if self.reading else layer(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Reader()
        self.experts = nn.ModuleDict({n: nn.Sequential(nn.Linear(8, 8)) for n in "ab"})
        self.head = nn.Linear(8, 2)

    def forward(self, x, expert="a"):
        return self.head(self.experts[expert](self.block(x)))


def adapted(targets=("caller", "reader"), reading=True, **options):
    torch.manual_seed(0)
    model = Model()
    model.block.reading = reading
    return fastlora.inject(model, config(target_modules=list(targets), modules_to_save=["head"]), **options)


def step(model, optimizer=None, **kwargs):
    if optimizer is not None:
        optimizer.zero_grad()
    model(torch.randn(4, 8), **kwargs).square().sum().backward()
    if optimizer is not None:
        optimizer.step()


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def hooks(model):
    """Hooks that the check holds anywhere in the model."""
    found = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [h for h in found if "learning_check" in (getattr(h, "__module__", None) or type(h).__module__)]


class TestPassedBy:
    @pytest.mark.parametrize("optimise", [False, True])
    def test_the_next_forward_raises(self, optimise):
        model = adapted()
        optimizer = sgd(model) if optimise else None
        step(model, optimizer)
        for _ in range(2):  # not only once: a notebook's cell may be run again
            with pytest.raises(RuntimeError, match=PASSED_BY) as caught:
                step(model, optimizer)
        assert "caller" not in str(caught.value).replace("calling", "")

    def test_the_tracker_s_step_raises(self):
        model = adapted()
        with fastlora.track(model) as tracker:
            step(model)
            with pytest.raises(RuntimeError, match=PASSED_BY):
                tracker.step()

    def test_every_adapter_of_the_model(self):
        model = adapted(["reader"])
        optimizer = sgd(model)
        step(model, optimizer)
        with pytest.raises(RuntimeError, match=PASSED_BY):
            step(model, optimizer)

    def test_a_warning_on_request(self, caplog):
        model = adapted(check="warn")
        for _ in range(3):
            step(model)
        assert caplog.text.count("never ran although") == 1 and "block.reader" in caplog.text
        assert not hooks(model)

    def test_nothing_on_request(self, caplog):
        model = adapted(check="off")
        assert not hooks(model)
        for _ in range(3):
            step(model)
        assert not said(caplog)

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_are_watched_for_themselves(self, way):
        model = adapted()
        other = way(model)
        step(other)
        with pytest.raises(RuntimeError, match=PASSED_BY):
            step(other)
        step(model)
        with pytest.raises(RuntimeError, match=PASSED_BY):
            step(model)

    def test_an_adapter_that_came_later(self):
        model = adapted(["caller"])
        step(model)
        step(model)
        fastlora.add_adapter(model, "b", config(target_modules=["reader"]))
        model.zero_grad()
        with fastlora.use_adapters(model, "b"):
            step(model)
            with pytest.raises(RuntimeError, match=PASSED_BY):
                step(model)

    def test_a_branch_that_the_first_batch_did_not_need(self, caplog):
        class Tasks(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.a, self.b = (nn.Linear(8, 8) for _ in range(3))
                nn.init.normal_(self.b.weight)

            def forward(self, x, task):
                return getattr(self, task)(self.body(x))

        model = fastlora.inject(Tasks(), config(target_modules=["body", "a", "b"]))
        for task in "abab":
            model(torch.randn(4, 8), task).sum().backward()
        assert caplog.text.count("never ran although") == 1 and ": b (in" in caplog.text
        assert all(p.grad is not None for p in model.b.lora_A.parameters())

    @pytest.mark.parametrize("check", ["error", None, True])
    def test_bad_modes(self, check):
        model = Model()
        with pytest.raises(ValueError, match="check: expected one of"):
            fastlora.inject(model, config(target_modules=["caller"]), check=check)
        assert type(model.block.caller) is nn.Linear


class TestNotYet:
    def test_before_the_first_backward(self):
        model = adapted()
        for _ in range(3):
            model(torch.randn(4, 8))
        with torch.no_grad():
            model(torch.randn(4, 8))

    def test_a_part_that_was_not_routed_to(self, caplog):
        model = adapted(["caller", "experts.a.0", "experts.b.0"])
        step(model)
        step(model)
        step(model, expert="b")
        assert caplog.text.count("have not run so far: experts.b.0") == 1 and "never ran" not in caplog.text
        assert not hooks(model)

    def test_a_frozen_phase(self, caplog):
        model = adapted(["caller", "experts.a.0"])
        x = torch.randn(4, 8)
        optimizer = sgd(model)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.no_grad():
                y = model.block(x)
            model.head(model.experts["a"](y)).square().sum().backward()
            optimizer.step()
            model(x)
        assert caplog.text.count("got no gradient so far: block.caller") == 1
        assert "experts" not in caplog.text and "never ran" not in caplog.text

    def test_frozen_adapters(self, caplog):
        model = adapted(["caller", "experts.a.0"])
        model.block.caller.lora_A.requires_grad_(False), model.block.caller.lora_B.requires_grad_(False)
        step(model)
        step(model)
        assert not said(caplog)

    def test_an_owner_that_only_ran_without_gradients(self, caplog):
        model = adapted(["reader", "experts.a.0"])
        x = torch.randn(4, 8)
        for _ in range(2):
            with torch.no_grad():
                y = model.block(x)
            model.head(model.experts["a"](y)).square().sum().backward()
        model(x)
        assert "have not run so far: block.reader" in caplog.text


class TestNoTrace:
    def test_everything_is_gone_after_the_first_backward(self, caplog):
        model = adapted(reading=False)
        assert len(hooks(model)) == 2
        model(torch.randn(4, 8))
        assert len(hooks(model)) == 1  # owners whose adapters all ran are not looked at again
        step(model)
        step(model)
        assert not hooks(model) and not said(caplog)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing(self, reentrant, caplog):
        model = adapted(["caller", "reader", "experts.a.0"], reading=False)
        block = model.block.forward
        model.block.forward = lambda x: checkpoint(block, x.requires_grad_(), use_reentrant=reentrant)
        for _ in range(2):
            step(model)
        assert not said(caplog)

    def test_under_compile(self, caplog):
        model = adapted(reading=False)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            step(compiled)
        assert not said(caplog)

    def test_new_ranks_and_loaded_weights(self, caplog):
        model = adapted(reading=False)
        fastlora.set_ranks(model, {"block.caller": 2})
        model.load_state_dict(model.state_dict())
        for _ in range(2):
            step(model)
        assert "never ran" not in caplog.text


def normed(model):
    torch.nn.utils.parametrizations.weight_norm(model.block.caller.lora_A["default"])


CHANGES = {
    "init": lambda model: torch.nn.init.xavier_uniform_(model.head.weight),
    "load": lambda model: model.head.load_state_dict(nn.Linear(8, 2).state_dict()),
    "parametrized": normed,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_before_the_first_forward_has_not_learned(change, caplog):
    """Nothing is said before a backward, and the check still looks for what never ran."""
    model = adapted(("caller", "experts.a.0"), reading=False)
    CHANGES[change](model)
    for _ in range(3):
        model(torch.randn(4, 8), expert="b")
    assert not said(caplog)
    step(model, expert="b")
    model(torch.randn(4, 8))
    assert [text for text in said(caplog) if "have not run so far: experts.a.0" in text]


def test_a_model_that_is_called_in_parts_is_looked_at(caplog):
    """Gradients are gone by then: the optimizer has changed what was seen in the forwards of the parts."""
    model = adapted(("caller", "experts.a.0"), reading=False)
    optimizer = sgd(model)
    model.head(model.block(torch.randn(4, 8))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.fastlora_learning.examine()
    assert said(caplog) == ["adapters of modules that have not run so far: experts.a.0"]


@pytest.mark.parametrize("new_ranks", [{}, {"block.caller": 3, "experts.a.0": 1}], ids=["as injected", "new ranks"])
def test_new_ranks_are_watched_in_place_of_the_old(new_ranks, caplog):
    model = adapted(("caller", "experts.a.0"))
    fastlora.set_ranks(model, new_ranks)
    optimizer = sgd(model)
    for _ in range(3):
        step(model, optimizer)
        optimizer.zero_grad()
    assert "got no gradient" not in caplog.text


class CalledAndRead(nn.Module):
    """``proj`` is called in one place and read in another; ``other`` is asked for its dtype and called."""

    def __init__(self):
        super().__init__()
        self.proj, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x.to(self.other.weight.dtype) if isinstance(self.other.weight, torch.Tensor) else x
        return self.other(self.proj(x)) + F.linear(x, getattr(self.proj, "weight"))  # noqa: B009


class Elsewhere(nn.Module):
    """The output of ``block.reader`` is used, and its weight by somebody else."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"reader": nn.Linear(8, 8)})

    def forward(self, x):
        weight = self.block["reader"].weight
        return self.block["reader"](x) @ weight


@pytest.mark.parametrize("check", ["raise", "warn", "off"])
@pytest.mark.parametrize("mode", ["train", "eval", "no gradients"])
@pytest.mark.parametrize(
    ("build", "targets"), [(CalledAndRead, ["proj", "other"]), (Reader, ["reader"]), (Elsewhere, ["reader"])]
)
def test_a_weight_that_is_read_is_named_in_every_mode(build, targets, mode, check, caplog):
    model = fastlora.inject(nn.Sequential(build()), config(target_modules=targets), check=check)
    model.train(mode == "train")
    with torch.set_grad_enabled(mode != "no gradients"):
        for _ in range(2):
            model(torch.randn(3, 8))
    assert caplog.text.count("read besides the call") == (check != "off")
    assert (f"{targets[0]}' is read" in caplog.text) == (check != "off") and "other" not in caplog.text


def test_reads_outside_of_forwards_and_of_merged_weights_are_none(caplog):
    model = fastlora.inject(nn.Sequential(CalledAndRead()), config(target_modules=["proj"]))
    assert model[0].proj.weight.sum() is not None
    fastlora.merge(model)
    model(torch.randn(3, 8))
    assert not said(caplog)
    fastlora.unload(fastlora.unmerge(model))
    model(torch.randn(3, 8))
    assert not said(caplog) and "reads" not in vars(model[0].proj)


def test_an_owner_that_reads_in_another_method_is_refused():
    transformers = pytest.importorskip("transformers")
    small = transformers.WavLMConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8,),
        conv_stride=(4,), conv_kernel=(4,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=1,
    )  # fmt: skip
    model = transformers.WavLMModel(small)
    with pytest.raises(ValueError, match=r"WavLMAttention reads q_proj\.weight instead of calling q_proj"):
        fastlora.inject(model, config(target_modules=["q_proj"]))
    fastlora.inject(model, config(target_modules=["intermediate_dense"]))


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_owners_that_were_taken_over_are_not_named(kind, caplog):
    fastlora.inject(nn.Sequential(kind(8, 2)), config(target_modules=["out_proj"]))
    assert not said(caplog)
