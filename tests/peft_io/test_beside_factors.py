"""What PEFT keeps beside the factors, and where it lets them start: ``lora_bias``, ``use_dora``, initialisations."""

import copy

import pytest
import torch
from support.peft_fields import (
    CASES,
    TARGETS,
    Biased,
    assert_same_first_step,
    both,
    forward,
    make_gpt2,
    make_llama,
    plain_names,
    run_biased,
    tokens,
    trained_by_peft,
)
from support.peft_help import CONFIG, assert_close, peft, refused, transformers

import fastlora


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("field", ["lora_bias", "use_dora"])
class TestBesideTheFactors:
    def test_first_step(self, case, field):
        make, run, fields = CASES[case]
        theirs, ours = both(make, **fields, **{field: True})
        count = sum(plain_names(theirs).values())
        assert fastlora.summary(ours).adapter_params == sum(plain_names(ours).values()) == count
        assert_same_first_step(theirs, ours, run)

    def test_files_both_ways(self, case, field, tmp_path):
        make, run, fields = CASES[case]
        theirs, wanted = trained_by_peft(make, tmp_path / "theirs", run=run, **fields, **{field: True})
        ours = fastlora.load(make().double(), tmp_path / "theirs")
        assert_close(run(ours), wanted)
        fastlora.save(ours, tmp_path / "ours")
        assert_close(run(fastlora.load(make().double(), tmp_path / "ours")), wanted)
        assert_close(run(peft.PeftModel.from_pretrained(make().double(), str(tmp_path / "ours"))), wanted)
        assert_close(run(fastlora.to_peft(ours)), wanted)
        assert_close(run(fastlora.from_peft(theirs)), wanted)
        assert_close(run(fastlora.load(ours, tmp_path / "ours")), wanted)

    def test_merge(self, case, field):
        make, run, fields = CASES[case]
        _, ours = both(make, **fields, **{field: True})
        state = {k: v.clone() for k, v in ours.state_dict().items()}
        before = run(ours)
        if field == "lora_bias" and case == "llama":
            with pytest.raises(ValueError, match="has no bias, and that of adapter 'default' .lora_bias. needs one"):
                fastlora.merge(ours)
        else:
            assert_close(run(fastlora.merge(ours)), before)
            fastlora.unmerge(ours)
        assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())
        assert_close(run(ours), before)


@pytest.mark.parametrize("mode", ["none", "lora_only", "all"])
def test_a_merged_bias_is_saved_as_it_was(mode, tmp_path):
    base = Biased().double()
    fields = {"r": 2, "target_modules": ["up"], "lora_bias": True, "bias": mode, "init_lora_weights": False}
    model = fastlora.inject(copy.deepcopy(base), fastlora.LoraConfig(**fields))
    with torch.no_grad():
        model.up.bias.add_(mode != "none")
        model.up.lora_B.default.bias.add_(1.0)
    before = run_biased(model)
    fastlora.save(model, tmp_path / "before")
    fastlora.save(fastlora.merge(model), tmp_path / "merged")
    assert_close(run_biased(model), before)
    assert_close(run_biased(fastlora.load(copy.deepcopy(base), tmp_path / "merged")), before)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("before", "merged")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_dora_starts_as_the_base_and_keeps_its_length():
    model = make_llama().double()
    before = forward(model)
    fastlora.inject(model, fastlora.LoraConfig(**TARGETS, use_dora=True))
    assert_close(forward(model), before)
    fastlora.set_ranks(model, {"model.layers.0.mlp.up_proj": 5})
    assert_close(forward(model), before)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.lora_B.default.magnitude.shape == (32,)
    assert_close(layer.row_lengths("default").norms(), layer.weight.norm(dim=1))


def test_dora_of_a_row_of_zeros_learns():
    """PEFT divides by the row's norm of zero."""
    base = Biased().double()
    base.up.weight.data[1] = 0
    model = fastlora.inject(base, fastlora.LoraConfig(r=2, target_modules=["up"], use_dora=True))
    run_biased(model).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert_close(run_biased(fastlora.merge(model)), run_biased(fastlora.unmerge(model)))


