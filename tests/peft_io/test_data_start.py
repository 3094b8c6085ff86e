"""``initialize_corda``, ``initialize_lora_ga``: factors, weights and first step as PEFT's, files that anybody loads."""

import copy

import pytest
import torch
from peft.tuners.lora import corda, loraga
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from safetensors.torch import load_file
from support.peft_fields import assert_same_first_step, forward, make_llama, plain_names, tokens
from support.peft_help import TENSORS, assert_close, peft
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora._utils.torch_compat import onednn_reason
from fastlora.integrations.adapters_only import trained_state
from fastlora.nn.linear import adapted_layers
from fastlora.ops.matmul import ENGINES

TARGETS = ["q_proj", "up_proj"]
FIELDS = dict(r=2, lora_alpha=3, target_modules=TARGETS)


def batches():
    return [tokens()[row : row + 1] for row in range(3)]


def loss_fn(model, x):
    return forward(model, x).square().mean()


def of_peft_corda(method):
    config = peft.LoraConfig(
        **FIELDS, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method, prune_temporary_fields=False),
    )  # fmt: skip
    model = make_llama()
    corda.preprocess_corda(model, config, run_model=lambda: [forward(model, x) for x in batches()])
    covariances = {n: m.covariance_matrix.clone() for n, m in model.named_modules() if hasattr(m, "covariance_matrix")}
    return peft.get_peft_model(model, config).double(), covariances


def of_peft_lora_ga(**fields):
    config = peft.LoraConfig(**FIELDS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**fields))
    model = make_llama().double()
    torch.manual_seed(4)
    loraga.preprocess_loraga(model, config, lambda: [loss_fn(model, x).backward() for x in batches()])
    return peft.get_peft_model(model, config)


def injected(init=True, double=True, **fields):
    model = make_llama()
    return fastlora.inject(
        model.double() if double else model, fastlora.LoraConfig(**{**FIELDS, "init_lora_weights": init, **fields})
    )


def exact_svd(G, q):
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    return U[:, :q], S[:q], Vh[:q].t()


def factors(theirs, path):
    layer = theirs.base_model.model.get_submodule(path)
    return layer.lora_A.default.weight, layer.lora_B.default.weight, layer.base_layer.weight


