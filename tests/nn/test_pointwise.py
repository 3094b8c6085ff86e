"""Convolutions that multiply each position by one matrix: slices, outputs, gradients and statistics in float64."""

import copy

import pytest
import torch
from support.peft_help import peft
from torch import nn

import fastlora
from fastlora.model.eject import eject
from fastlora.nn.adapter import Slices
from fastlora.nn.linear import adapted_layers

LAYERS = {
    "1d": lambda: (nn.Conv1d(6, 16, 1), (3, 6, 5)),
    "2d": lambda: (nn.Conv2d(6, 16, 1), (3, 6, 4, 5)),
    "2d without bias": lambda: (nn.Conv2d(6, 16, 1, bias=False, padding="same"), (3, 6, 4, 5)),
    "2d with a stride": lambda: (nn.Conv2d(6, 16, 1, stride=(2, 3)), (3, 6, 5, 7)),
    "2d channels last": lambda: (nn.Conv2d(6, 16, 1).to(memory_format=torch.channels_last), (3, 6, 4, 5)),
    "2d one sample": lambda: (nn.Conv2d(6, 16, 1), (6, 4, 5)),
    "3d": lambda: (nn.Conv3d(6, 16, 1), (2, 6, 2, 3, 2)),
}
SLICES = {
    "one after another": Slices({"q": 1, "k": 6, "v": 9}),
    "by head": Slices({"q": 4, "k": 4, "v": 8}, 2),
    "whole": None,
}
EVERY = pytest.mark.parametrize("slices", SLICES)
KINDS = pytest.mark.parametrize("kind", LAYERS)


class Around(nn.Module):
    def __init__(self, qkv):
        super().__init__()
        self.qkv = qkv

    def forward(self, x):
        return torch.tanh(self.qkv(x)).contiguous()


def make(kind):
    torch.manual_seed(0)
    return Around(LAYERS[kind]()[0]).double()


def data(kind):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(LAYERS[kind]()[1], generator=generator, dtype=torch.float64)


def config(slices, **fields):
    split = {} if SLICES[slices] is None else {"split_qkv": {"qkv": SLICES[slices]}, "rank_pattern": {"qkv[q]": 1}}
    return fastlora.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["qkv"], **split, **fields})


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for p in [*layer.lora_A.parameters(), *layer.lora_B.parameters()]:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return model


def adapted(kind, slices, **fields):
    return randomised(fastlora.inject(make(kind), config(slices, **fields)))


def dense(kind, layer, adapter="default"):
    """The base whose weight is W + s B A, the rows of each slice written one by one."""
    plain = make(kind)
    W = plain.qkv.weight.detach().flatten(1).clone()
    for part, rows in layer.slices.items():
        A, B = (getattr(side[adapter], part).detach() for side in (layer.lora_A, layer.lora_B))
        own = [
            block * (16 // layer.slices.blocks) + start + i
            for block in range(layer.slices.blocks)
            for start in [sum(n // layer.slices.blocks for p, n in layer.slices.items() if [*layer.slices].index(p)
                              < [*layer.slices].index(part))]
            for i in range(rows // layer.slices.blocks)
        ]  # fmt: skip
        W[own] += layer.adapter_specs[adapter].scale[part] * B @ A
    plain.qkv.weight = nn.Parameter(W.view_as(plain.qkv.weight))
    return plain


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-11, **tolerance})