def test_dora_of_slices_and_groups_is_dora_of_the_matrix():
    """q, k and v of one fused matrix, each with a rank of its own."""
    model = fastlora.inject(make_gpt2().double(), fastlora.LoraConfig(r=2, target_modules="qkv", use_dora=True))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    layer = model.transformer.h[0].attn.c_attn
    x = torch.randn(5, 16, dtype=torch.float64)
    W = layer.weight.t() + layer.delta().t()
    W = W / W.norm(dim=1, keepdim=True) * layer.lora_B.default.magnitude[:, None]
    assert_close(layer(x), torch.nn.functional.linear(x, W, layer.bias))


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(6, 8), lambda: transformers.pytorch_utils.Conv1D(8, 6)])
def test_dora_keeps_nothing_of_what_changes(make):
    """W, A, B, m and the bias, replaced or changed where no version counts it, between one call and the next."""
    model = fastlora.inject(torch.nn.Sequential(make()), fastlora.LoraConfig(r=2, target_modules=["0"], use_dora=True))
    layer, x = model[0], torch.randn(5, 6)
    A, B = layer.lora_A["default"], layer.lora_B["default"]
    places = [(layer, "weight"), (layer, "bias"), (A, "weight"), (B, "weight"), (B, "magnitude")]

    def formula():
        (a, b, s), W = layer.pairs()[0], layer.as_matrix(layer.weight)
        W = W + s * b @ a
        return torch.nn.functional.linear(x, W / W.norm(dim=1, keepdim=True) * B.magnitude[:, None], layer.bias)

    torch.testing.assert_close(model(x), formula())
    for owner, name in places:
        old = getattr(owner, name)
        old.data.add_(torch.randn_like(old))
        torch.testing.assert_close(model(x), formula())
        setattr(owner, name, torch.nn.Parameter(torch.randn_like(old), requires_grad=old.requires_grad))
        torch.testing.assert_close(model(x), formula())
    torch.nn.utils.parametrize.register_parametrization(B, "magnitude", torch.nn.Softplus())
    torch.testing.assert_close(model(x), formula())
    B.parametrizations.magnitude.original.data.neg_()
    torch.testing.assert_close(model(x), formula())


def test_rows_of_several_adapters_with_a_bias():
    _, model = both(Biased, **CASES["biased"][2], lora_bias=True)
    fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=2, target_modules=["up"]))
    alone = {}
    for name in ("default", "b"):
        with fastlora.use_adapters(model, name):
            alone[name] = run_biased(model)
    with fastlora.use_adapters(model, ["b", "default", None, "default"]):
        mixed = run_biased(model)
    assert_close(mixed[0], alone["b"][0])
    assert_close(mixed[[1, 3]], alone["default"][[1, 3]])
    with fastlora.disable_adapters(model):
        assert_close(mixed[2], run_biased(model)[2])


def test_rows_of_several_adapters_with_dora_are_refused():
    model = fastlora.inject(Biased().double(), fastlora.LoraConfig(r=2, target_modules=["up"], use_dora=True))
    fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(ValueError, match="ids: an adapter with use_dora scales the frozen weight's rows"):
        with fastlora.use_adapters(model, ["b", "default", None, "default"]):
            run_biased(model)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("init", ["pissa", "olora"])
