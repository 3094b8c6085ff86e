"""``fastlora doctor`` and ``fastlora inspect``: what they say, and that they can say no."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from support.helpers import config, randomise

import fastlora
from fastlora.cli import doctor
from fastlora.cli.__main__ import main
from fastlora.cli.doctor import OPERATORS
from fastlora.ops import native
from fastlora.ops.backends import BACKENDS


def test_every_backend_is_tested_or_says_why_not(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tests = found["self_tests"]
    assert {(test["operator"], test["backend"]) for test in tests} == {(o, b) for o in OPERATORS for b in BACKENDS}
    assert all(test["verdict"] == "right" or test["reason"] for test in tests)
    right = {(test["operator"], test["backend"], test["dtype"]) for test in tests if test["verdict"] == "right"}
    for operator in OPERATORS:
        assert (operator, "reference", "float32") in right
        assert operator == "penalty" or (operator, "eager", "bfloat16") in right
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["native"]["available"] == (found["native"]["reason"] is None)


def test_a_line_for_each_backend_and_all_tests_on_request(capsys):
    assert main(["doctor"]) == 0
    short = capsys.readouterr().out.splitlines()
    about = [line for line in short if line.startswith(("right", "not here"))]
    for backend in BACKENDS:
        assert sum(f" {backend} on cpu" in line for line in about) == 1
    assert sum(line.startswith("torch's ") for line in short) == 1
    for command in (["doctor", "-v"], ["-v", "doctor"]):
        assert main(command) == 0
        told = capsys.readouterr().out.splitlines()
        assert sum(" by eager cpu float32: " in line for line in told) == len(OPERATORS)


@pytest.mark.parametrize("broken", ["numbers", "raises"])
def test_a_backend_that_is_wrong_is_found(broken, monkeypatch, capsys):
    plain = type(BACKENDS["reference"]).forward

    def forward(self, call):
        outputs, h, moments = plain(self, call)
        if self.name != "eager" or call.rows is not None:
            return outputs, h, moments
        if broken == "raises":
            raise RuntimeError("no such kernel")
        return [1.5 * y for y in outputs], h, moments

    monkeypatch.setattr(type(BACKENDS["eager"]), "forward", forward)
    assert main(["doctor"]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong")]
    assert {line.split()[1] for line in wrong} == {"lora_linear"}
    assert all("by eager cpu" in line for line in wrong)
    assert broken == "numbers" or "no such kernel" in wrong[0]


def test_an_operator_that_is_wrong_is_found(monkeypatch):
    kind = type(BACKENDS["eager"])
    for operator, owner, name, own in (
        ("lora_grouped", kind, "forward", True),
        ("gradstat", kind, "gradstat", True),
        ("penalty", doctor.penalty, "penalty", False),
    ):
        if operator == "penalty" and not native.available():
            continue  # this operator is the native library's
        plain = getattr(owner, name)

        def wrong(*args, plain=plain, own=own, operator=operator, **kwargs):
            many = operator != "lora_grouped" or args[1].rows is not None
            if own and many and args[0].name == "eager":
                raise RuntimeError("no such kernel")
            return plain(*args, **kwargs) if own else 1.5 * plain(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            found = {test["operator"] for test in doctor.self_tests() if test["verdict"] == "wrong"}
        assert found == {operator}


def test_overrides_are_named(monkeypatch):
    monkeypatch.setenv("FASTLORA_CPU_ENGINE", "linear")
    assert any("FASTLORA_CPU_ENGINE=linear" in clash for clash in doctor.clashes())


MODELS = """
import torch, peft

plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
number = 3
wrapped = lambda: peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module in the working directory, as a user's script is."""
    (tmp_path / "models_of_a_user.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    yield "models_of_a_user"
    sys.modules.pop("models_of_a_user", None)


def test_a_model_wrapped_by_peft_is_a_clash(models, capsys):
    pytest.importorskip("peft")
    assert main(["doctor", "--model", f"{models}:plain"]) == 0
    assert "clash" not in capsys.readouterr().out
    assert main(["doctor", "--model", f"{models}:wrapped"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("clash")]
    assert "model: it is wrapped by PEFT (PeftModel); fastlora.from_peft takes its adapter over" in line
    assert main(["doctor", "--json", "--model", f"{models}:wrapped"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"] and len(found["model"]) == 1


@pytest.mark.parametrize(
    "where, said",
    [
        ("plain", "expected MODULE:NAME of a model or of a function that makes one, got 'plain'"),
        ("no_such_module_here:model", "No module named 'no_such_module_here'"),
        ("models_of_a_user:plane", "has no attribute 'plane'"),
        ("models_of_a_user:number", "models_of_a_user:number gives a int, expected a torch.nn.Module"),
    ],
)
def test_what_is_no_model_is_refused(models, where, said, capsys):
    before = list(sys.path)
    assert main(["doctor", "--model", where]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastlora: --model: ") and said in message
    assert sys.path == before


@pytest.fixture
def adapter(build, tmp_path):
    model = fastlora.inject(build("timm_vit"), config(r=3, lora_alpha=6, target_modules=["qkv", "fc1"], split_qkv=True))
    first = next(row.key for row in fastlora.summary(model).rows)
    fastlora.set_ranks(model, {first: 1})
    randomise(model)
    fastlora.save(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_inspect_shows_what_the_model_has(adapter, tmp_path, capsys):
    model, path = adapter
    assert main(["inspect", str(path), "--plot", str(tmp_path / "map.png")]) == 0
    shown = capsys.readouterr().out
    summary = fastlora.summary(model)
    for row in summary.rows:
        (line,) = [line.split() for line in shown.splitlines() if line.split()[:1] == [row.key]]
        assert int(line[1]) == row.rank and int(line[5].replace(",", "")) == row.params
        assert float(line[2]) == 2.0  # alpha / r stays when ranks change
    assert f"{summary.adapter_params:,} parameters" in shown
    header = next(line.split() for line in shown.splitlines() if line.startswith("depth"))
    assert header == ["depth", "attn.qkv[q]", "attn.qkv[k]", "attn.qkv[v]", "mlp.fc1"]
    assert "0 1 3 3 3" in [" ".join(line.split()) for line in shown.splitlines()]
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_inspect_refuses_what_is_no_adapter(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert "adapter_config.json: no such file" in capsys.readouterr().err
