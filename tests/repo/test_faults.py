"""Faults on purpose: killed, interrupted, out of memory, out of disk, not a number; the harness is tools/faults.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora.tracking import calibrate as restoring

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.append(str(TOOLS))
import faults  # noqa: E402
from small_model import adapted, batch, loss_fn, plain  # noqa: E402

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and forks")


def test_killed_while_saving(tmp_path):
    assert sum(faults.kills_during_save(tmp_path, 50).values()) == 50


def test_the_disk_is_full_while_saving(tmp_path):
    found = faults.full_disk(tmp_path, 211)
    assert found["old"] > 10 and found["new"] > 0


def test_no_memory_at_any_operation_of_backward():
    assert faults.out_of_memory(20) == 20


def _with_biases():
    torch.manual_seed(0)
    config = fastlora.LoraConfig(r=2, target_modules=["qkv"], lora_bias=True, init_lora_weights=False)
    return fastlora.inject(plain(), config, check="off")


def _with_rows():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(6, 8), "out": torch.nn.Linear(8, 8)})
    rows = {"embed": [1, 4]}
    config = fastlora.LoraConfig(r=2, target_modules=["out"], init_lora_weights=False, trainable_token_indices=rows)
    model = fastlora.inject(model, config, check="off")
    with torch.no_grad():
        model["embed"].token_adapter.rows("default").add_(1.0)
    return model


@pytest.mark.parametrize("made", [adapted, _with_biases, _with_rows])
def test_no_memory_at_any_operation_of_merge_and_unmerge(made):
    assert faults.out_of_memory_in_merge(made) > 20


def test_nan_in_one_layer_and_one_step():
    assert faults.not_a_number(3) == 6


def test_ctrl_c_in_calibration():
    """In a process of its own: what an interrupt leaves of torch's contexts would reach the tests after this one."""
    code = "import faults, sys; sys.exit(faults.ctrl_c(30)['interrupted'] <= 10)"
    path = os.pathsep.join([str(TOOLS), str(TOOLS.parent)])
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_ctrl_c_while_the_model_is_put_back():
    """The second half of the restoration would be missing: it begins anew, and the interrupt comes through after it."""
    done = []

    def work():
        done.append("begun")
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append("ended")

    with pytest.raises(KeyboardInterrupt):
        restoring.uninterrupted(work)
    assert done == ["begun", "begun", "ended"]


@pytest.mark.parametrize("statistics", [("grad_sq", "act_var"), ("fisher",)])
@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_a_discarded_step_leaves_no_trace(statistics, estimator):
    def scores(given_up):
        model = adapted()
        tracker = fastlora.track(model, estimator=estimator, statistics=statistics, every=1)
        for number in range(3):
            if given_up:
                loss_fn(model, batch(50 + number)).backward()
                model.zero_grad()
                tracker.discard()
            loss_fn(model, batch(number)).backward()
            tracker.step()
        return {kind: dict(tracker.scores(kind)) for kind in tracker.kinds}, tracker.steps

    assert scores(given_up=True) == scores(given_up=False)


def test_out_of_memory_in_the_allocator_itself():
    """A real refusal: a batch that no machine holds fails in forward, and the next one is as if it had not been."""
    model, other = adapted(), adapted()
    trackers = [fastlora.track(m, every=1) for m in (model, other)]
    with pytest.raises(RuntimeError, match="allocate|memory"):
        model(torch.zeros(1, 1, 8).expand(2**40, 5, 8))
    for m, tracker in zip((model, other), trackers, strict=True):
        loss_fn(m, batch(0)).backward()
        tracker.step()
    assert dict(trackers[0].scores()) == dict(trackers[1].scores())