class TestCorda:
    @pytest.mark.parametrize("method", ["ipm", "kpm"])
    def test_as_peft(self, method):
        theirs, covariances = of_peft_corda(method)
        ours = fastlora.initialize_corda(injected("corda", double=False), covariances, method=method).double()
        assert plain_names(ours) == plain_names(theirs)
        with torch.no_grad():
            torch.testing.assert_close(forward(ours), forward(make_llama().double()), rtol=1e-4, atol=1e-5)
            for path, layer in adapted_layers(ours).items():
                A, B, W = factors(theirs, path)
                torch.testing.assert_close(layer.weight, W, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(
                    layer.lora_B.default.weight @ layer.lora_A.default.weight, B @ A, rtol=1e-3, atol=1e-4
                )
                # Signs of singular vectors are anybody's.
                signs = (layer.lora_A.default.weight * A).sum(1).sign()
                layer.weight.copy_(W)
                torch.testing.assert_close(layer.lora_A.default.weight * signs[:, None], A, rtol=1e-2, atol=1e-4)
                layer.lora_A.default.weight.copy_(A)
                layer.lora_B.default.weight.copy_(B)
        assert_same_first_step(theirs, ours)

    def test_of_our_covariances(self, caplog):
        model = injected("corda")
        assert "A is random until fastlora.initialize_corda" in caplog.text
        before = forward(model).detach()
        with fastlora.track(model, estimator="exact", statistics=["act_cov"]) as tracker:
            loss_fn(model, tokens()).backward()
            tracker.step()
        W = {path: layer.weight.clone() for path, layer in adapted_layers(model).items()}
        C = tracker.covariances("act_cov")
        fastlora.initialize_corda(model, C)
        assert_close(forward(model), before)
        for path, layer in adapted_layers(model).items():
            seen = C[path] + torch.eye(len(C[path])).double() * C[path].diagonal().mean() * 0.01
            U = torch.linalg.svd(W[path] @ seen)[0][:, :2]
            assert_close(layer.delta(), U @ U.t() @ W[path])

    def test_refused(self):
        model = injected("corda")
        eye = {path: torch.eye(layer.in_features) for path, layer in adapted_layers(model).items()}
        before = copy.deepcopy(model.state_dict())
        for given, fields, says in (
            ({}, {}, "expected a matrix for every linear"),
            (eye, dict(method="best"), "method: expected"),
            ({**eye, "model.layers.0.self_attn.q_proj": torch.eye(3)}, {}, r"expected a finite matrix \[16, 16\]"),
        ):
            with pytest.raises(ValueError, match=says):
                fastlora.initialize_corda(model, given, **fields)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        fastlora.initialize_corda(model, eye)
        with pytest.raises(ValueError, match="has been trained or initialized"):
            fastlora.initialize_corda(model, eye)
        with pytest.raises(ValueError, match="in part in its adapter"):
            fastlora.add_adapter(model, "b", fastlora.LoraConfig(**FIELDS))
        with pytest.raises(ValueError, match="part of its weight in the factors"):
            fastlora.set_ranks(model, {"model.layers.0.self_attn.q_proj": 4})


class TestPissaByPowerIteration:
    def test_as_peft(self, monkeypatch, tmp_path):
        lowrank = torch.svd_lowrank

        def seeded(W, q, niter):
            torch.manual_seed(1)
            return lowrank(W, q, niter=niter)

        monkeypatch.setattr(torch, "svd_lowrank", seeded)
        monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", seeded)
        theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(**FIELDS, init_lora_weights="pissa_niter_3"))
        ours = fastlora.inject(make_llama(), peft.LoraConfig(**FIELDS, init_lora_weights="pissa_niter_3"))
        assert plain_names(ours) == plain_names(theirs)
        for path, layer in adapted_layers(ours).items():
            mine = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.weight
            for a, b in zip(mine, factors(theirs, path), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        theirs.save_pretrained(str(tmp_path / "raw"))
        with pytest.raises(ValueError, match="belong to a changed weight"):
            fastlora.load(make_llama(), tmp_path / "raw")

    @torch.no_grad()
    def test_files(self, tmp_path):
        model = injected("pissa_niter_2")
        assert_close(forward(model), forward(make_llama().double()))
        assert model.model.layers[0].mlp.up_proj.delta().abs().max() > 0.01
        for layer in adapted_layers(model).values():
            layer.lora_B.default.weight.add_(0.1)
        wanted = forward(model)
        fastlora.save(model, tmp_path)
        assert_close(forward(fastlora.load(make_llama().double(), tmp_path)), wanted)
        assert_close(forward(peft.PeftModel.from_pretrained(make_llama().double(), str(tmp_path)).double()), wanted)
        with pytest.raises(ValueError, match="changes the weight that adapters share"):
            fastlora.add_adapter(
                fastlora.inject(make_llama(), fastlora.LoraConfig(**FIELDS)),
                "b",
                fastlora.LoraConfig(**FIELDS, init_lora_weights="pissa_niter_2"),
            )


class TestLoraGA:
    @pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
    @pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
    def test_as_peft(self, direction, scale, monkeypatch):
        # PEFT's is random and need not have converged.
        monkeypatch.setattr(torch, "svd_lowrank", lambda G, q, niter: exact_svd(G, q))
        theirs = of_peft_lora_ga(direction=direction, scale=scale)
        ours = injected("lora_ga")
        before = forward(ours).detach()
        fastlora.initialize_lora_ga(ours, batches(), loss_fn, steps=None, passes=12, direction=direction, scale=scale)
        assert plain_names(ours) == plain_names(theirs)
        assert_close(forward(ours), before)
        with torch.no_grad():
            for path, layer in adapted_layers(ours).items():
                A, B, W = factors(theirs, path)
                mine = layer.lora_A.default.weight, layer.lora_B.default.weight
                signs = (mine[0] * A).sum(1).sign(), (mine[1] * B).sum(0).sign()
                torch.testing.assert_close(mine[0] * signs[0][:, None], A, rtol=1e-3, atol=1e-3 * float(A.abs().max()))
                torch.testing.assert_close(mine[1] * signs[1], B, rtol=1e-3, atol=1e-3 * float(B.abs().max()))
                layer.weight.copy_(W)
                mine[0].copy_(A)
                mine[1].copy_(B)
        assert_same_first_step(theirs, ours)

    def test_a_few_passes_find_the_leading_directions(self):
        model = injected("lora_ga")
        fastlora.initialize_lora_ga(model, batches(), loss_fn, steps=None, scale="unit", direction="ArB2r")
        base = make_llama().double()
        (sum(loss_fn(base, x) for x in batches()) / 3).backward()
        for path, layer in adapted_layers(model).items():
            U, S, Vh = torch.linalg.svd(base.get_submodule(path).weight.grad)
            A, B = layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach()
            assert ((A @ Vh[:2].t()).square().sum(1) > 0.999).all()
            torch.testing.assert_close(B.norm(dim=0), S[2:4], rtol=2e-2, atol=0.0)

    def test_no_gradient_of_the_weight_is_formed(self):
        model, seen = injected(lora_dropout=0.5), []
        shapes = {tuple(layer.weight.shape) for layer in adapted_layers(model).values()}
        ours = {p.untyped_storage().data_ptr() for p in model.parameters()}

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **kwargs or {})
                for y in out if isinstance(out, (list, tuple)) else [out]:
                    if isinstance(y, torch.Tensor) and y.dim() == 2 and {tuple(y.shape), tuple(y.shape[::-1])} & shapes:
                        if y.untyped_storage().data_ptr() not in ours:
                            seen.append(f"{func} {tuple(y.shape)}")
                return out

        def watched(model, x):
            return loss_fn(model, x)

        from fastlora.model import data_start

        begin, data_start._begin = data_start._begin, lambda *args: None
        try:
            with Watch():
                fastlora.initialize_lora_ga(model, batches(), watched, steps=None)
        finally:
            data_start._begin = begin
        assert not seen

    def test_everything_else_is_as_it_was(self):
        model = injected("lora_ga", lora_dropout=0.1).train()
        names = {id(p): n for n, p in model.named_parameters()}
        state = torch.get_rng_state()
        fastlora.initialize_lora_ga(model, batches(), loss_fn, steps=2)
        assert {id(p): n for n, p in model.named_parameters()} == names and model.training
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
        layer = next(iter(adapted_layers(model).values()))
        assert layer.adapter_specs["default"].dropout == 0.1 and layer.adapter_specs["default"].scale["weight"] == 1.5

    @pytest.mark.skipif(onednn_reason() is not None, reason="this torch has no packed weights")
    def test_weights_that_change_are_not_packed(self):
        """The copies would be of a weight that the start replaces; training packs the one that stays."""
        model = fastlora.inject(
            nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)),
            fastlora.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights="lora_ga", prepack=True),
        )

        def watched(model, x):
            assert not any(ENGINES.packed_bytes(layer.weight) for layer in model)
            return model(x).square().mean()

        fastlora.initialize_lora_ga(model, [torch.randn(8, 64)], watched, steps=1)
        assert not any(ENGINES.packed_bytes(layer.weight) for layer in model)
        model(torch.randn(8, 64))
        assert all(ENGINES.packed_bytes(layer.weight) for layer in model)

    def test_slices(self):
        model = fastlora.inject(
            make_llama().double(), fastlora.LoraConfig(r=2, target_modules="qkv", init_lora_weights="lora_ga")
        )
        before = forward(model).detach()
        fastlora.initialize_lora_ga(model, batches(), loss_fn, steps=3)
        assert_close(forward(model), before)

    def test_an_error_leaves_the_model(self):
        model = injected("lora_ga")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="batches: ran out after 3 of steps=8"):
            fastlora.initialize_lora_ga(model, batches(), loss_fn)
        for fields, says in (
            (dict(direction="up"), "direction: expected"),
            (dict(scale="up"), "scale: expected"),
            (dict(stable_gamma=0), "stable_gamma: expected a positive number"),
            (dict(passes=0), "passes: expected"),
        ):
            with pytest.raises(ValueError, match=says):
                fastlora.initialize_lora_ga(model, batches(), loss_fn, **fields)
        with pytest.raises(ValueError, match="no gradient reaches .*up_proj"):
            fastlora.initialize_lora_ga(
                model, batches(), lambda m, x: m.model.layers[0].self_attn.q_proj(torch.ones(1, 16).double()).sum(),
                steps=1,
            )  # fmt: skip
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        with pytest.raises(ValueError, match="has rank 9, and initialize_lora_ga takes up to 8"):
            fastlora.initialize_lora_ga(injected(r=9), batches(), loss_fn, steps=1)


