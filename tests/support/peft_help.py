"""Small models, a short training and comparisons for the tests of adapter files; ``peft`` is the real one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora.testing import enable_torchvision

enable_torchvision()
peft = pytest.importorskip("peft", minversion="0.18")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

CONFIG, TENSORS, SIDE = "adapter_config.json", "adapter_model.safetensors", "fastlora.json"
KEY = "base_model.model.{}.lora_{}.weight"


def make_vit(depth=2):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=depth, num_heads=3, num_classes=5
    ).eval()


TEXT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40)
TEXT |= dict(max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def make_bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)).eval()


def make_roberta():
    torch.manual_seed(0)
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXT)).eval()


class Nested(nn.Module):
    """``layer.1.q`` is also the tail of ``vision.layer.1.q``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = lambda: nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)})  # noqa: E731
        self.layer = nn.ModuleList([block(), block()])
        self.vision = nn.ModuleDict({"layer": nn.ModuleList([block(), block()])})
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for blocks in (self.vision["layer"], self.layer):
            for block in blocks:
                x = torch.tanh(block["k"](torch.tanh(block["q"](x)))) + x
        return self.head(x)


MODELS = {"vit": make_vit, "bert": make_bert, "roberta": make_roberta, "nested": Nested}


def run(model):
    generator = torch.Generator().manual_seed(7)
    inner = getattr(model, "base_model", model)
    inner = inner.model if isinstance(model, peft.PeftModel) else model
    if isinstance(inner, transformers.PreTrainedModel):
        return model(input_ids=torch.randint(5, 40, (3, 9), generator=generator)).logits
    shape = (3, 8) if isinstance(inner, Nested) else (3, 3, 16, 16)
    return model(torch.randn(shape, generator=generator))


@torch.no_grad()
def logits(model):
    return run(model.eval())


def train(model, steps=3):
    """B away from zero, then a few real steps, so that head, biases and factors all have moved."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model).square().sum().backward()
        optimizer.step()
    return model


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def adapted(kind, **config):
    return train(fastlora.inject(MODELS[kind](), fastlora.LoraConfig(**config)))


def saved_by_peft(kind, path, **config):
    """A trained PEFT model's logits; the files are in ``path``."""
    model = train(peft.get_peft_model(MODELS[kind](), peft.LoraConfig(**config)))
    model.save_pretrained(str(path))
    return logits(model)


def snapshot(model):
    state = {k: (v.dtype, v.clone()) for k, v in model.state_dict().items()}
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    kinds = {k: type(m) for k, m in model.named_modules()}
    layers = fastlora.nn.linear.adapted_layers(model)
    scales = {(n, a): dict(s.scale) for n, layer in layers.items() for a, s in layer.adapter_specs.items()}
    return state, flags, kinds, scales, sorted(vars(model))


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for key, (dtype, value) in before[0].items():
        assert after[0][key][0] == dtype and torch.equal(value, after[0][key][1]), key


def refused(model, path, match, error=ValueError, **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        fastlora.load(model, path, **kwargs)
    assert_same(before, snapshot(model))
    return str(caught.value)


def edit_json(path, name, **changes):
    raw = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps({**raw, **changes}))
    return raw


def edit_tensors(path, change):
    tensors = load_file(path / TENSORS)
    change(tensors)
    save_file(tensors, path / TENSORS)
