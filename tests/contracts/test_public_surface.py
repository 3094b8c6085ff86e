"""What a user's tools see of the public names: types that say something, and docstrings with an example that runs."""

from __future__ import annotations

import doctest
import inspect
import re
import typing

import pytest
import torch
from torch import nn

import fastlora


def public():
    """Public functions and classes by name, those of ``fastlora.training`` too."""
    every = {name: getattr(fastlora, name) for name in fastlora.__all__}
    names = {name: found for name, found in every.items() if not inspect.ismodule(found)}
    return names | {f"training.{name}": getattr(fastlora.training, name) for name in fastlora.training.__all__}


def functions():
    """The same, and the methods and properties of public classes."""
    for name, found in public().items():
        if inspect.isfunction(found):
            yield name, found
            continue
        for method, value in vars(found).items():
            value = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if inspect.isfunction(value) and not method.startswith("_"):
                yield f"{name}.{method}", value


FUNCTIONS = dict(functions())


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
        assert name.rpartition(".")[2] in ("state_dict", "param_groups")
    else:
        assert typing.Any not in inside, kind
    assert typing.get_origin(kind) is not typing.Union


@pytest.mark.parametrize("name", [n for n, f in FUNCTIONS.items() if "model" in inspect.signature(f).parameters])
def test_a_model_that_comes_back_keeps_its_class(name):
    hints = typing.get_type_hints(inspect.unwrap(FUNCTIONS[name]), localns={"PeftModel": nn.Module})
    if nn.Module in (hints["return"], *typing.get_args(hints["return"])):
        assert name == "to_peft", "-> ModelT"


@pytest.mark.parametrize("name", public())
def test_every_public_name_has_an_example_that_runs(name, tmp_path):
    found = public()[name]
    if name == "to_peft" or name == "from_peft":
        pytest.importorskip("peft")
    scope = {"fastlora": fastlora, "torch": torch, "nn": nn, "folder": tmp_path}
    (test,) = doctest.DocTestFinder(recurse=False).find(found, name, globs=scope)
    assert 1 <= len(test.examples) <= 7, "an example of about three lines"
    said = []
    torch.manual_seed(0)
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", public())
def test_errors_are_named(name):
    """What can be refused says so, with the type of the error."""
    found = public()[name]
    if any(p for p in inspect.signature(found).parameters if p not in ("self",)):
        assert re.search("Error|errors (?:are those of|as there)|See :func:", inspect.getdoc(found)), name