class TestStartsFromTheWeight:
    def test_as_peft(self, case, init):
        if (case, init) == ("gpt2", "olora"):
            pytest.skip("PEFT 0.21 takes the QR factors of a Conv1D's W^T, which have other shapes than A and B")
        make, run, fields = CASES[case]
        theirs = peft.get_peft_model(make(), peft.LoraConfig(**fields, init_lora_weights=init))
        ours = fastlora.inject(make(), peft.LoraConfig(**fields, init_lora_weights=init))
        named = {n.replace(".base_layer", ""): p for n, p in theirs.named_parameters()}
        for name, parameter in ours.named_parameters():
            its = named["base_model.model." + name]
            if ".lora_" in name and init == "pissa":  # the signs of singular vectors are anyone's
                parameter, its = parameter.abs(), its.abs()
            torch.testing.assert_close(parameter, its, rtol=2e-3, atol=2e-5)
        run32 = lambda m: run(m.double())  # noqa: E731
        torch.testing.assert_close(run32(ours), run32(make()), rtol=1e-4, atol=1e-5)

    def test_files_both_ways(self, case, init, tmp_path):
        if (case, init) == ("gpt2", "olora"):
            pytest.skip("see above")
        make, run, fields = CASES[case]
        model = peft.get_peft_model(make(), peft.LoraConfig(**fields, init_lora_weights=init))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1.5)
        model.save_pretrained(str(tmp_path / "theirs"))
        close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
        ours = fastlora.load(make(), tmp_path / "theirs")
        fastlora.save(ours, tmp_path / "ours")
        again = [
            ours,
            fastlora.load(make(), tmp_path / "ours"),
            fastlora.load(copy.deepcopy(ours), tmp_path / "ours"),
            peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours")),
            fastlora.to_peft(ours),
            fastlora.from_peft(model),
        ]
        fastlora.save(again[-1], tmp_path / "taken over")
        again.append(fastlora.load(make(), tmp_path / "taken over"))
        again[4].save_pretrained(str(tmp_path / "handed over"))
        again.append(fastlora.load(make(), tmp_path / "handed over"))
        again.append(fastlora.merge(copy.deepcopy(ours)))
        wanted = run(model.double())
        for other in again:
            close(run(other.double()), wanted)

    def test_what_would_lose_the_weight(self, case, init):
        make, _, fields = CASES[case]
        model = fastlora.inject(make(), peft.LoraConfig(**fields, init_lora_weights=init))
        key = fastlora.summary(model).rows[0].key
        with pytest.raises(ValueError, match="has a part of its weight in the factors"):
            fastlora.set_ranks(model, {key: 1}, reinit=True)
        with pytest.raises(ValueError, match=f"init_lora_weights: '{init}' changes the weight that adapters share"):
            fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=1, target_modules=fields["target_modules"]))


def test_orthogonal_as_peft():
    made = []
    for library in (fastlora, peft):
        torch.manual_seed(3)
        config = library.LoraConfig(r=4, target_modules=["up"], init_lora_weights="orthogonal")
        if library is peft:
            made.append(peft.get_peft_model(Biased(), config).base_model.model)
        else:
            made.append(fastlora.inject(Biased(), config))
    ours, theirs = (m.up for m in made)
    assert ours.lora_A.default.weight.shape == theirs.lora_A.default.weight.shape
    A, B = ours.lora_A.default.weight.detach(), ours.lora_B.default.weight.detach()
    assert_close(B @ A, torch.zeros(8, 6))
    assert A.any() and B.any()
    for a, b in ((A, theirs.lora_A.default.weight), (B, theirs.lora_B.default.weight)):
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.5)
    with pytest.raises(ValueError, match="r: expected an even rank"):
        fastlora.inject(Biased(), fastlora.LoraConfig(r=3, target_modules=["up"], init_lora_weights="orthogonal"))


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(init_lora_weights="pissa_niter_x"), "init_lora_weights: expected one of"),
        (dict(init_lora_weights="mica"), "use 'olora'"),
        (dict(init_lora_weights="loftq"), "quantize the model first"),
        (dict(lora_bias=True, use_dora=True), "lora_bias: expected False, or use_dora=False"),
        (
            dict(lora_bias=True, init_lora_weights="gaussian"),
            "lora_bias: expected False, or init_lora_weights True or Fal",
        ),
        (dict(use_dora=1), "use_dora: expected one of"),
    ],
)
def test_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        fastlora.LoraConfig(target_modules=["q_proj"], **fields)


@pytest.mark.parametrize("make", [lambda: torch.nn.Conv2d(3, 4, 3), lambda: torch.nn.Embedding(9, 4)])
def test_dora_of_a_file_on_other_layers_is_refused_by_the_field(make, tmp_path):
    settings = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    peft.get_peft_model(torch.nn.Sequential(make()), settings).save_pretrained(tmp_path)
    says = f"{CONFIG}: use_dora: True is implemented for nn.Linear and Conv1D, and '0' is a {type(make()).__name__}"
    refused(torch.nn.Sequential(make()), tmp_path, says)


@pytest.mark.parametrize("fields", [dict(use_dora=True), dict(init_lora_weights="pissa"), dict(lora_bias=True)])
def test_layers_without_it(fields):
    for make in (lambda: torch.nn.Embedding(9, 6), lambda: torch.nn.MultiheadAttention(6, 2)):
        model = torch.nn.ModuleDict({"layer": make()})
        with pytest.raises(ValueError, match=f"{next(iter(fields))}: .*is implemented for nn.Linear and Conv1D"):
            fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["layer"], **fields))
        assert not fastlora.nn.linear.adapted_layers(model)


