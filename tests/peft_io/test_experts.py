"""Experts that are one parameter: ``target_parameters``, files and outputs as PEFT's, both ways."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.experts_zoo import IDS, MODELS, loss_of, moe, ranks_of
from support.helpers import config, randomise
from support.peft_help import CONFIG, SIDE, TENSORS, peft

import fastlora
from fastlora.model.modules import role_targets
from fastlora.nn.linear import adapted_layers

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CASES = [(name, BOTH) for name in MODELS] + [
    ("Mixtral", ["mlp.experts.down_proj"]),
    ("GptOss", ["experts.gate_up_proj"]),
]


def peft_model(name, parameters, **fields):
    torch.manual_seed(1)
    fields = {"r": 3, "lora_alpha": 6, "target_modules": [], **fields}
    model = peft.get_peft_model(moe(name), peft.LoraConfig(target_parameters=parameters, **fields))
    for n, p in model.named_parameters():
        if ".lora_" in n:
            p.data.normal_(std=0.3)
    return model.eval()


def outputs(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name, parameters", CASES, ids=str)
class TestAsPeft:
    def test_a_file_of_peft(self, name, parameters, tmp_path):
        theirs = peft_model(name, parameters)
        theirs.save_pretrained(tmp_path)
        ours = fastlora.load(moe(name), tmp_path)
        torch.testing.assert_close(outputs(ours), outputs(theirs))
        assert sum(row.rank for row in fastlora.summary(ours).rows) == 3 * 6 * len(adapted_layers(ours))
        fastlora.save(ours, tmp_path / "again")
        before, after = load_file(tmp_path / TENSORS), load_file(tmp_path / "again" / TENSORS)
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)

    def test_a_file_of_ours_with_a_rank_for_each_expert(self, name, parameters, tmp_path):
        ours = moe(name)
        paths = [p for p in role_targets(ours, "experts") if any(p.endswith(s) for s in parameters)]
        fields = dict(r=2, target_parameters=parameters, target_modules=None, rank_pattern=ranks_of(ours, paths))
        randomise(fastlora.inject(ours, config(**fields)))
        for layer in adapted_layers(ours).values():
            layer.rescale("default", {n: 0.5 + int(n) / 4 for n in layer.slices})
        fastlora.save(ours, tmp_path)
        theirs = peft.PeftModel.from_pretrained(moe(name), tmp_path).eval()
        torch.testing.assert_close(outputs(theirs), outputs(ours))
        again = fastlora.load(moe(name), tmp_path)
        torch.testing.assert_close(outputs(again), outputs(ours))
        ranks = [{p: layer.ranks() for p, layer in adapted_layers(m).items()} for m in (ours, again)]
        assert ranks[0] == ranks[1] and len(set(ranks[0][paths[0]].values())) == 4
        (tmp_path / SIDE).unlink()
        dense = fastlora.load(moe(name), tmp_path)
        torch.testing.assert_close(outputs(dense), outputs(ours))

    def test_converted_models(self, name, parameters):
        theirs = peft_model(name, parameters)
        ours = fastlora.from_peft(theirs)
        torch.testing.assert_close(outputs(ours), outputs(theirs))
        torch.testing.assert_close(outputs(fastlora.to_peft(ours).eval()), outputs(theirs))


@pytest.mark.parametrize("target", [[], ["q_proj"], ["q_proj", "v_proj"]])
def test_a_config_of_peft_means_the_same(target):
    given = dict(
        r=3, lora_alpha=6, target_modules=target, target_parameters=BOTH, rank_pattern={"experts.down_proj": 2}
    )
    theirs = peft.get_peft_model(moe(), peft.LoraConfig(**given))
    ours = fastlora.inject(moe(), peft.LoraConfig(**given))
    count = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)  # noqa: E731
    assert count(ours) == count(theirs)
    with pytest.raises(ValueError, match="lora_dropout: expected 0 with experts"):
        fastlora.inject(moe(), peft.LoraConfig(**given, lora_dropout=0.1))
    both = fastlora.inject(moe(), config(**given))
    assert count(both) == count(theirs)


def test_one_step_as_peft_takes_it(tmp_path):
    theirs = peft_model("Mixtral", BOTH)
    theirs.save_pretrained(tmp_path / "before")
    ours = fastlora.load(moe(), tmp_path / "before")
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss_of(model).backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "theirs")
    fastlora.save(ours, tmp_path / "ours")
    a, b = (load_file(tmp_path / name / TENSORS) for name in ("theirs", "ours"))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(b[key], a[key])


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = randomise(fastlora.inject(moe(), config(r=2, target_modules="experts")))
    fastlora.save(model, tmp_path)
    fields, tensors = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / TENSORS)
    assert fields["target_modules"] == [] and fields["target_parameters"] == ["down_proj", "gate_up_proj"]
    (tmp_path / SIDE).unlink()
    plain = moe()
    before = copy.deepcopy(plain.state_dict())
    key = next(k for k in tensors if k.endswith("lora_A.weight"))
    for changed, match in (
        ({**tensors, key: tensors[key][:-1]}, f"{key}.* has shape"),
        ({k: t for k, t in tensors.items() if k != key}, "missing"),
    ):
        save_file(changed, tmp_path / TENSORS)
        with pytest.raises(ValueError, match=match):
            fastlora.load(plain, tmp_path)
    save_file(tensors, tmp_path / TENSORS)
    for targets in (["experts.gate_up_proj"], ["q_proj.weight"]):
        (tmp_path / CONFIG).write_text(json.dumps({**fields, "target_parameters": targets}))
        with pytest.raises(ValueError, match="adapts|target_parameters: expected suffixes"):
            fastlora.load(plain, tmp_path)
    assert plain.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_a_router_that_peft_trained_is_named(name, tmp_path):
    """PEFT's "all-linear" makes targets of routers, too."""
    peft.get_peft_model(moe(name), peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path)
    model = moe(name)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"target_parameters: 'gate.weight' is of a router \(.*\.gate, a .*Router\)"):
        fastlora.load(model, tmp_path)
    assert list(model.state_dict()) == before