@EVERY
@KINDS
class TestNumbers:
    def test_output_and_every_gradient(self, kind, slices):
        model, x = adapted(kind, slices), data(kind).requires_grad_()
        plain, z = dense(kind, model.qkv), data(kind).requires_grad_()
        y, expected = model(x), plain(z)
        close(y, expected)
        for out in (y, expected):
            (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        close(x.grad, z.grad)
        G = plain.qkv.weight.grad.flatten(1)
        for part in model.qkv.slices:
            A, B = (getattr(side["default"], part) for side in (model.qkv.lora_A, model.qkv.lora_B))
            own, s = G[model.qkv.slices.rows(part)], 5 / 3
            close(A.grad, s * B.detach().T @ own)
            close(B.grad, s * own @ A.detach().T)

    def test_exact_statistics(self, kind, slices):
        model, x = adapted(kind, slices), data(kind)
        plain, kinds = dense(kind, model.qkv), ("grad_sq", "grad_abs", "act_var", "act_cov", "grad_cov")
        found = {}
        plain.qkv.register_forward_hook(lambda m, args, y: found.update(x=args[0], y=y))
        out = plain(x)
        found["y"].retain_grad()
        out.square().sum().backward()
        G, channel = plain.qkv.weight.grad.flatten(1), -1 - len(plain.qkv.kernel_size)
        stride = tuple(slice(None, None, s) for s in plain.qkv.stride)
        rows, y, dy = (
            t.detach().movedim(channel, -1).flatten(0, -2)
            for t in (found["x"][(..., *stride)], found["y"], found["y"].grad)
        )
        with fastlora.track(model, estimator="exact", statistics=kinds, ema=None) as tracker:
            model(x).square().sum().backward()
            tracker.step()
            for part in model.qkv.slices:
                key = "qkv" if part == "weight" else f"qkv[{part}]"
                mine = model.qkv.slices.rows(part)
                assert tracker.scores("grad_sq")[key] == pytest.approx(float(G[mine].square().sum()), rel=1e-9)
                assert tracker.scores("grad_abs")[key] == pytest.approx(float(G[mine].abs().mean()), rel=1e-9)
                expected = float(y[:, mine].var(dim=0, correction=0).sum())
                assert tracker.scores("act_var")[key] == pytest.approx(expected, rel=1e-9)
            close(tracker.covariances("act_cov")["qkv"], rows.T @ rows / len(rows))
            close(tracker.covariances("grad_cov")["qkv"], dy.T @ dy / len(dy))

    def test_probes_are_products_with_the_gradient(self, kind, slices):
        model, x = adapted(kind, slices), data(kind)
        plain = dense(kind, model.qkv)
        plain(x).square().sum().backward()
        G = plain.qkv.weight.grad.flatten(1)
        with fastlora.track(model, estimator="probe", probes=4, statistics=("grad_sq", "act_var")):
            model(x).square().sum().backward()
            probe = model.qkv.probes["default"]
            for part, Z in probe.Z.items():
                close(Z.grad, G[model.qkv.slices.rows(part)] @ probe.P.double().T)

    def test_merged_and_back(self, kind, slices):
        model, x = adapted(kind, slices), data(kind)
        before, weight = model(x), model.qkv.weight.clone()
        close(fastlora.merge(model)(x), before)
        close(model.qkv.weight, dense(kind, model.qkv).qkv.weight)
        assert torch.equal(fastlora.unmerge(model).qkv.weight, weight)
        close(model(x), before)

    def test_files(self, kind, slices, tmp_path):
        model, x = adapted(kind, slices), data(kind)
        fastlora.save(model, tmp_path)
        again = fastlora.load(make(kind), tmp_path)
        close(again(x), model(x))
        assert again.qkv.slices == model.qkv.slices and again.qkv.ranks() == model.qkv.ranks()
        theirs = peft.PeftModel.from_pretrained(make(kind), str(tmp_path))
        close(theirs(x), model(x), rtol=1e-6, atol=1e-7)
        close(fastlora.to_peft(model)(x), model(x))
        theirs.save_pretrained(str(tmp_path / "theirs"))
        close(fastlora.load(make(kind), tmp_path / "theirs")(x), model(x), rtol=1e-6, atol=1e-7)

    def test_at_first_the_very_output_of_the_base(self, kind, slices):
        base = make(kind)
        y = base.qkv(data(kind))
        mine = fastlora.inject(copy.deepcopy(base), config(slices)).qkv(data(kind))
        assert torch.equal(mine, y) and mine.stride() == y.stride()
        model = eject(adapted(kind, slices))
        assert type(model.qkv) is type(base.qkv) and torch.equal(model.qkv(data(kind)), y)
        assert model.state_dict().keys() == base.state_dict().keys()


@EVERY
def test_rows_of_several_adapters(slices):
    model, x = adapted("2d", slices), data("2d")
    fastlora.add_adapter(model, "b", config(slices, lora_alpha=2))
    randomised(model)
    with fastlora.use_adapters(model, torch.tensor([1, -1, 0])):
        y = model(x)
    base = make("2d")
    expected = [dense("2d", model.qkv, "b")(x)[0], base(x)[1], dense("2d", model.qkv)(x)[2]]
    close(y, torch.stack(expected))


@EVERY
def test_fisher_is_of_each_sample(slices):
    model, x = adapted("2d", slices), data("2d")
    expected = 0.0
    for sample in x:
        plain = dense("2d", model.qkv)
        plain(sample.unsqueeze(0)).square().sum().backward()
        expected = expected + plain.qkv.weight.grad.flatten(1).square().sum(1)
    with fastlora.track(model, estimator="exact", statistics="fisher", ema=None, loss_reduction="sum") as tracker:
        model(x).square().sum().backward()
        tracker.step()
        for part in model.qkv.slices:
            key = "qkv" if part == "weight" else f"qkv[{part}]"
            mine = float(expected[model.qkv.slices.rows(part)].sum()) / len(x)
            assert tracker.scores("fisher")[key] == pytest.approx(mine, rel=1e-9)


def test_columns_of_x_are_sampled():
    model, x = adapted("2d", "by head"), data("2d")
    plain = dense("2d", model.qkv)
    plain(x).square().sum().backward()
    G = plain.qkv.weight.grad.flatten(1)
    with fastlora.track(model, probe_kind="columns", probes=3):
        model(x).square().sum().backward()
        probe = model.qkv.probes["default"]
        for i, (part, Z) in enumerate(probe.Z.items()):
            close(Z.grad, G[model.qkv.slices.rows(part)][:, probe.columns[i]])


def test_explained():
    rows = {row.path: row for row in fastlora.explain(adapted("2d", "by head").float()).rows}
    assert rows["qkv"].backend in ("native", "eager") and rows["qkv"].remarks == "an adapted Conv2d"


def test_dropout_is_drawn_for_each_slice_and_in_training_alone():
    model, x = adapted("2d", "by head", lora_dropout=0.5), data("2d")
    torch.manual_seed(0)
    one, two = model(x), model(x)
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    assert torch.equal(model(x), one)
    close(model.eval()(x), dense("2d", model.qkv)(x))


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled(backend):
    model, x = adapted("2d", "by head"), data("2d")
    torch._dynamo.reset()
    y = torch.compile(model, backend=backend, fullgraph=True)(x)
    close(y, model(x))
    y.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).square().sum().backward()
    assert found and all(torch.allclose(found[n], p.grad) for n, p in model.named_parameters() if n in found)