def test_a_weight_without_values():
    for fields in (dict(use_dora=True), dict(init_lora_weights="olora")):
        with pytest.raises(ValueError, match=f"{next(iter(fields))}: takes the values of a weight, and that of 'up'"):
            fastlora.inject(Biased().to("meta"), fastlora.LoraConfig(r=2, target_modules=["up"], **fields))


def test_a_bias_of_a_convolution(tmp_path):
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    make = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).double()  # noqa: E731
    torch.manual_seed(0)
    base = make()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True))
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(str(tmp_path))
    ours = fastlora.load(copy.deepcopy(base), tmp_path)
    assert_close(ours(x), theirs(x))
    assert_close(fastlora.merge(ours)(x), theirs(x))
    assert torch.equal(fastlora.unmerge(ours)[0].bias, base[0].bias)


class TestEva:
    def seen(self, model):
        with fastlora.track(model, estimator="exact", statistics=["act_cov"]) as tracker:
            for row in range(3):
                forward(model, tokens()[row : row + 1]).square().mean().backward()
            tracker.step()
        return tracker.covariances("act_cov")

    def test_the_leading_directions_of_the_inputs(self, caplog):
        model = fastlora.inject(make_llama().double(), peft.LoraConfig(**TARGETS, init_lora_weights="eva"))
        assert "A is random until fastlora.initialize_eva" in caplog.text
        before, seen = forward(model), []
        layer = model.model.layers[1].mlp.up_proj
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
        found = self.seen(model)
        hook.remove()
        fastlora.initialize_eva(model, found)
        assert_close(forward(model), before)
        V = torch.linalg.svd(torch.cat(seen), full_matrices=False)[2][:2]
        assert_close((layer.lora_A.default.weight @ V.t()).abs(), torch.eye(2, dtype=torch.float64))

    def test_as_peft_where_inputs_have_no_mean(self, monkeypatch):
        """PEFT takes the mean off; with x and -x there is none."""
        torch.manual_seed(2)
        x = torch.randn(64, 6) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1])
        x = torch.cat([x, -x])
        config = dict(r=2, target_modules=["up"], init_lora_weights="eva")
        theirs = peft.get_peft_model(Biased(), peft.LoraConfig(**config, eva_config=peft.EvaConfig(rho=1.0)))
        peft.initialize_lora_eva_weights(
            theirs, [x] * 4, forward_fn=lambda m, batch: m(batch), show_progress_bar=False,
            prepare_model_inputs_fn=None, prepare_layer_inputs_fn=lambda layer_input, model_input, name: layer_input[0],
        )  # fmt: skip
        ours = fastlora.inject(Biased(), fastlora.LoraConfig(**config))
        fastlora.initialize_eva(ours, {"up": x.t() @ x / len(x)})
        overlap = (ours.up.lora_A.default.weight @ theirs.base_model.model.up.lora_A.default.weight.t()).abs()
        torch.testing.assert_close(overlap, torch.eye(2), rtol=1e-3, atol=1e-3)

    def test_refused(self):
        model = fastlora.inject(Biased(), fastlora.LoraConfig(r=2, target_modules=["up"]))
        for given, says in (
            ({"up": torch.eye(5)}, r"covariances\['up'\]: expected a finite matrix \[6, 6\]"),
            ({"up": torch.full((6, 6), torch.nan)}, "expected a finite matrix"),
        ):
            with pytest.raises(ValueError, match=says):
                fastlora.initialize_eva(model, given)
        torch.nn.init.ones_(model.up.lora_B.default.weight)
        with pytest.raises(ValueError, match="'up' has been trained"):
            fastlora.initialize_eva(model, {"up": torch.eye(6)})


@pytest.mark.parametrize(
    "fields, nearest",
    [
        (dict(layer_replication=[[0, 1]]), "replicate the layers of the model first"),
    ],
)
def test_a_refusal_names_the_nearest_thing(fields, nearest):
    model = make_llama()
    with pytest.raises(ValueError, match=f"{next(iter(fields))}=.* is set and not implemented: .*{nearest}"):
        fastlora.inject(model, peft.LoraConfig(r=2, target_modules=["q_proj"], **fields))
    assert not fastlora.nn.linear.adapted_layers(model)


