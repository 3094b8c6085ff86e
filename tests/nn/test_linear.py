"""``fastlora.nn.Linear`` as an ``nn.Linear``: values, gradients, shapes, dropout, copies, dtypes, hooks."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.helpers import formula, randomise
from torch import nn

import fastlora
from fastlora.nn.linear import QKVLinear

K, N, R = 24, 20, 5


def make(**fields) -> fastlora.nn.Linear:
    return randomise(fastlora.nn.Linear(K, N, **{"r": R, "lora_alpha": 2 * R, **fields}))


def gradients(layer, x, dy, function):
    """Output and gradients of x and of every parameter that has one."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = function(x)
    y.backward(dy)
    return y.detach(), x.grad, {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def assert_no_worse_than_torch(mine, plain, exact):
    """Within a few times the error of plain torch for the same formula, with room for one rounding."""
    scale = exact.abs().max()
    allowed = 4 * (plain.double() - exact).abs().max() + 4 * torch.finfo(mine.dtype).eps * scale
    assert mine.shape == exact.shape
    assert (mine.double() - exact).abs().max() <= allowed


def compare(layer, x):
    """Forward and every gradient against the formula in float64."""
    dy = torch.randn(*x.shape[:-1], N)
    wide = copy.deepcopy(layer).double()
    exact = gradients(wide, x.double(), dy.double(), lambda t: formula(wide, t))
    plain = gradients(layer, x, dy, lambda t: formula(layer, t))
    mine = gradients(layer, x, dy, layer)
    for index in (0, 1):
        if x.numel():
            assert_no_worse_than_torch(mine[index], plain[index], exact[index])
    assert mine[2].keys() == exact[2].keys()
    for name, grad in mine[2].items():
        assert_no_worse_than_torch(grad, plain[2][name], exact[2][name])


def test_is_an_nn_linear_with_the_base_frozen():
    layer = fastlora.nn.Linear(K, N, r=R)
    assert isinstance(layer, nn.Linear)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.default.weight", "lora_B.default.weight"
    }  # fmt: skip
    assert layer.lora_A["default"].weight.shape == (R, K) and layer.lora_B["default"].weight.shape == (N, R)
    assert not layer.lora_B["default"].weight.any() and layer.lora_A["default"].weight.any()


@pytest.mark.parametrize("shape", [(K,), (7, K), (2, 3, K), (1, K), (1, 1, K), (2, 1, 3, K)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_are_the_formula(shape, bias):
    layer = make(bias=bias)
    compare(layer, torch.randn(shape))
    assert layer.weight.grad is None and (layer.bias is None or layer.bias.grad is None)


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(K, 6).t(),
        lambda: torch.randn(3, K, 5).transpose(1, 2),
        lambda: torch.randn(5, 3, K).transpose(0, 1),
        lambda: torch.randn(8, 2 * K)[::2, ::2],
        lambda: torch.randn(1, 1, K).expand(3, 4, K),
        lambda: torch.randn(2, 4, K + 3)[..., 3:],
    ],
)
def test_non_contiguous_inputs(view):
    x = view()
    assert not x.is_contiguous()
    compare(make(), x)


@pytest.mark.parametrize("shape", [(0, K), (0, 5, K), (3, 0, K)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape):
    layer = make(train_base=True)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], N)
    y.sum().backward()
    assert x.grad.shape == shape
    for parameter in layer.parameters():
        assert parameter.grad.shape == parameter.shape and not parameter.grad.any()


def test_non_contiguous_output_gradient():
    layer, x = make(), torch.randn(4, 6, K)
    wide = copy.deepcopy(layer).double()
    dy = torch.randn(6, N, 4).permute(2, 0, 1)
    exact = gradients(wide, x.double(), dy.double(), lambda t: formula(wide, t))
    plain = gradients(layer, x, dy, lambda t: formula(layer, t))
    mine = gradients(layer, x, dy, layer)
    for name, grad in mine[2].items():
        assert_no_worse_than_torch(grad, plain[2][name], exact[2][name])
    assert_no_worse_than_torch(mine[1], plain[1], exact[1])