def test_low_precision_under_autocast():
    model, x = adapted("2d", "by head").float(), data("2d").float()
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert (y - exact).abs().max() < 0.1
    y.float().square().sum().backward()
    assert model.qkv.lora_A["default"].q.grad.any()


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 16, 1, padding=1), nn.Conv2d(6, 16, 1, groups=2), nn.Conv2d(6, 16, 2)])
def test_others_are_not_split(layer):
    split = fastlora.LoraConfig(r=2, target_modules=["qkv"], split_qkv={"qkv": {"q": 8, "k": 8}})
    model = Around(layer)
    with pytest.raises(ValueError, match="split_qkv: expected linears, or convolutions with kernels of size 1, one gr"):
        fastlora.inject(model, split)
    assert type(model.qkv) is nn.Conv2d


@EVERY
def test_a_bias_beside_the_factors(slices, tmp_path):
    model, x = adapted("2d", slices, lora_bias=True), data("2d")
    expected = dense("2d", model.qkv)(x).atanh()
    added = model.qkv.bias_scale("default") * model.qkv.lora_B["default"].bias
    y = model(x)
    close(y.atanh(), expected + added.view(-1, 1, 1))
    fastlora.save(model, tmp_path)
    close(fastlora.load(make("2d"), tmp_path)(x), y)
    close(peft.PeftModel.from_pretrained(make("2d"), str(tmp_path))(x), y, rtol=1e-6, atol=1e-7)
    close(fastlora.merge(model)(x), y)


def test_ranks_from_scores():
    model, x = fastlora.inject(make("2d"), config("by head", rank_pattern={})), data("2d")
    scores = fastlora.calibrate(model, [x], lambda m, batch: m(batch).square().mean(), steps=1, method="fc")
    assert list(scores) == ["qkv[q]", "qkv[k]", "qkv[v]"]
    fastlora.set_ranks(model, fastlora.allocate(scores, 7, r_min=1, r_max=4))
    assert sum(model.qkv.ranks().values()) == 7
    randomised(model)
    before = model(x).detach()
    fastlora.set_ranks(model, {**{f"qkv[{n}]": r for n, r in model.qkv.ranks().items()}, "qkv[k]": 4}, keep=True)
    close(model(x), before)


def test_two_adapters_as_one():
    model = adapted("2d", "by head")
    fastlora.add_adapter(model, "b", config("by head"))
    randomised(model)
    W = sum(model.qkv.delta(name) * weight for name, weight in (("default", 0.5), ("b", 2.0)))
    fastlora.add_weighted_adapter(model, ["default", "b"], [0.5, 2.0], adapter_name="both", combination_type="cat")
    close(model.qkv.delta("both"), W, rtol=1e-6, atol=1e-7)


def test_fisher_of_windows_is_refused_wherever_they_are_made():
    class LocalWindowAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Around(nn.Conv2d(6, 16, 1))

    class PartitionAttention2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Around(nn.Conv2d(6, 16, 1))

    for owner in (LocalWindowAttention, PartitionAttention2d):
        model = fastlora.inject(nn.Sequential(owner()), fastlora.LoraConfig(r=2, target_modules=["qkv"]))
        with pytest.raises(ValueError, match=f"'fisher' needs samples in dimension 0.*windows .{owner.__name__}"):
            fastlora.track(model, estimator="exact", statistics="fisher")


def test_gradients_of_each_sample():
    model, x = adapted("2d", "by head"), data("2d")
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values, sample):
        return torch.func.functional_call(model, values, (sample.unsqueeze(0),)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            close(found[name].sum(0), p.grad)


def test_checkpointed():
    model, x = adapted("2d", "by head", lora_dropout=0.5), data("2d")
    torch.manual_seed(3)
    model(x).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for reentrant in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        torch.utils.checkpoint.checkpoint(
            model, x.clone().requires_grad_(), use_reentrant=reentrant
        ).square().sum().backward()
        for name, p in model.named_parameters():
            if name in wanted:
                close(p.grad, wanted[name])