def trained():
    model = fastlora.initialize_lora_ga(injected("lora_ga"), batches(), loss_fn, steps=3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn(model, tokens()).backward()
        optimizer.step()
    return model.eval()


class TestFiles:
    @torch.no_grad()
    def test_are_plain_lora_over_the_weight_as_it_was(self, tmp_path):
        with torch.enable_grad():
            model = trained()
        wanted = forward(model)
        assert not torch.allclose(wanted, forward(make_llama().double()))
        fastlora.save(model, tmp_path)
        assert load_file(tmp_path / TENSORS)[
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        ].shape == (4, 16)
        assert_close(forward(fastlora.load(make_llama().double(), tmp_path)), wanted)
        assert_close(forward(peft.PeftModel.from_pretrained(make_llama().double(), str(tmp_path)).double()), wanted)
        assert_close(forward(fastlora.to_peft(model)), wanted)
        fastlora.save(model, tmp_path / "folded", fold_scale=True)
        assert_close(forward(fastlora.load(make_llama().double(), tmp_path / "folded")), wanted)
        assert_close(forward(fastlora.merge(model)), wanted)

    @torch.no_grad()
    def test_of_slices(self, tmp_path):
        from support.fused_zoo import FUSED

        for name in ("gpt_neox", "gpt2"):
            entry = FUSED[name]
            torch.manual_seed(0)
            base = entry.make().double().eval()
            model = fastlora.inject(copy.deepcopy(base), fastlora.LoraConfig(r=2, target_modules="qkv"))
            with torch.enable_grad():
                fastlora.initialize_lora_ga(model, [entry.run], lambda m, run: run(m).square().mean(), steps=1)
            assert_close(entry.run(model), entry.run(base))
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape), alpha=0.1)
            fastlora.save(model, tmp_path / name)
            assert_close(entry.run(fastlora.load(copy.deepcopy(base), tmp_path / name)), entry.run(model))

    def test_of_peft(self, tmp_path):
        theirs = of_peft_lora_ga()
        theirs.save_pretrained(str(tmp_path / "raw"))
        with pytest.raises(ValueError, match="belong to a changed weight; PEFT's save_pretrained makes them plain"):
            fastlora.load(make_llama().double(), tmp_path / "raw")

    def test_checkpoints_of_other_data_are_refused(self):
        state = trained_state(trained())
        again = fastlora.initialize_lora_ga(injected("lora_ga"), batches(), loss_fn, steps=3)
        from fastlora.integrations.adapters_only import refuse_other

        refuse_other(again, state)
        other = fastlora.initialize_lora_ga(injected("lora_ga"), batches()[1:], loss_fn, steps=1)
        with pytest.raises(ValueError, match="initialized from other data"):
            refuse_other(other, state)
        with pytest.raises(ValueError, match="has rank 0 in the model and 2 in the checkpoint"):
            refuse_other(injected("lora_ga"), state)
