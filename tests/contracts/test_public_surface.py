"""What a user's tools see of the public names: types that say something, and docstrings that say it all and run."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import re
import typing

import pytest
import torch
from support.bad_input_rows import ROWS
from torch import nn

import fastlora
import fastlora.integrations


def public():
    """Public functions and classes by name, those of ``training``, ``nn`` and ``integrations`` too."""
    every = {name: getattr(fastlora, name) for name in fastlora.__all__}
    names = {name: found for name, found in every.items() if not inspect.ismodule(found)}
    for part in ("training", "nn", "integrations"):
        module = getattr(fastlora, part)
        names |= {f"{part}.{name}": getattr(module, name) for name in module.__all__}
    for part, library in (("hf", "transformers"), ("lightning", "lightning")):
        if importlib.util.find_spec(library):
            module = importlib.import_module(f"fastlora.integrations.{part}")
            names[f"integrations.{part}.FastLoraCallback"] = module.FastLoraCallback
    return names


PUBLIC = public()


def own(kind, name):
    """Whether a method is ours: neither private nor another library's that we override."""
    above = [c for c in kind.__mro__ if not c.__module__.startswith("fastlora")]
    return not name.startswith("_") and not any(name in vars(base) for base in above)


def functions():
    """The same, and the methods and properties of public classes."""
    for name, found in PUBLIC.items():
        if inspect.isfunction(found):
            yield name, found
            continue
        for method, value in vars(found).items():
            value = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if inspect.isfunction(value) and own(found, method):
                yield f"{name}.{method}", value


FUNCTIONS = dict(functions())
EVERY = PUBLIC | FUNCTIONS


def text(name):
    """A docstring, and those that it leaves things to: ``See :func:`track```."""
    found = inspect.getdoc(EVERY[name]) or ""
    short = {other.rpartition(".")[2]: other for other in EVERY}
    for other in re.findall(r"(?:See|as in|of|as) :(?:func|meth|class):`~?\.?(?:\w+\.)*(\w+)`", found):
        if short.get(other, name) != name:
            found += "\n" + inspect.getdoc(EVERY[short[other]])
    return found


def parameters(name):
    """Those that are ours to describe: torch describes those of the class that ours is a drop-in for."""
    found = EVERY[name]
    if inspect.isclass(found) and issubclass(found, (nn.Module, torch.optim.lr_scheduler.LRScheduler)):
        parent = next(c for c in found.__mro__ if not c.__module__.startswith("fastlora"))
        inherited = {*inspect.signature(parent.__init__).parameters, "device", "dtype"}
    else:
        inherited = set()
    return [p for n, p in inspect.signature(found).parameters.items() if n not in inherited | {"self", "cls"}]


def returned(function):
    peft = pytest.importorskip("peft") if function is fastlora.to_peft else None
    names = {} if peft is None else {"PeftModel": peft.PeftModel}
    return typing.get_type_hints(inspect.unwrap(function), localns=names)["return"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_returned_has_a_type(name):
    """None is Any; values of a state dict and of parameter groups are, as torch's are. No argument picks a type."""
    kind = returned(FUNCTIONS[name])
    inside = [kind, *typing.get_args(kind)]
    if kind in (dict[str, typing.Any], list[dict[str, typing.Any]]):
        assert name.rpartition(".")[2] in ("state_dict", "param_groups", "load_checkpoint")
    else:
        assert typing.Any not in inside, kind
    assert typing.get_origin(kind) is not typing.Union


@pytest.mark.parametrize("name", [n for n, f in FUNCTIONS.items() if "model" in inspect.signature(f).parameters])
def test_a_model_that_comes_back_keeps_its_class(name):
    hints = typing.get_type_hints(inspect.unwrap(FUNCTIONS[name]), localns={"PeftModel": nn.Module})
    if nn.Module in (hints["return"], *typing.get_args(hints["return"])):
        assert name == "to_peft", "-> ModelT"


def test_the_decorator_of_the_config_keeps_its_class():
    """``dataclass_transform`` or a plain ``dataclass``: a checker sees the class and the fields of its ``__init__``."""
    assert inspect.isclass(fastlora.LoraConfig) and dataclasses.is_dataclass(fastlora.LoraConfig)
    fields = [field.name for field in dataclasses.fields(fastlora.LoraConfig)]
    assert fields == [p for p in inspect.signature(fastlora.LoraConfig).parameters]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_runs(name, tmp_path):
    found = PUBLIC[name]
    if name == "to_peft" or name == "from_peft":
        pytest.importorskip("peft")
    scope = {"fastlora": fastlora, "torch": torch, "nn": nn, "folder": tmp_path}
    (test,) = doctest.DocTestFinder(recurse=False).find(found, name, globs=scope)
    assert 1 <= len(test.examples) <= 7, "an example of about three lines"
    run(test)


def run(test):
    said = []
    torch.manual_seed(0)
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in PUBLIC])
def test_every_method_stands_in_an_example(name, tmp_path):
    """In its own, which runs, in its class's, or in that of the function that returns the class."""
    kind, _, method = name.rpartition(".")
    scope = {"fastlora": fastlora, "torch": torch, "nn": nn, "folder": tmp_path}
    makers = [n for n, f in PUBLIC.items() if inspect.isfunction(f) and f.__annotations__["return"] == kind]
    found = {n: doctest.DocTestFinder(recurse=False).find(EVERY[n], n, globs=scope) for n in (name, kind, *makers)}
    for test in found[name]:
        run(test)
    shown = "".join(example.source for tests in found.values() for test in tests for example in test.examples)
    assert re.search(rf"\.{method}\b", shown), "no example calls it"