@pytest.mark.parametrize("field", ["lora_bias", "use_dora"])
class TestRunsEveryWay:
    """What stands beside the factors, under a compiler, checkpointing, a low precision and tracking."""

    def model(self, field):
        return both(Biased, **CASES["biased"][2], **{field: True})[1].train()

    def test_compiled_and_checkpointed(self, field):
        model = self.model(field)
        x = torch.randn(4, 6, dtype=torch.float64)
        trained = [p for p in model.parameters() if p.requires_grad]
        wanted = torch.autograd.grad(model(x).square().sum(), trained)
        repeated = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        for run in (repeated, torch.compile(model, backend="eager")(x)):
            assert_close(run, model(x))
            for a, b in zip(torch.autograd.grad(run.square().sum(), trained), wanted, strict=True):
                assert b.any()
                assert_close(a, b)

    def test_bfloat16(self, field):
        exact, x = self.model(field), torch.randn(4, 6, dtype=torch.float64)
        model = copy.deepcopy(exact)
        for module in (model.up, model.down):
            module.weight.data, module.bias.data = module.weight.data.bfloat16(), module.bias.data.bfloat16()
        y = model(x.bfloat16())
        assert y.dtype == torch.bfloat16
        error = (y.double() - exact(x)).abs().max() / exact(x).abs().max()
        assert error < 4 * 2**-8 * 3  # a few roundings

    def test_statistics_are_of_the_frozen_weight(self, field):
        model, x = self.model(field), torch.randn(4, 6, dtype=torch.float64)
        with fastlora.track(model, estimator="exact") as tracker:
            model(x).square().sum().backward()
            tracker.step()
        layer = model.up
        W = layer.weight.detach().clone().requires_grad_()
        a, b, s = layer.pairs()[0]
        factors = layer.lora_B.default
        h = x @ (W + s * b @ a).t().detach() + x @ (W - W.detach()).t()
        h = h * layer.row_lengths("default").factors() if field == "use_dora" else h + s * factors.bias
        model.down(torch.tanh(h + layer.bias)).square().sum().backward()
        assert tracker.scores("grad_sq")["up"] == pytest.approx(float(W.grad.square().sum()), rel=1e-6)


def make_neox():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)).eval().double()


@pytest.mark.parametrize("fields", [dict(use_dora=True), dict(lora_bias=True)])
def test_slices_that_interleave(fields, tmp_path):
    """q, k and v of each head lie together; each has a rank of its own."""
    patterns = dict(rank_pattern={"gpt_neox.layers.0.attention.query_key_value[k]": 1})
    base = forward(make_neox())
    model = fastlora.inject(make_neox(), fastlora.LoraConfig(r=2, target_modules="qkv", **patterns, **fields))
    assert_close(forward(model), base)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    before = forward(model)
    assert not torch.allclose(before, base)
    for fold in (False, True):
        fastlora.save(model, tmp_path, fold_scale=fold)
        assert_close(forward(fastlora.load(make_neox(), tmp_path)), before)
        assert_close(forward(peft.PeftModel.from_pretrained(make_neox(), str(tmp_path))), before)
    assert_close(forward(fastlora.merge(model)), before)


def test_starts_from_a_whole_matrix():
    """What PEFT would take from a file of slices is another rest of the weight."""
    config = fastlora.LoraConfig(r=2, target_modules="qkv", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="takes a matrix as a whole, .*; pass split_qkv"):
        fastlora.inject(make_neox(), config)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_folded_scale_of_what_starts_from_the_weight(init, tmp_path):
    fields = dict(r=2, lora_alpha=3, target_modules=["up", "down"], init_lora_weights=init)
    model = fastlora.inject(Biased(), fastlora.LoraConfig(**fields))
    torch.nn.init.ones_(model.up.lora_B.default.weight)
    if init == "olora":
        with pytest.raises(ValueError, match="fold_scale: expected False for init_lora_weights='olora'"):
            fastlora.save(model, tmp_path, fold_scale=True)
        return
    fastlora.save(model, tmp_path, fold_scale=True)
    run32 = lambda m: run_biased(copy.deepcopy(m).double())  # noqa: E731
    for other in (fastlora.load(Biased(), tmp_path), peft.PeftModel.from_pretrained(Biased(), str(tmp_path))):
        torch.testing.assert_close(run32(other), run32(model), rtol=1e-4, atol=1e-5)