def test_a_trained_base_gets_its_gradient():
    layer = make(train_base=True)
    compare(layer, torch.randn(3, 7, K))
    assert layer.weight.grad is not None and layer.bias.grad is not None


@pytest.mark.parametrize("only", ["weight", "bias"])
def test_base_parameters_train_apart(only):
    layer = make()
    getattr(layer, only).requires_grad_(True)
    compare(layer, torch.randn(7, K))


@pytest.mark.parametrize("rslora, scale", [(False, 2.0), (True, 10 / 5**0.5)])
def test_scaling(rslora, scale):
    layer, x = make(use_rslora=rslora), torch.randn(3, K, dtype=torch.float64)
    layer = layer.double()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + scale * x @ A.T @ B.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, K), (3, 11, K)])
@pytest.mark.parametrize("bias", [True, False])
def test_at_initialisation_outputs_are_the_base_s_bit_for_bit(dtype, shape, bias, library_matmul):
    layer = fastlora.nn.Linear(K, N, bias=bias, dtype=dtype, r=R)
    x = torch.randn(shape).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    randomise(layer)
    assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_bf16_gradients_within_rounding():
    layer = randomise(fastlora.nn.Linear(K, N, dtype=torch.bfloat16, r=R))
    x, dy = torch.randn(18, K).bfloat16(), torch.randn(18, N).bfloat16()
    wide = copy.deepcopy(layer).double()
    exact = gradients(wide, x.double(), dy.double(), lambda t: formula(wide, t))
    mine = gradients(layer, x, dy, layer)
    for got, want in [(mine[0], exact[0]), (mine[1], exact[1]), *((g, exact[2][n]) for n, g in mine[2].items())]:
        assert (got.double() - want).abs().max() <= 0.03 * want.abs().max()
    assert mine[2]["lora_A.default.weight"].dtype == torch.float32


