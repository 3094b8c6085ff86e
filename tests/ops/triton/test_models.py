"""Every model family through the Triton backend on tensors without values: its launches, shapes and devices."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from support import model_zoo  # noqa: E402
from support.helpers import config  # noqa: E402
from support.model_zoo import ZOO, build  # noqa: E402
from support.without_values import META, record_launches  # noqa: E402

import fastlora  # noqa: E402

# Their own code reads values: a mask, padding.
READING = {"torch_encoder", "deberta_v2", "deberta_v3"}


@pytest.mark.parametrize("name", [name for name in ZOO if name not in READING])
def test_a_step_of_a_whole_model(name, monkeypatch):
    made = {kind: getattr(model_zoo, kind) for kind in ("ids", "real")}
    for kind, function in made.items():
        monkeypatch.setattr(model_zoo, kind, lambda *given, function=function: function(*given).to(META))
    model = fastlora.inject(build(name).train(), config(target_modules="all-linear", r=1)).to(META)
    launched = record_launches(monkeypatch)
    with fastlora.track(model, statistics=("grad_sq", "act_var")) as tracker:
        ZOO[name].run(model).square().sum().backward()
        tracker.step()
    assert {"shrink_kernel", "wgrad_kernel", "signs_kernel"} <= set(launched)
    assert {"linear_kernel", "expand_kernel"} & set(launched)
    adapters = {key: p.grad for key, p in model.named_parameters() if "lora_" in key}
    assert [key for key, grad in adapters.items() if grad is None or grad.device != META] == []
