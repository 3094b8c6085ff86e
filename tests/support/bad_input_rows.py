"""The table of bad input: for every argument of every public function what is given, and the error that follows.

``bad`` and the values of ``also`` (further arguments that differ from the right call) may be functions, which are
called, ``bad`` with the right arguments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

import fastlora
from support.public_calls import KEY, Blocks, adamw, adapted, batches, config, merged, plain, tracked

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Row:
    """One bad value."""

    bad: Any
    match: str
    error: type[Exception] = ValueError
    also: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        text = self.bad.__name__ if callable(self.bad) else repr(self.bad)
        return "".join(c if c.isalnum() else "_" for c in text)[:24]


def rows(*pairs: tuple[Any, str], error: type[Exception] = ValueError, **also: Any) -> list[Row]:
    return [Row(bad, match, error, also) for bad, match in pairs]


def without_adapters(good):
    return plain()


def already_merged(good):
    return merged()


def already_tracked(good):
    return tracked()


def wrapped_by_peft(good):
    import peft

    return peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["q"]))


def awaits_backward(good):
    """Kept alive by the model: a forward whose backward has not run."""
    model = adapted()
    fastlora.set_adapter(model, "b")
    model.kept = [model(torch.randn(2, 8))]
    fastlora.set_adapter(model, "default")
    return model


def other_model(good):
    return adamw(torch.nn.ModuleDict({"x": adapted()})["x"])


def no_scores(good):
    return fastlora.Scores({}, "grad_sq")


def one_batch(good):
    return batches()[:1]


def nan_batches(good):
    return [(x * NAN, y) for x, y in batches()]


def integers(good):
    return torch.tensor([[1, 2], [3, 4]])


def state_of_other_keys(good):
    return {**good["self"].state_dict(), "keys": ["x"]}


def state_of_other_probes(good):
    return {**good["self"].state_dict(), "probes": 3}


NOT_A_MODEL = ("bert", "model: expected a torch.nn.Module, got str")
NO_ADAPTERS = (without_adapters, "model: has no adapters; call fastlora.inject first")
MODEL = rows(NOT_A_MODEL, NO_ADAPTERS)
GROUP = rows(("gloo", "process_group: expected 'auto', None or a process group, got 'gloo'"), (3, "process_group: exp"))
LORA = {
    "r": rows((0, "r: expected a rank >= 1, got 0"), (2.0, "r: expected an integer"), (9, "r: at most .* = 8, got 9")),
    "lora_alpha": rows((NAN, "lora_alpha: expected a finite number"), (True, "lora_alpha: expected a finite number")),
    "lora_dropout": rows((1.0, r"lora_dropout: expected a probability in \[0, 1\)"), (-0.1, "lora_dropout: expected")),
}
LAYER = {
    **LORA,
    "use_rslora": rows(("yes", "use_rslora: expected one of")),
    "init_lora_weights": rows(("pissa", "init_lora_weights: expected one of")),
    "adapter_dtype": rows((torch.int8, "adapter_dtype: expected a floating torch.dtype, got torch.int8")),
    "train_base": rows(("no", "train_base: expected True or False, got 'no'")),
    "backend": rows(("fast", "backend: expected one of")),
    "prepack": rows(("yes", "prepack: expected one of")),
}
NUMBERS = rows(
    (
        [1.0],
        "must be a mapping",
    ),
    ({1: 1.0}, "must have string keys"),
    error=TypeError,
)
NUMBERS += rows(({"a": NAN, "b": 1.0}, "must be finite"), ({"a": 1.0, "c": 1.0}, "c|common"))
TENSORS = rows(
    (torch.ones(3), r"logits must be \[n, classes\]"), (torch.ones(0, 3), "logits must not be empty"),
    (torch.ones(3, 1), "logits must have at least 2 classes"), (integers, "logits must be floating point"),
    (torch.full((3, 3), INF), "logits must be finite"),
)  # fmt: skip
LABELS = rows(
    (torch.tensor([0, 1, 3]), "labels must lie in 0..2"), (torch.tensor([0, 1]), r"labels must be \[3\]"),
    (torch.ones(3), "labels must be integers"),
)  # fmt: skip
BINS = rows((0, "bins must be at least 1")) + rows((1.5, "bins must be an integer"), error=TypeError)
TEMPERATURE = rows((0.0, "temperature must be positive"), (INF, "temperature must be positive and finite"))
TRACK = {
    "model": rows(NO_ADAPTERS, (already_tracked, "model: is tracked already")),
    "estimator": rows(("guess", r"estimator: expected one of \('probe', 'exact'\)")),
    "probes": rows((0, "probes: expected 'auto' or a positive integer"), (2.5, "probes: expected 'auto'")),
    "ema": rows((1.0, r"ema: expected a number in \[0, 1\) or None"), ("0.9", "ema: expected a number")),
    "warmup": rows((0, "warmup: expected a positive number of steps or None"), (0.5, "warmup: expected")),
    "statistics": rows(
        ((), "statistics: expected at least one of"), (("norm",), "statistics: expected one of"),
        (3, "statistics: exp"),
        (("grad_abs",), "'grad_abs' cannot be estimated from .* it needs probe_kind='columns' or estimator='exact'"),
        (("grad_sq", "fisher"), "'grad_sq' or 'fisher', not both"), (("act_cov",), "not estimated from probes"),
    ),
    "process_group": GROUP,
    "probe_kind": rows(("rows", r"probe_kind: expected one of \('rademacher', 'columns'\)"), (None, "probe_kind: exp")),
    "seed": rows((0.5, "seed: expected an integer"), (True, "seed: expected an integer")),
    "loss_reduction": rows(("none", "loss_reduction: expected one of")),
    "every": rows((0, "every: expected 'auto' or a positive number of steps"), (1.5, "every: expected 'auto'")),
    "adapter": rows(("c", r"adapter: expected one of \['default', 'b'\], got 'c'"),
                    (["b"], "adapter: expected one of")),
}  # fmt: skip
PENALTY = {
    "weight": rows((NAN, "weight")) + rows(("1", "weight"), error=TypeError),
    "form": rows(("l2", "form")),
    "normalize": rows(("max", "normalize")),
    "adapter": rows(("c", "adapter: no tracked layer has an adapter 'c'")),
}
RATE = ((-1.0, "expected a finite number >= 0, got -1.0"), (NAN, "expected a finite number >= 0"))

ROWS: dict[str, dict[str, list[Row]]] = {
    "training.Diagnostics": {"optimizer": rows((None, "optimizer: expected a torch.optim.Optimizer, got NoneType"))},
    "LoraConfig": {
        **{k: v for k, v in LAYER.items() if k not in ("r", "train_base")},
        "r": LORA["r"][:2],
        "target_modules": rows(("(q", "neither a role .* nor a regular expression"), (3, "target_modules: expected")),
        "exclude_modules": rows(("(q", "exclude_modules: '\\(q' is neither"), ([3], "exclude_modules: expected")),
        "bias": rows(("some", "bias: expected one of")),
        "modules_to_save": rows(("head", "expected a list of names, got the string"),
                                ([3], "modules_to_save: expected")),
        "rank_pattern": rows(([("q", 2)], "rank_pattern: expected a mapping"), ({"q": -1}, r"rank_pattern\['q'\]")),
        "alpha_pattern": rows(({"q": "8"}, r"alpha_pattern\['q'\]: expected a finite number"), ("q", "alpha_pattern")),
        "scale": rows(("rank", "scale: expected one of")),
        "split_qkv": rows(("yes", "split_qkv: expected one of")),
    },
    "LoraConfig.scaling": {
        "rank": rows((-1, "rank: expected a rank >= 0"), (2.5, "rank: expected an integer")),
        "alpha": rows((NAN, "alpha: expected a finite number"), ("8", "alpha: expected a finite number")),
    },
    "LoraConfig.coerce": {"config": rows(({"r": 8}, "config: expected .*LoraConfig or peft.LoraConfig, got dict"))},
    "Scores": {
        "values": rows(([1.0], "values must be a mapping"), ({1: 1.0}, "values must have string keys"), error=TypeError)
        + rows(({"a": NAN}, r"values\['a'\] must be finite"), ({"a": INF}, r"values\['a'\] must be finite"),
               ({"a": -1.0}, "is negative: pass signed=True")),
        "kind": rows(("", "kind must be a non-empty string"), (3, "kind must be"), error=TypeError),
        "signed": rows((1, "signed must be True, False or None"), error=TypeError),
        "costs": rows(({"a": 3}, "costs lacks 'b'"), ({"a": 0, "b": 1}, r"costs\['a'\] must be at least 1")),
    },
    "Scores.rank_correlation": {"other": rows(({KEY: 1.0}, "other must share at least 2 keys"))},
    "Tracker": TRACK,
    "Tracker.step": {"scaler": rows((3, "scaler: expected a GradScaler"))},
    "Tracker.scores": {
        "kind": rows(("fisher", "kind: 'fisher' is not tracked, only grad_sq"),
                     ("grad_abs", "needs probe_kind='columns' or estimator='exact'")),
        "reduce": rows(("max", r"reduce: expected one of \('sum', 'mean'\)")),
    },
    "Tracker.mask": {
        "mask": rows((None, "mask: expected booleans or integers"), (torch.ones(2, 3), r"got torch.float32 \(2, 3\)"),
                     (torch.tensor(True), "mask: expected"), (torch.tensor([0, 2]), r"0 and 1 only, got \[2\]")),
    },
    "Tracker.covariances": {"kind": rows(("act_cov", "kind: 'act_cov' is not tracked"))},
    "Tracker.penalty": PENALTY,
    "Tracker.apply_penalty": PENALTY,
    "Tracker.load_state_dict": {
        "state": rows((state_of_other_keys, "state: keys differ"),
                      (state_of_other_probes, "state: probes differ: saved 3"),
                      ({}, "state: ")),
    },
    "adapter_names": {"model": MODEL},
    "use_adapters": {
        "model": rows(*((r.bad, r.match) for r in MODEL), (already_merged, "model: an adapter is merged")),
        "ids": rows(
            (torch.tensor([0, 7]), "ids: 7 at position 1 is unknown"),
            (torch.tensor([0.0]), "ids: expected an int64 tensor"),
            (["b", "c"], r"ids: expected one of \['default', 'b'\], got 'c'"),
            (3, "ids: expected an int64 tensor, names"),
            (torch.zeros(1, 1, 1, dtype=torch.int64), "ids: expected an int64 tensor"),
        ),
        "row_seeds": rows((torch.tensor([1, 2]), "row_seeds: expected one for each of 3 ids"),
                          ([1, 2, 3], "row_seeds: exp")),
    },
    "add_adapter": {
        "model": MODEL,
        "name": rows(("b", "name: the model already has an adapter 'b'"), ("a.b", "name: expected a non-empty string"),
                     ("", "name: expected a non-empty string"), ("keys", "name: .* nn.ModuleDict does not use itself")),
        "config": rows(({"r": 2}, "config: expected fastlora.LoraConfig"),
                       (config(bias="all"), "bias: expected 'none'"),
                       (config(target_modules=["qq"]), "target_modules: 'qq' matches no module")),
    },
    "allocate": {
        "scores": rows(({}, "scores must not be empty"), ({"a": NAN}, "must be finite"), ({"a": -1.0}, "is negative"))
        + rows(([1.0], "scores must be a mapping"), error=TypeError),
        "budget": rows((1, "budget"), (-1, "budget")) + rows((2.5, "budget"), error=TypeError),
        "r_min": rows((17, "r_min = 17 is larger than r_max = 16"), ({"a": 1}, "r_min"), (-1, "r_min")),
        "r_max": rows((-1, "r_max"), ({"a": 1, "z": 2}, "r_max")),
        "step": rows((0, "step")) + rows((0.5, "step"), error=TypeError),
        "unit": rows(("bytes", "unit")),
        "costs": rows(({"a": 3}, "costs lacks 'b'"), (None, "costs="), unit="params", budget=100),
        "per": rows(("byte", "per")),
        "rule": rows(("greedy", "rule")),
        "shares": rows(("equal", "shares")),
        "tau": rows((0.0, "tau"), (NAN, "tau")),
        "power": rows((-1.0, "power"), (INF, "power")),
    },
    "Scores.breakdown": {"self": rows((no_scores, "scores must not be empty"))},
    "calibrate": {
        "model": MODEL[1:] + rows((already_tracked, "model: is tracked already")),
        "batches": rows((3, "batches: expected an iterable"), ([], "batches: yielded nothing"),
                        (one_batch, "batches: ran out after 1 of steps=2"),
                        (nan_batches, "the loss of batch 0 is nan")),
        "loss_fn": rows((3, "loss_fn: expected a callable"), (lambda good: None, "loss_fn: ")),
        "steps": rows((0, "steps: expected a positive integer or None"), (True, "steps: expected")),
        "method": rows(("best", "method: expected one of"), ("fim", "B")),
        "centered": rows((1, "centered: expected True or False"), (True, "centered: works with method='fim' only")),
        "progress": rows(("bar", "progress")),
        "process_group": GROUP,
        "adapter": rows(("c", "adapter: expected one of"), (["b"], "adapter: expected one of")),
    },
    "Scores.composite": {
        "grad_sq": NUMBERS, "grad_abs": NUMBERS, "act_var": NUMBERS,
        "weights": rows(((1.0, 1.0), "weights must hold 3 numbers"), ((NAN, 1.0, 1.0), r"weights\[0\] must be finite"))
        + rows((3, "weights must be a sequence"), error=TypeError),
        "normalize": rows(("max", "normalize must be 'zscore' or 'minmax'")),
    },
    "disable_adapters": {"model": MODEL},
    "training.ece": {"logits": TENSORS, "labels": LABELS, "bins": BINS, "temperature": TEMPERATURE},
    "explain": {"model": MODEL[:1]},
    "training.fit_temperature": {
        "logits": TENSORS, "labels": LABELS, "max_iter": rows((0, "max_iter must be at least 1")),
    },
    "freeze_unused_adapters": {
        "model": MODEL, "optimizer": rows((3, "optimizer: expected a torch.optim.Optimizer, got int")),
    },
    "inject": {
        "model": rows(NOT_A_MODEL, (lambda good: adapted(), "model: 'blocks.0.q' already has an adapter"),
                      (wrapped_by_peft, "model: it is wrapped by PEFT")),
        "config": rows(({"r": 8}, "config: expected fastlora.LoraConfig"),
                       (config(r=9), "rank of .*: at most .* = 8, got 9"),
                       (config(rank_pattern={"x": 2}), "rank_pattern: 'x' matches no")),
        "adapter": rows(("", "adapter: expected a non-empty string without dots, got ''"), (None, "adapter: expected"),
                        ("items", "adapter: expected a name that nn.ModuleDict does not use itself, got 'items'")),
        "accelerate_frozen": rows(("yes", "accelerate_frozen: expected True or False, got 'yes'")),
        "check": rows(("ignore", "check: expected")),
    },
    "load": {
        "model": rows(NOT_A_MODEL, (lambda good: Blocks().blocks, "has no module of that name")),
        "path": rows((3, "path: expected the path of a folder, got 3"))
        + rows(("no such", "no such folder"), error=FileNotFoundError),
        "adapter": rows(("a.b", "adapter: expected a non-empty string without dots"),
                        ({}, "adapter: expected a non-empty string without dots")),
    },
    "from_peft": {
        "peft_model": rows(("bert", "peft_model: expected a peft.PeftModel, got str"),
                           (without_adapters, "peft_model: expected a peft.PeftModel, got Blocks")),
        "adapter": rows(("c", r"adapter: expected one of \['default'\], got 'c'")),
    },
    "load_layout": {
        "model": rows(NOT_A_MODEL),
        "state_dict": rows(({}, "state_dict: has no keys"), ([1], "state_dict: expected a mapping")),
        "layout": rows(("peft", "layout: expected one of"), ([], "layout: expected one of")),
        "lora_alpha": rows((NAN, "lora_alpha: expected a finite number"), ("1", "lora_alpha: expected a finite")),
        "rename": rows(({"x": "y"}, "rename: 'x' is not in state_dict"), (3, "rename: expected a mapping")),
        "enable_lora": rows(("qkv", "enable_lora: expected True or False"), ([], "enable_lora: expected True or")),
        "adapter": rows((3, "adapter: expected a non-empty string without dots, got 3"), ("keys", "nn.ModuleDict")),
    },
    "merge": {
        "model": MODEL + rows((already_merged, "is merged already")),
        "adapter": rows(("c", "adapter: expected one of")),
        "requantize": rows((1, "requantize: expected True or False")),
        "progress": rows(("bar", "progress: expected True, False, None or a callable")),
    },
    "param_groups": {
        "model": MODEL,
        **{name: rows(*RATE) for name in ("lr_norm", "lr_head", "lr_bias")},
        "lr_lora": rows(*RATE, ({"default": 1.0}, "lr_lora: expected a rate for each of")),
        "weight_decay": rows(*RATE, ({"heads": 1.0}, "weight_decay: expected group names among")),
        "adapter": rows(("c", r"adapter: expected one of \['default', 'b'\], got 'c'")),
    },
    "per_adapter_mean": {
        "losses": rows((torch.ones(2), "losses: expected the shape of ids"),
                       ([1.0], "losses: expected a floating tensor")),
        "ids": rows((torch.zeros(3), "ids: expected an int64 tensor"),
                    ([0, 1, 2], "ids: expected an int64 tensor, got list")),
    },
    "apply_policy": {
        "model": rows(NOT_A_MODEL, (lambda good: adapted(), "already has an adapter"),
                      (lambda good: torch.nn.Linear(8, 3), "model: policy 'deep_lora' needs blocks")),
        "name": rows(("deep_lara", "name: expected one of .*did you mean 'deep_lora'")),
        "config": rows(({"r": 2}, "config: expected fastlora.LoraConfig")),
        "deep": rows((0, "deep: expected a positive number of blocks"),
                     (3, "deep: the stack of .* has 2 blocks, got 3")),
    },
    "LoraConfig.preset": {"difficulty": rows(("hard", "difficulty: expected one of"),
                                  (["simple"], "difficulty: expected one of"))},
    "reallocate": {
        "model": MODEL,
        "scores": rows(({"blocks.0.w": 1.0}, "scores: unknown matrix 'blocks.0.w'.*did you mean"),
                       ([1], "scores: expected")),
        "budget": rows((1, "budget")) + rows((2.5, "budget"), error=TypeError),
        "r_min": rows((-1, "r_min: expected a rank >= 0"), ("2", "r_min: expected an integer rank")),
        "r_max": rows((0, "r_max: expected a rank >= 1"), (1, "r_min = 2 is larger than r_max = 1")),
        "adapter": rows(("c", "adapter: expected one of")),
        "reinit": rows(("yes", "reinit: expected True or False"), (False, "pass reinit=True")),
    },
    "training.reliability": {"logits": TENSORS, "labels": LABELS, "bins": BINS, "temperature": TEMPERATURE},
    "delete_adapter": {
        "model": MODEL + rows((awaits_backward, "name: a forward of 'b' awaits its backward")),
        "name": rows(("c", r"name: expected one of \['default', 'b'\], got 'c'"),
                     ("default", "'default' runs by default")),
    },
    "save": {
        "model": MODEL,
        "path": rows((3, "path: expected the path of a folder, got 3"), (__file__, "path: expected a folder")),
        "adapter": rows(("c", r"adapter: expected one of \['default', 'b'\], got 'c'")),
        "fold_scale": rows(("yes", "fold_scale: expected True or False")),
        "importance": rows(({"a": NAN}, "importance: expected finite scores by name"),
                           ([1], "importance: expected a mapping")),
    },
    "set_adapter": {"model": MODEL, "name": rows(("c", r"name: expected one of \['default', 'b'\], got 'c'"))},
    "set_ranks": {
        "model": MODEL + rows((awaits_backward, "a forward of 'b' awaits its backward"), adapter="b"),
        "ranks": rows(({"blocks.0.w": 1}, "ranks: unknown matrix"), ([1], "ranks: expected a mapping"),
                      ({KEY: 9}, f"rank of {KEY}: at most .* = 8, got 9"),
                      ({KEY: 2.0}, f"rank of {KEY}: expected an integer")),
        "adapter": rows(("c", "adapter: expected one of")),
        "reinit": rows((1, "reinit: expected True or False"), (False, "pass reinit=True")),
        "keep": rows((1, "keep: expected True or False"), (True, "keep: expected keep or reinit, got both")),
    },
    "summary": {"model": MODEL, "adapter": rows(("c", r"adapter: expected one of \['default', 'b'\], got 'c'"))},
    "track": TRACK,
    "to_peft": {
        "model": MODEL + rows((already_merged, "is merged; call fastlora.unmerge")),
        "adapter": rows(("c", "adapter: expected one of")),
    },
    "unmerge": {"model": MODEL + rows((lambda good: adapted(), "model: nothing is merged"))},
    "training.Cosine": {
        "optimizer": rows((None, "optimizer: expected a torch.optim.Optimizer, got NoneType")),
        "steps": rows((0, "steps: expected an integer >= 1"), (2.5, "steps: expected an integer")),
        "floor": rows((0.0, "floor: expected a positive learning rate"),
                      (1.0, "floor: 1.0 is above the learning rate")),
        "warmup": rows((10, "warmup: expected less than steps = 10"), (-1, "warmup: expected")),
        "freeze": rows((10, "freeze: .*would not learn"), ({"x": 2}, "freeze: no parameter group is named 'x'")),
        "freeze_by": rows(("detach", "freeze_by: expected one of")),
    },
    "nn.Conv1D": LAYER,
    "nn.Linear": LAYER,
    "nn.QKVLinear": LAYER,
    "nn.MultiheadAttention": {**LORA, "r": rows((0, "r: expected a rank >= 1"), (9, "r.*at most .* = 8, got 9")),
                              "split_qkv": rows(("yes", "split_qkv: expected one of"))},
}  # fmt: skip