class TestDropout:
    def test_evaluation_has_none(self):
        layer, x = make(lora_dropout=0.5).eval(), torch.randn(8, K)
        assert torch.equal(layer(x), layer(x))
        torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-4, atol=1e-5)

    def test_training_follows_torch_s_generator(self):
        layer, x = make(lora_dropout=0.5), torch.randn(8, K)
        torch.manual_seed(1)
        first, second = layer(x), layer(x)
        torch.manual_seed(1)
        assert torch.equal(layer(x), first) and torch.equal(layer(x), second)
        assert not torch.equal(first, second)

    def test_mean_is_preserved(self):
        layer, x = make(lora_dropout=0.3).double(), torch.randn(1, K, dtype=torch.float64)
        base = F.linear(x, layer.weight, layer.bias)
        with torch.no_grad():
            samples = layer(x.expand(20000, K)) - base
            update = formula(layer, x) - base
        error = samples.std(0) / 20000**0.5
        assert ((samples.mean(0) - update).abs() <= 5 * error).all()
        assert (samples.std(0) > 0).all()

    def test_gradient_uses_the_mask_of_its_forward(self):
        layer = make(lora_dropout=0.5).double()
        x = torch.randn(6, K, dtype=torch.float64, requires_grad=True)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight

        def masked(t):
            torch.manual_seed(7)
            return layer(t)

        # x -> y is linear for a fixed mask, so its Jacobian is the difference of outputs along each direction.
        y = masked(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        for row, column in [(0, 0), (2, 5), (5, K - 1), (3, 3)]:
            step = torch.zeros_like(x)
            step[row, column] = 1.0
            torch.testing.assert_close((masked(x + step) - y).mul(dy).sum(), x.grad[row, column])
        # dropped(x) follows from the outputs: each row of y - base is s dropped(x) A^T B^T, so dB = s dy^T dropped A^T.
        update = (y - F.linear(x, layer.weight, layer.bias)).detach()
        low = torch.linalg.lstsq(B.detach(), update.T).solution.T
        torch.testing.assert_close(B.grad, dy.T @ low, rtol=1e-8, atol=1e-8)
        assert A.grad.abs().sum() > 0


class TestCopies:
    def test_deepcopy(self):
        layer, x = make(), torch.randn(3, K)
        other = copy.deepcopy(layer)
        assert torch.equal(other(x), layer(x))
        with torch.no_grad():
            other.lora_A["default"].weight.zero_()
        assert not torch.equal(other(x), layer(x))

    def test_pickle(self):
        layer, x = make(lora_dropout=0.25), torch.randn(3, K)
        other = pickle.loads(pickle.dumps(layer))
        assert type(other) is fastlora.nn.Linear and other.ranks() == {"weight": R}
        assert torch.equal(other.eval()(x), layer.eval()(x))
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in layer.parameters()]

    def test_state_dict_through_a_file(self):
        layer, other, x = make(), make(), torch.randn(3, K)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), layer(x))

    def test_base_keys_are_those_of_nn_linear(self):
        base, layer = nn.Linear(K, N), make()
        assert list(layer.state_dict())[:2] == ["weight", "bias"]
        assert set(layer.state_dict()) - set(base.state_dict()) == {"lora_A.default.weight", "lora_B.default.weight"}
        result = layer.load_state_dict(base.state_dict(), strict=False)
        assert not result.unexpected_keys and all(k.startswith("lora_") for k in result.missing_keys)
        assert torch.equal(layer.weight, base.weight)

    def test_to_float64_and_half_and_back(self):
        layer, x = make(), torch.randn(3, K)
        before = layer(x)
        torch.testing.assert_close(layer.double()(x.double()), before.double(), rtol=1e-4, atol=1e-5)
        assert layer.lora_A["default"].weight.dtype == torch.float64
        half = copy.deepcopy(layer).half()
        torch.testing.assert_close(half(x.half()).float(), before, rtol=2e-2, atol=2e-2)
        assert torch.equal(layer.float()(x), before)
        back = half.float()
        assert back(x).dtype == torch.float32 and back.lora_B["default"].weight.dtype == torch.float32

    def test_meta_and_to_empty(self):
        layer = fastlora.nn.Linear(K, N, r=R, device="meta")
        assert all(p.is_meta for p in layer.parameters())
        layer = layer.to_empty(device="cpu")
        layer.load_state_dict(make().state_dict())
        assert layer(torch.randn(2, K)).shape == (2, N)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float64])
def test_adapter_dtype(adapter):
    layer = make(adapter_dtype=adapter)
    x = torch.randn(5, K)
    assert {p.dtype for n, p in layer.named_parameters() if n.startswith("lora")} == {adapter}
    layer(x).sum().backward()
    assert layer.lora_B["default"].weight.grad.dtype == adapter
    torch.testing.assert_close(layer(x), formula(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base, expected", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_adapter_dtype_by_default(base, expected):
    layer = fastlora.nn.Linear(K, N, dtype=base, r=R)
    assert layer.weight.dtype == base and layer.lora_A["default"].weight.dtype == expected


def test_init_choices():
    torch.manual_seed(0)
    gaussian = fastlora.nn.Linear(400, 300, r=10, init_lora_weights="gaussian")
    assert gaussian.lora_A["default"].weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert not gaussian.lora_B["default"].weight.any()
    uniform = fastlora.nn.Linear(400, 300, r=10)
    assert uniform.lora_A["default"].weight.abs().max().item() == pytest.approx(400**-0.5, rel=0.01)
    assert fastlora.nn.Linear(400, 300, r=10, init_lora_weights=False).lora_B["default"].weight.any()


def test_repr_shows_ranks():
    assert repr(make()) == f"Linear(in_features={K}, out_features={N}, bias=True, r={R})"
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(K, 3 * K), "proj": nn.Linear(K, K)})})
    pattern = {"attn.qkv[k]": 2, "attn.qkv[v]": 0}
    fastlora.inject(model, fastlora.LoraConfig(r=4, target_modules="qkv", split_qkv=True, rank_pattern=pattern))
    assert type(model["attn"]["qkv"]) is QKVLinear
    assert "r={q: 4, k: 2, v: 0}" in repr(model["attn"]["qkv"]) and "r=" not in repr(model["attn"]["proj"])


