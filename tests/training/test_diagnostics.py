"""Diagnostics of parameter groups over an epoch."""

from __future__ import annotations

import math

import pytest
import torch
from support.optimizer_help import backward, grouped
from torch import nn

from fastlora.training.diagnostics import Diagnostics


class TestDiagnostics:
    def test_means_over_an_epoch(self):
        model, optimizer = grouped(torch.optim.AdamW)
        with Diagnostics(optimizer) as watched:
            for epoch, steps in ((0, 4), (1, 3)):
                norms, updates, cosines = [], [], []
                for step in range(steps):
                    optimizer.zero_grad()
                    backward(model, 10 * epoch + step)
                    gradient = torch.cat([p.grad.flatten() for p in model["lora"].parameters()])
                    before = torch.cat([p.detach().flatten() for p in model["lora"].parameters()])
                    optimizer.step()
                    after = torch.cat([p.detach().flatten() for p in model["lora"].parameters()])
                    norms.append(gradient.norm().item())
                    updates.append((after - before).norm().item())
                    if epoch + step:
                        cosines.append(torch.cosine_similarity(gradient, previous, dim=0).item())  # noqa: F821
                    previous = gradient  # noqa: F841
                found = watched.epoch()
                assert list(found) == ["lora", "head"] and found["lora"].steps == steps
                assert found["lora"].gradient_norm == pytest.approx(sum(norms) / steps)
                assert found["lora"].update_norm == pytest.approx(sum(updates) / steps)
                assert found["lora"].cosine == pytest.approx(sum(cosines) / len(cosines))
            assert watched.epoch()["head"].steps == 0
        optimizer.step()
        assert watched.epoch()["lora"].steps == 0

    def test_frozen_groups_and_steps_that_are_not_finite(self):
        model, optimizer = grouped()
        watched = Diagnostics(optimizer)
        model["lora"].requires_grad_(False)
        backward(model)
        optimizer.step()
        found = watched.epoch()
        assert found["lora"].steps == 0 and math.isnan(found["lora"].gradient_norm) and math.isnan(found["lora"].cosine)
        assert found["head"].steps == 1 and math.isnan(found["head"].cosine)
        model["head"].weight.grad[0, 0] = math.inf
        optimizer.step()
        found = watched.epoch()
        assert found["head"].steps == 0 and math.isnan(found["head"].update_norm)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_is_measured_in_float32(self, dtype):
        generator = torch.Generator().manual_seed(0)
        parameter = nn.Parameter(torch.randn(64, 64, generator=generator).to(dtype))
        optimizer, values = torch.optim.SGD([parameter], lr=100.0), [parameter.detach().double()]
        first, more = ((1e-4 * torch.randn(64, 64, generator=generator)).to(dtype) for _ in range(2))
        gradients = [first, first + more]
        with Diagnostics(optimizer) as watched:
            for gradient in gradients:
                parameter.grad = gradient
                optimizer.step()
                values.append(parameter.detach().double())
        found, (g, h) = watched.epoch()["0"], (gradient.double() for gradient in gradients)
        assert found.gradient_norm == pytest.approx(float(g.norm() + h.norm()) / 2, rel=1e-5)
        updates = [float((after - before).norm()) for before, after in zip(values, values[1:], strict=False)]
        assert found.update_norm == pytest.approx(sum(updates) / 2, rel=1e-5)
        assert found.cosine == pytest.approx(float(torch.dot(g.flatten(), h.flatten()) / g.norm() / h.norm()), rel=1e-5)

    def test_names_of_groups(self):
        parameters = [nn.Parameter(torch.ones(1)) for _ in range(4)]
        names = [{"name": "lora", "adapter": "a"}, {"name": "lora", "adapter": "b"}, {}, {"name": "lora[a]"}]
        groups = [{"params": [p], **n} for p, n in zip(parameters, names, strict=True)]
        assert list(Diagnostics(torch.optim.SGD(groups, lr=0.1)).epoch()) == ["lora[a]", "lora[b]", "2", "lora[a].3"]
        with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got \["):
            Diagnostics(groups)