@pytest.mark.parametrize("name", EVERY)
def test_every_argument_is_described(name):
    """By its name, or as one of the fields of ``LoraConfig`` that the docstring refers to."""
    said = text(name)
    fields = {field.name for field in dataclasses.fields(fastlora.LoraConfig)}
    known = fields if "LoraConfig" in said and name != "LoraConfig" else set()
    missing = [p.name for p in parameters(name) if p.name not in known and not re.search(rf"\b{p.name}\b", said)]
    assert not missing


@pytest.mark.parametrize("name", EVERY)
def test_errors_are_named(name):
    """Every type of error that bad input meets, and that a function has a ``raise`` or a check of its own for."""
    said, function = text(name), EVERY[name]
    wanted = {row.error.__name__ for rows in ROWS.get(name, {}).values() for row in rows}
    if name in FUNCTIONS and not wanted and re.search(r"\braise \w|\bcheck_\w+\(", inspect.getsource(function)):
        assert re.search(r"\w+Error\b", said)
    missing = [kind for kind in wanted if kind not in said]
    assert not missing, f"{name} does not say that it raises {missing}"
    if any(p.default is p.empty for p in parameters(name)) and name in PUBLIC:
        assert re.search(r"\w+Error\b", said)


@pytest.mark.parametrize("name", EVERY)
def test_tensors_have_a_shape(name):
    hints = inspect.get_annotations(EVERY[name]) if name in FUNCTIONS else {}
    tensors = [n for n, kind in hints.items() if re.search(r"\bTensor\b", str(kind))]
    if name in PUBLIC and issubclass(EVERY[name] if inspect.isclass(EVERY[name]) else int, nn.Module):
        tensors.append("weight")
    said = text(name)
    assert not tensors or re.search(r"\[[\w ,/*.+()]*\]|scalar|state", said), tensors


# What counts, names, moves or keeps, and computes nothing.
NO_FORMULA = """
LoraConfig.coerce LoraConfig.preset Scores.kind Scores.signed Scores.costs Scores.breakdown Tracker.steps Tracker.every
Tracker.close Tracker.mask Tracker.step Tracker.discard Tracker.skipped Tracker.state_dict Tracker.load_state_dict
adapter_names use_adapters delete_adapter disable_adapters explain freeze_unused_adapters from_peft load param_groups
apply_policy roles save set_adapter set_ranks summary unload unmerge Scores training.Diagnostics.close
nn.Conv1D.as_matrix nn.MultiheadAttention.hold nn.TransformerEncoderLayer
""".split()


@pytest.mark.parametrize("name", [n for n in EVERY if n not in NO_FORMULA and not n.startswith("integrations.")])
def test_what_computes_has_its_formula(name):
    assert re.search(r"\.\. math::|``[^`]*(?:[=←Σ*/]|sum_|\^T)[^`]*``| [=/] \w", text(name))


def test_the_names_without_a_formula_exist():
    assert set(NO_FORMULA) <= set(EVERY) and len(NO_FORMULA) < len(EVERY) / 2