def test_hooks_of_the_layer_run():
    layer, seen = make(), []
    layer.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    layer.register_forward_hook(lambda m, a, y: y * 2)
    layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    x = torch.randn(3, K, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, 2 * formula(layer, x), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert seen == ["pre", "backward"]


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    model[1].weight = model[0].weight
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["0", "1"]))
    randomise(model)
    assert model[0].weight is model[1].weight
    other = copy.deepcopy(model)
    assert other[0].weight is other[1].weight
    model.double()
    assert model[0].weight is model[1].weight
    x = torch.randn(2, K, dtype=torch.float64)
    torch.testing.assert_close(model(x), formula(model[1], formula(model[0], x)))


def test_weight_reads_the_base():
    layer = make()
    before = layer.weight.clone()
    layer(torch.randn(2, K))
    assert isinstance(layer.weight, nn.Parameter) and torch.equal(layer.weight, before)


def test_x_is_not_written_to():
    layer = make(lora_dropout=0.5)
    x = torch.randn(4, K, requires_grad=True)
    before, version = x.detach().clone(), x._version
    layer(x).sum().backward()
    assert torch.equal(x, before) and x._version == version


def test_delta_is_the_update():
    layer, x = make().double(), torch.randn(3, K, dtype=torch.float64)
    torch.testing.assert_close(layer(x) - F.linear(x, layer.weight, layer.bias), x @ layer.delta().T)


CALLED = {
    "a linear": (lambda: nn.Linear(4, 4), {}, "input"),
    "a frozen linear": (lambda: nn.Linear(4, 4), {"target_modules": ["other"], "accelerate_frozen": True}, "input"),
    "a fused linear": (lambda: nn.Linear(4, 6), {"split_qkv": {"a": {"q": 2, "k": 2, "v": 2}}}, "input"),
    "transformers' Conv1D": (lambda: pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 4), {}, "x"),
    "an embedding": (lambda: nn.Embedding(4, 4), {}, "input"),
    "a convolution": (lambda: nn.Conv2d(4, 4, 1), {}, "input"),
    "an attention": (lambda: nn.MultiheadAttention(4, 1), {}, ("query", "key", "value")),
}


@pytest.mark.parametrize("kind", CALLED)
def test_called_by_the_names_of_the_base_s_arguments(kind):
    make_base, fields, names = CALLED[kind]
    base = nn.ModuleDict({"a": make_base(), "other": nn.Linear(4, 4)}).eval()
    shape = (2, 4, 2, 2) if isinstance(base["a"], nn.Conv2d) else (2, 3, 4)
    x = torch.tensor([1, 3]) if isinstance(base["a"], nn.Embedding) else torch.randn(shape)
    named = dict.fromkeys([names] if isinstance(names, str) else names, x)
    with torch.no_grad():
        expected = base["a"](**named)
    signature = inspect.signature(base["a"].forward).parameters
    options = {"accelerate_frozen": fields.pop("accelerate_frozen", False)}
    model = fastlora.inject(base, fastlora.LoraConfig(**{"r": 2, "target_modules": ["a"], **fields}), **options)
    with torch.no_grad():
        torch.testing.assert_close(model["a"](**named), expected)
    found = inspect.signature(model["a"].forward).parameters
    assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in signature.values()]


def test_siblings_called_by_the_name_of_the_argument_run_together():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.q_proj(input=x) * self.k_proj(x) + self.v_proj(input=x)

    model = fastlora.inject(Attention(), fastlora.LoraConfig(r=2, target_modules="qkv", init_lora_weights=False))
    x = torch.randn(3, 4)
    want = formula(model.q_proj, x) * formula(model.k_proj, x) + formula(model.v_proj, x)
    for _ in range(3):
        torch.testing.assert_close(model(x), want)
