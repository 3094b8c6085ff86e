"""Whatever name is misspelt, the error says which one was meant."""

from __future__ import annotations

import copy
import inspect
import pathlib
import pickle
import re

import pytest
import torch
from support.public_calls import adapted, batches, plain
from torch import nn

import fastlora
from fastlora._utils.errors import suggestion, unknown_choice
from fastlora.peft_io.convert import load_layout


def config(**fields):
    return fastlora.LoraConfig(**{"target_modules": ["q"], **fields})


def loss(model, batch):
    return model(batch[0]).square().mean()


SCORES = {"a": 1.0, "b": 2.0}
RATES = dict(lr_lora=1e-3)


def tracked_scores(kind):
    with fastlora.track(adapted(), every=1) as tracker:
        tracker.scores(kind)


def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)


# What is called with a misspelt name, and the name that was meant.
MISSPELT = {
    "role": (lambda: fastlora.inject(plain(), config(target_modules="al-linear")), "all-linear"),
    "target": (lambda: fastlora.inject(plain(), config(target_modules=["blocks.0.qq"])), "blocks.0.q"),
    "exclude": (lambda: fastlora.inject(plain(), config(exclude_modules=["blocks.1.qq"])), "blocks.1.q"),
    "modules_to_save": (lambda: fastlora.inject(plain(), config(modules_to_save=["heed"])), "head"),
    "rank_pattern": (lambda: fastlora.inject(plain(), config(rank_pattern={"blocks.1.qq": 2})), "blocks.1.q"),
    "config field": (lambda: config(lora_alfa=3), "lora_alpha"),
    "config choice": (lambda: config(bias="lora-only"), "lora_only"),
    "backend": (lambda: config(backend="nativ"), "native"),
    "check": (lambda: fastlora.inject(plain(), config(), check="rise"), "raise"),
    "method": (lambda: fastlora.calibrate(adapted(), batches(), loss, method="fimm"), "fim"),
    "policy": (lambda: fastlora.apply_policy(plain(), "deep-lora", config()), "deep_lora"),
    "preset": (lambda: fastlora.LoraConfig.preset("midium"), "medium"),
    "statistic": (lambda: fastlora.track(adapted(), statistics="grad_sqq"), "grad_sq"),
    "estimator": (lambda: fastlora.track(adapted(), estimator="exakt"), "exact"),
    "kind": (lambda: tracked_scores("grad-sq"), "grad_sq"),
    "rule": (lambda: fastlora.allocate(SCORES, budget=4, rule="webstr"), "webster"),
    "normalize": (lambda: fastlora.Scores.composite(SCORES, SCORES, SCORES, normalize="zskore"), "zscore"),
    "ranks": (lambda: fastlora.set_ranks(adapted(), {"blocks.0.qq": 2}), "blocks.0.q"),
    "scores": (lambda: fastlora.reallocate(adapted(), {"blocks.0.qq": 2.0}, budget=4), "blocks.0.q"),
    "freeze_by": (
        lambda: fastlora.training.Cosine(optimizer(), 4, freeze=1, freeze_by="requires-grad"),
        "requires_grad",
    ),
    "layout": (lambda: load_layout(plain(), {}, "torchtun", lora_alpha=2), "torchtune"),
    **{
        f"adapter of {name}": (lambda call=call: call(adapted(), "defualt"), "default")
        for name, call in {
            "summary": fastlora.summary,
            "merge": fastlora.merge,
            "save": lambda model, adapter: fastlora.save(model, "nowhere", adapter),
            "set_adapter": fastlora.set_adapter,
            "delete_adapter": fastlora.delete_adapter,
            "set_ranks": lambda model, adapter: fastlora.set_ranks(model, {}, adapter=adapter),
            "track": lambda model, adapter: fastlora.track(model, adapter=adapter),
            "param_groups": lambda model, adapter: fastlora.param_groups(model, **RATES, adapter=adapter),
            "to_peft": fastlora.to_peft,
        }.items()
    },
}


@pytest.mark.parametrize("name", MISSPELT)
def test_the_nearest_name_is_said(name):
    call, meant = MISSPELT[name]
    with pytest.raises(
        TypeError if meant == "lora_alpha" else ValueError, match=re.escape(f"(did you mean {meant!r}?)")
    ):
        call()


@pytest.mark.parametrize("module", ["hf", "lightning"])
def test_options_of_the_callbacks(module):
    callbacks = pytest.importorskip(f"fastlora.integrations.{module}", exc_type=ImportError)
    for options, meant in (
        (dict(track={"wamup": 3}), "warmup"),
        (dict(penalty={"wieght": 1.0}), "weight"),
        (dict(checkpoints="adaptors"), "adapters"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"(did you mean {meant!r}?)")):
            callbacks.FastLoraCallback(**options)


def test_nothing_is_said_where_nothing_is_near_and_of_what_is_no_name():
    for name, known in (("zzzz", ["default"]), (3, ["3"]), ("a", []), ("a", ["a"])):
        assert suggestion(name, known) == ""
    assert suggestion("tru", ["true", True, None]) == " (did you mean 'true'?)"
    error = unknown_choice("mode", 3, ("a", None), " or a callable")
    assert str(error) == "mode: expected one of ('a', None) or a callable, got 3"


def test_configs_are_copied_and_pickled_as_before():
    made = config(r=3)
    made.peft_rules = True
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other == made and other.peft_rules is True
    assert fastlora.LoraConfig(5).r == 5
    assert list(inspect.signature(fastlora.LoraConfig).parameters)[:2] == ["r", "lora_alpha"]


def test_choices_are_refused_in_one_place():
    """An error that lists names and makes no suggestion would be written by hand."""
    package = pathlib.Path(fastlora.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "expected one of" in path.read_text()]
    assert found == ["errors.py"]
