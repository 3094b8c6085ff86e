"""Models and comparisons with PEFT for the fields of its config."""

import torch

import fastlora

from .peft_help import assert_close, peft, transformers

NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32)
TARGETS = dict(r=2, target_modules=["q_proj", "up_proj"])


def make_llama(**fields):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, vocab_size=40, **fields)).eval()


def tokens(rows=3):
    return torch.randint(0, 40, (rows, 7), generator=torch.Generator().manual_seed(5))


def forward(model, x=None):
    return model(input_ids=tokens() if x is None else x).logits


def plain_names(model):
    """Trainable parameters by PEFT's names in a file, with their shapes."""
    out = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", "")
            out[name.removesuffix(".weight")] = parameter.numel()
    return out


def both(make, **fields):
    """A model of PEFT's with random factors and ours from its config, with the same values, both in float64."""
    theirs = peft.get_peft_model(make().double(), peft.LoraConfig(**fields))
    ours = fastlora.inject(make().double(), peft.LoraConfig(**fields))
    named = {n.removeprefix("base_model.model."): p for n, p in theirs.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".lora_" in name or "trainable_tokens_delta" in name:
                values = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.1
                parameter.copy_(values)
                name = name.replace("lora_B.default.magnitude", "lora_magnitude_vector.default.weight")
                named[name].copy_(values)
    return theirs, ours


def trained_by_peft(make, folder, *, run=forward, **fields):
    torch.manual_seed(1)
    model = peft.get_peft_model(make().double(), peft.LoraConfig(**fields))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()
    model.eval().save_pretrained(str(folder))
    with torch.no_grad():
        return model, run(model)


def assert_same_first_step(theirs, ours, run=forward):
    """Outputs, then every trained parameter after one step of SGD."""
    for model in (theirs, ours):
        model.train()
    assert_close(run(ours), run(theirs))
    stepped = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        run(model).square().mean().backward()
        optimizer.step()
        stepped.append(run(model))
    assert_close(stepped[1], stepped[0])


def make_gpt2():
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=40, **NO_DROPOUT)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


class Biased(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def run_biased(model):
    return model(torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64))


CASES = {
    "llama": (make_llama, forward, TARGETS),
    "gpt2": (make_gpt2, forward, dict(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "biased": (Biased, run_biased, dict(r=2, target_modules=["up", "down"], lora_alpha=3)),
}
