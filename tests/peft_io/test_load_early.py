"""Adapters of models that have no values yet, on the meta device, and of those in a server's inference mode."""

from __future__ import annotations

import pytest
import torch
from support.helpers import config, randomise
from torch import nn

import fastlora


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


CONFIG = config(r=2, target_modules=["body"], modules_to_save=["head", "norm"])
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def saved(tmp_path):
    """A folder, and the outputs of the model that was saved there."""
    model = randomise(fastlora.inject(net(), CONFIG)).train()
    model(X)  # the norm's buffers
    for parameter in model.head.parameters():
        nn.init.normal_(parameter)
    fastlora.save(model.eval(), tmp_path)
    return tmp_path, model(X)


def on_meta():
    with torch.device("meta"):
        return Net().eval()


def filled(model):
    model.load_state_dict({k: v for k, v in net().state_dict().items() if "body" in k}, strict=False, assign=True)
    return model


@pytest.mark.parametrize("injected", [False, True])
def test_files_are_loaded_before_the_base(saved, injected):
    folder, expected = saved
    model = fastlora.inject(on_meta(), CONFIG) if injected else on_meta()
    fastlora.load(model, folder)
    assert not any(p.is_meta for p in model.head.parameters())
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    filled(model)
    torch.testing.assert_close(model(X), expected)
    model(X).sum().backward()
    assert wanted == {name for name, p in model.named_parameters() if p.grad is not None}
    fastlora.save(model, folder / "again")
    torch.testing.assert_close(fastlora.load(net(), folder / "again")(X), expected)


def test_a_second_file_on_meta(saved):
    folder, expected = saved
    plain = folder / "plain"
    fastlora.save(randomise(fastlora.inject(net(), config(r=3, target_modules=["body"]))), plain)
    model = fastlora.load(fastlora.load(on_meta(), folder), plain, adapter="b")
    torch.testing.assert_close(filled(model)(X), expected)


def test_factors_without_values_are_named(saved):
    model = filled(fastlora.inject(on_meta(), config(r=2, target_modules=["body"])))
    with pytest.raises(ValueError, match=r"adapter 'default': expected factors .* on cpu, .* got \(2, 8\) on meta"):
        model.body(X)


@pytest.mark.parametrize("born", ["outside", "inside", "injected inside"])
def test_loading_in_inference_mode(saved, born):
    folder, expected = saved
    with torch.inference_mode(born != "outside"):
        model = net() if born != "injected inside" else fastlora.inject(net(), CONFIG)
    with torch.inference_mode():
        fastlora.load(model, folder)
        torch.testing.assert_close(model(X), expected)
    if born == "outside":
        torch.testing.assert_close(model(X), expected)
        model(X).sum().backward()


def test_adapters_made_in_inference_mode_can_be_trained():
    model = net()
    with torch.inference_mode():
        fastlora.inject(model, CONFIG)
        fastlora.add_adapter(model, "b", config(r=3, target_modules=["body"]))
        fastlora.set_ranks(model, {"body": 1})
    assert not any(p.is_inference() for p in model.parameters())
    for name in ("default", "b"):
        with fastlora.use_adapters(model, name):
            model(X).sum().backward()
        assert model.body.lora_B[name].weight.grad.any()
