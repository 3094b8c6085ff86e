"""Libraries that the tests do not install, where they are there: ``pytest -m embedding``; docs/your_trainer.md."""

from __future__ import annotations

import pytest
import torch
from support.peft_help import assert_close, logits, make_bert, transformers
from torch import nn

import fastlora
from fastlora.testing import enable_torchvision

enable_torchvision()
pytestmark = pytest.mark.embedding


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_as_one_process_does(stage, tmp_path):
    """ZeRO-3 gathers parameters as they are read in a forward; elsewhere its user does."""
    pytest.importorskip("deepspeed")
    from support import deepspeed_script as script

    torch.multiprocessing.spawn(script.engine, (stage, str(tmp_path)), nprocs=2)
    alone = script.alone()
    learned = torch.load(tmp_path / "learned.pt")
    assert learned.keys() == script.trained(alone).keys()
    for name, tensor in script.trained(alone).items():
        torch.testing.assert_close(learned[name], tensor.detach(), rtol=1e-5, atol=1e-7)
        assert not torch.equal(tensor, script.trained(script.model())[name])
    again = fastlora.load(make_bert().eval(), tmp_path / "adapter")
    assert_close(logits(again), logits(alone))


@pytest.mark.parametrize("make", ["linears", "bert"])
def test_onnx_runtime_gives_the_same(make, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    if make == "linears":
        model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(3, 8)
    else:
        model, x = make_bert(), torch.randint(5, 40, (2, 9))
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    with torch.no_grad():
        y = model(x)
    torch.onnx.export(model, (x,), dynamo=True).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (out, *_) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), getattr(y, "logits", y), rtol=1e-4, atol=1e-6)


def test_litgpt(tmp_path):
    """q, k and v of its grouped-query matrix have a rank each: a change of one slice's rows moves only that slice."""
    litgpt = pytest.importorskip("litgpt")
    config = litgpt.Config(
        block_size=16, vocab_size=64, padded_vocab_size=64, n_layer=1, n_head=4, n_query_groups=2, n_embd=32,
        mlp_class_name="LLaMAMLP", intermediate_size=48,
    )  # fmt: skip
    model, ids = litgpt.GPT(config), torch.randint(64, (2, 9))
    before = model(ids).detach()
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules="qkv"))
    rows = {row.key: row.out_features for row in fastlora.summary(model).rows}
    assert rows == {f"transformer.h.0.attn.qkv[{name}]": n for name, n in (("q", 32), ("k", 16), ("v", 16))}
    torch.testing.assert_close(model(ids), before)
    seen = {}
    attention = model.transformer.h[0].attn
    kept = attention.scaled_dot_product_attention
    attention.scaled_dot_product_attention = lambda q, k, v, *rest: seen.update(q=q, k=k, v=v) or kept(q, k, v, *rest)
    model(ids)
    plain = {name: tensor.detach().clone() for name, tensor in seen.items()}
    for name in "qkv":
        with torch.no_grad():
            attention.qkv.lora_B["default"].tensors()[name].normal_()
        model(ids)
        assert {n for n, t in seen.items() if not torch.allclose(t, plain[n])} == {name}
        with torch.no_grad():
            attention.qkv.lora_B["default"].tensors()[name].zero_()
    mlp = fastlora.inject(litgpt.GPT(config), fastlora.LoraConfig(r=2, target_modules="mlp"))
    mlp(ids).square().mean().backward()
    assert all(p.grad is not None for p in mlp.parameters() if p.requires_grad)
    assert len(fastlora.summary(mlp).rows) == 3
    config.mlp_class_name = "GptNeoxMLP"
    plain = fastlora.inject(litgpt.GPT(config), fastlora.LoraConfig(r=2, target_modules="mlp"))
    plain(ids).square().mean().backward()
    assert [row.key for row in fastlora.summary(plain).rows] == [f"transformer.h.0.mlp.{n}" for n in ("fc", "proj")]
    assert all(p.grad is not None for p in plain.parameters() if p.requires_grad)


def test_trls_sft_trainer(tmp_path):
    """What it trains are the factors alone, and what it saves can be loaded."""
    trl = pytest.importorskip("trl")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>",
    )  # fmt: skip

    def base():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    model = fastlora.inject(base(), fastlora.LoraConfig(r=2, target_modules="attention"))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    rows = pyarrow.Table.from_pylist([{"input_ids": torch.randint(3, 64, (9,)).tolist()} for _ in range(8)])
    data = datasets.Dataset(rows, fingerprint="rows")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer).train()
    for name, p in model.named_parameters():
        assert torch.equal(p, frozen[name]) if name in frozen else bool(p.detach().any()), name
    fastlora.save(model, tmp_path / "adapter")
    ids = torch.randint(3, 64, (2, 9))
    again = fastlora.load(base(), tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


class TestOpacus:
    def make(self, **mode):
        opacus = pytest.importorskip("opacus")
        torch.manual_seed(0)
        config = fastlora.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        model = fastlora.inject(nn.Sequential(nn.Linear(8, 4)), config)
        optimizer = torch.optim.SGD(fastlora.param_groups(model, lr_lora=0.1))
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 8)), batch_size=4)
        private, optimizer, _ = opacus.PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=data, noise_multiplier=0.0, max_grad_norm=0.1,
            poisson_sampling=False, **mode,
        )  # fmt: skip
        return model, private, optimizer

    def test_gradients_by_sample_come_from_torch_func(self):
        """p <- p - lr / 4 sum_i g_i min(1, C / ||g_i||), with the noise left out."""
        model, _, optimizer = self.make(grad_sample_mode="no_op")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in trained.items()}

        def loss(parameters, x):
            return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

        samples = torch.randn(4, 8)
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(before, samples)
        for name, p in trained.items():
            p.grad_sample = found[name]
        optimizer.step()
        expected = {name: torch.zeros_like(p) for name, p in before.items()}
        for x in samples:
            leaves = {name: p.clone().requires_grad_() for name, p in before.items()}
            grads = dict(zip(leaves, torch.autograd.grad(loss(leaves, x), list(leaves.values())), strict=True))
            norm = torch.stack([g.norm() for g in grads.values()]).norm()
            for name, g in grads.items():
                expected[name] += g * min(1.0, 0.1 / (float(norm) + 1e-6))
        for name, p in trained.items():
            assert not torch.equal(expected[name], torch.zeros_like(p))
            torch.testing.assert_close(p.detach(), before[name] - 0.1 / 4 * expected[name])

    def test_its_hooks_say_that_they_have_none(self):
        """They see the inputs of modules that hold parameters, and modules of factors have none."""
        _, private, optimizer = self.make()
        private(torch.randn(4, 8)).square().mean().backward()
        with pytest.raises(ValueError, match="Per sample gradient is not initialized"):
            optimizer.step()
