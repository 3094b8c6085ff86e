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
TYPE = TypeError


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
    """Rows of values that are refused with ``ValueError``, or with what follows the message."""
    return [Row(bad, match, *(kind or (error,)), also) for bad, match, *kind in pairs]


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


NOT_A_MODEL = ("bert", "model: expected a torch.nn.Module, got 'bert'", TYPE)
NO_ADAPTERS = (without_adapters, "model: has no adapters; call fastlora.inject first")
MODEL = rows(NOT_A_MODEL, NO_ADAPTERS)
GROUP = rows(("gloo", "process_group: expected 'auto', None or a process group, got 'gloo'"),
             (3, "process_group: expected", TYPE))  # fmt: skip
LORA = {
    "r": rows(
        (0, "r: expected an integer >= 1"), (2.0, "r: expected an integer", TYPE), (9, "r: expected at most .* = 8")
    ),
    "lora_alpha": rows((NAN, "lora_alpha: expected a finite number"), (True, "lora_alpha: expected a finite", TYPE)),
    "lora_dropout": rows((1.0, "lora_dropout: expected a probability >= 0 and < 1"), (-0.1, "lora_dropout: expected")),
}
LAYER = {
    **LORA,
    "use_rslora": rows(("yes", "use_rslora: expected one of")),
    "init_lora_weights": rows(("svd", "init_lora_weights: expected one of")),
    "adapter_dtype": rows((torch.int8, "adapter_dtype: expected a floating torch.dtype or None, got torch.int8")),
    "train_base": rows(("no", "train_base: expected True or False, got 'no'", TYPE)),
    "backend": rows(("fast", "backend: expected one of")),
    "prepack": rows(("yes", "prepack: expected one of")),
}
NUMBERS = rows(([1.0], "expected a mapping of keys to numbers", TYPE), ({1: 1.0}, "expected string keys, got 1", TYPE),
               ({"a": NAN, "b": 1.0}, r"\['a'\]: expected a finite number, got nan"),
               ({"a": 1.0, "c": 1.0}, "'c'"))  # fmt: skip
TENSORS = rows(
    (torch.ones(3), r"logits: expected floating \[n, classes\].*, got torch.float32 \(3,\)"),
    (torch.ones(0, 3), r"logits: expected .* n >= 1 .*, got torch.float32 \(0, 3\)"),
    (torch.ones(3, 1), r"logits: expected .* at least 2 classes, got torch.float32 \(3, 1\)"),
    (integers, "logits: expected floating .*, got torch.int64"),
    (torch.full((3, 3), INF), "logits: expected finite numbers, got NaN or infinity"),
)  # fmt: skip
LABELS = rows(
    (torch.tensor([0, 1, 3]), r"labels: expected 0\.\.2, got values from 0 to 3"),
    (torch.tensor([0, 1]), r"labels: expected shape \[3\]"), (torch.ones(3), "labels: expected integers"),
)  # fmt: skip
BINS = rows((0, "bins: expected an integer >= 1, got 0"), (1.5, "bins: expected an integer", TYPE))
TEMPERATURE = rows(
    (0.0, "temperature: expected a finite number > 0"), (INF, "temperature: expected a finite number > 0")
)
TRACK = {
    "model": rows(NO_ADAPTERS, (already_tracked, "model: is tracked already")),
    "estimator": rows(("guess", r"estimator: expected one of \('probe', 'exact'\)")),
    "probes": rows((0, "probes: expected 'auto', or an integer >= 1"), (2.5, "probes: expected 'auto'", TYPE),
                   ("all", "probes: expected 'auto', or an integer >= 1, got 'all'")),
    "ema": rows((1.0, "ema: expected None for a mean, or a number >= 0 and < 1"), ("0.9", "ema: expected", TYPE)),
    "warmup": rows((0, "warmup: expected None, or a number of steps >= 1"), (0.5, "warmup: expected", TYPE)),
    "statistics": rows(
        ((), "statistics: expected at least one of"), (("norm",), "statistics: expected one of"),
        (3, "statistics: expected some of", TYPE),
        (("grad_abs",), "'grad_abs' cannot be estimated from .* it needs probe_kind='columns' or estimator='exact'"),
        (("grad_sq", "fisher"), "'grad_sq' or 'fisher', not both"), (("act_cov",), "not estimated from probes"),
    ),
    "process_group": GROUP,
    "probe_kind": rows(("rows", r"probe_kind: expected one of \('rademacher', 'columns'\)"), (None, "probe_kind: exp")),
    "seed": rows((0.5, "seed: expected an integer", TYPE), (True, "seed: expected an integer", TYPE)),
    "loss_reduction": rows(("none", "loss_reduction: expected one of")),
    "every": rows((0, "every: expected 'auto', or a number of steps >= 1"), (1.5, "every: expected 'auto'", TYPE)),
    "adapter": rows(("c", r"adapter: expected one of \['default', 'b'\], got 'c'"),
                    (["b"], "adapter: expected one of")),
}  # fmt: skip
PENALTY = {
    "weight": rows((NAN, "weight: expected a finite number"), ("1", "weight: expected a finite number", TYPE)),
    "form": rows(("l2", "form: expected one of")),
    "normalize": rows(("max", "normalize: expected one of")),
    "adapter": rows(("c", r"adapter: expected one of \['default', 'b'\], got 'c'"), (3, "adapter: expected", TYPE)),
}
RATE = ((-1.0, "expected a finite number >= 0, got -1.0"), (NAN, "expected a finite number >= 0"))

# What every function that runs a few backward passes refuses.
PASSES = {
    "batches": rows((3, "batches: expected an iterable", TYPE), ([], "batches: yielded nothing"),
                    (one_batch, "batches: ran out after 1 of steps=2"),
                    (nan_batches, "the loss of batch 0 is nan")),
    "loss_fn": rows((3, "loss_fn: expected a callable", TYPE), (lambda good: None, "loss_fn: expected", TYPE)),
    "steps": rows((0, "steps: expected None for all batches, or an integer >= 1"), (True, "steps: expected", TYPE)),
}  # fmt: skip
ROWS: dict[str, dict[str, list[Row]]] = {
    "training.Diagnostics": {"optimizer": rows((None, "optimizer: expected a torch.optim.Optimizer, got None", TYPE))},
    "LoraConfig": {
        **{k: v for k, v in LAYER.items() if k not in ("r", "train_base")},
        "r": LORA["r"][:2],
        "target_modules": rows(("(q", "target_modules: expected a role .* got '\\(q', which is no regular expression"),
                               (3, "target_modules: expected", TYPE)),
        "exclude_modules": rows(("(q", "exclude_modules: expected a role .* got '\\(q'"),
                                ([3], "exclude_modules: expected", TYPE)),
        "bias": rows(("some", "bias: expected one of")),
        "trainable_token_indices": rows(("q", "trainable_token_indices: expected one or several different", TYPE),
                                        ([], "trainable_token_indices: expected one or several different"),
                                        ([1, 1], "trainable_token_indices: expected one or several different"),
                                        ([-1], "trainable_token_indices: expected an integer >= 0, got -1"),
                                        ({3: [1]}, "trainable_token_indices: a key: expected", TYPE)),
        "target_parameters": rows(("down_proj", "target_parameters: expected a list of names or None", TYPE),
                                  ([3], "target_parameters: expected", TYPE)),
        "modules_to_save": rows(("head", "modules_to_save: expected a list of names or None, got 'head'", TYPE),
                                ([3], "modules_to_save: expected", TYPE)),
        "rank_pattern": rows(([("q", 2)], "rank_pattern: expected a mapping", TYPE),
                             ({"q": -1}, r"rank_pattern\['q'\]: expected an integer >= 0, got -1")),
        "alpha_pattern": rows(({"q": "8"}, r"alpha_pattern\['q'\]: expected a finite number", TYPE),
                              ("q", "alpha_pattern: expected a mapping", TYPE)),
        "layers_to_transform": rows((-1, "layers_to_transform: expected None, or one or several integers >= 0, got -1"),
                                    ("1", "layers_to_transform: expected", TYPE)),
        "layers_pattern": rows((3, "layers_pattern: expected a name, a list of names or None", TYPE),
                               ("h", "layers_pattern: expected None without layers_to_transform")),
        "lora_bias": rows((1, "lora_bias: expected one of")),
        "use_dora": rows(("yes", "use_dora: expected one of")),
        "ensure_weight_tying": rows((1, "ensure_weight_tying: expected one of")),
        "scale": rows(("rank", "scale: expected one of")),
        "split_qkv": rows(("yes", "split_qkv: expected one of")),
    },
    "LoraConfig.scaling": {
        "rank": rows((-1, "rank: expected an integer >= 0"), (2.5, "rank: expected an integer", TYPE)),
        "alpha": rows((NAN, "alpha: expected a finite number"), ("8", "alpha: expected a finite number", TYPE)),
    },
    "LoraConfig.coerce": {"config": rows(({"r": 8},
                                         "config: expected a fastlora.LoraConfig or a peft.LoraConfig", TYPE))},
    "Scores": {
        "values": rows(([1.0], "values: expected a mapping", TYPE), ({1: 1.0}, "values: expected string keys", TYPE),
                       ({"a": NAN}, r"values\['a'\]: expected a finite number, got nan"),
                       ({"a": INF}, r"values\['a'\]: expected a finite number, got inf"),
                       ({"a": -1.0}, r"values\['a'\]: expected a number >= 0 .*, got -1.0: pass signed=True")),
        "kind": rows(("", "kind: expected a non-empty string"), (3, "kind: expected", TYPE)),
        "signed": rows((1, "signed: expected True, False or None", TYPE)),
        "costs": rows(({"a": 3}, "costs: expected one for every key, got none for 'b'"),
                      ({"a": 0, "b": 1}, r"costs\['a'\]: expected an integer >= 1, got 0")),
    },
    "Scores.rank_correlation": {"other": rows(({KEY: 1.0}, "other: expected at least 2 keys of these scores, got 1"))},
    "Tracker": TRACK,
    "Tracker.step": {"scaler": rows((3, "scaler: expected a GradScaler", TYPE))},
    "Tracker.scores": {
        "kind": rows(("fisher", r"kind: expected what is tracked, \('grad_sq',\), got 'fisher'"),
                     ("grad_abs", "needs probe_kind='columns' or estimator='exact'")),
        "reduce": rows(("max", r"reduce: expected one of \('sum', 'mean'\)")),
        "missing": rows(("zero", r"missing: expected one of \('raise', 'skip'\)")),
    },
    "Tracker.mask": {
        "mask": rows((None, "mask: expected a tensor of booleans or integers", TYPE),
                     (torch.ones(2, 3), r"got torch.float32 \(2, 3\)"),
                     (torch.tensor(True), "mask: expected"), (torch.tensor([0, 2]), r"0 and 1 only, got \[2\]")),
    },
    "Tracker.covariances": {"kind": rows(("act_cov",
                                         "kind: expected what is tracked, .*, got 'act_cov'; name it in statistics"))},
    "Tracker.penalty": PENALTY,
    "Tracker.apply_penalty": PENALTY,
    "Tracker.load_state_dict": {
        "state": rows((state_of_other_keys, r"state: expected the keys .*, got \['x'\]"),
                      (state_of_other_probes, "state: expected the probes 4, got 3"),
                      ({}, "state: expected"), (3, "state: expected", TYPE)),
    },
    "adapter_names": {"model": MODEL},
    "use_adapters": {
        "model": rows(*((r.bad, r.match, r.error) for r in MODEL), (already_merged, "is merged into")),
        "ids": rows(
            (torch.tensor([0, 7]), r"ids: expected -1 \(base only\), 0: default, 1: b, got 7 at position 1"),
            (torch.tensor([0.0]), "ids: expected an int64 tensor"),
            (["b", "c"], r"ids: expected one of \['default', 'b'\], got 'c'"),
            (3, "ids: expected an int64 tensor, names", TYPE),
            (torch.zeros(1, 1, 1, dtype=torch.int64), "ids: expected an int64 tensor"),
        ),
        "row_seeds": rows((torch.tensor([1, 2]), "row_seeds: expected one for each of 3 ids"),
                          ([1, 2, 3], "row_seeds: expected", TYPE)),
    },
    "add_adapter": {
        "model": MODEL,
        "name": rows(("b", r"name: expected one that is none of \['default', 'b'\], got 'b'"),
                     ("a.b", "name: expected a non-empty string"),
                     ("", "name: expected a non-empty string"), ("keys", "name: .* nn.ModuleDict does not use itself")),
        "config": rows(({"r": 2}, "config: expected a fastlora.LoraConfig", TYPE),
                       (config(bias="all"), "bias: expected 'none'"),
                       (config(target_modules=["qq"]),
                       "target_modules: expected suffixes of module names of Blocks, got 'qq'")),
    },
    "allocate": {
        "scores": rows(({}, "scores: expected at least one, got none"),
                       ({"a": NAN}, r"scores\['a'\]: expected a finite"),
                       ({"a": -1.0}, r"scores\['a'\]: expected a number >= 0 .*, got -1.0"),
                       ([1.0], "scores: expected a mapping", TYPE)),
        "budget": rows((1, "budget: expected at least the 2 ranks that r_min takes"),
                       (-1, "budget: expected an integer"),
                       (2.5, "budget: expected an integer >= 0, got 2.5", TYPE), ("x", "budget: .*, got 'x'", TYPE)),
        "r_min": rows((17, "r_min: expected at most r_max = 16 for 'a', got 17"),
                      ({"a": 1}, "r_min: expected the keys"),
                      (-1, "r_min: expected an integer >= 0")),
        "r_max": rows((-1, "r_max: expected an integer >= 0"),
                      ({"a": 1, "z": 2}, "r_max: expected the keys of scores")),
        "step": rows((0, "step: expected an integer >= 1"), (0.5, "step: expected an integer >= 1", TYPE)),
        "unit": rows(("bytes", "unit: expected one of")),
        "costs": rows(({"a": 3}, "costs: expected .*, got none for 'b'"), (None, "costs: expected {key: N . K}"),
                      unit="params", budget=100),
        "per": rows(("byte", "per: expected one of")),
        "rule": rows(("greedy", "rule: expected one of")),
        "shares": rows(("equal", "shares: expected one of")),
        "tau": rows((0.0, "tau: expected a finite number > 0"), (NAN, "tau: expected a finite number > 0")),
        "power": rows((-1.0, "power: expected a finite number > 0"), (INF, "power: expected a finite number > 0")),
    },
    "Scores.breakdown": {"self": rows((no_scores, "scores: expected at least one, got none"))},
    "calibrate": {
        "model": MODEL[1:] + rows((already_tracked, "model: is tracked already")),
        **PASSES,
        "progress": rows(("bar", "progress: expected", TYPE)),
        "method": rows(("best", "method: expected one of"), ("fim", "B")),
        "centered": rows((1, "centered: expected True or False", TYPE),
                         (True, "centered: works with method='fim' only")),
        "process_group": GROUP,
        "adapter": rows(("c", "adapter: expected one of"), (["b"], "adapter: expected one of")),
    },
    "Scores.composite": {
        "grad_sq": NUMBERS, "grad_abs": NUMBERS, "act_var": NUMBERS,
        "weights": rows(((1.0, 1.0), "weights: expected 3 numbers"),
                        ((NAN, 1.0, 1.0), r"weights\[0\]: expected a finite"),
                        (3, "weights: expected 3 numbers", TYPE)),
        "normalize": rows(("max", r"normalize: expected one of \('zscore', 'minmax'\)")),
    },
    "disable_adapters": {"model": MODEL},
    "training.ece": {"logits": TENSORS, "labels": LABELS, "bins": BINS, "temperature": TEMPERATURE},
    "explain": {"model": MODEL[:1]},
    "training.fit_temperature": {
        "logits": TENSORS, "labels": LABELS, "max_iter": rows((0, "max_iter: expected an integer >= 1, got 0")),
    },
    "recommend": {
        "model": rows(NOT_A_MODEL, (lambda good: adapted(), "model: 'blocks.0.q' already has an adapter"),
                      (wrapped_by_peft, "model: it is wrapped by PEFT")),
        **PASSES,
        "progress": rows(("bar", "progress: expected", TYPE)),
        "budget": rows((0, "budget: expected an integer >= 1"), (1, "budget: expected at least"),
                       (2.5, "budget: expected", TYPE)),
    },
    "freeze_unused_adapters": {
        "model": MODEL, "optimizer": rows((3, "optimizer: expected a torch.optim.Optimizer, got 3", TYPE)),
    },
    "inject": {
        "model": rows(NOT_A_MODEL, (lambda good: adapted(), "model: 'blocks.0.q' already has an adapter"),
                      (wrapped_by_peft, "model: it is wrapped by PEFT")),
        "config": rows(({"r": 8}, "config: expected a fastlora.LoraConfig", TYPE),
                       (config(r=9), "rank of .*: expected at most .* = 8, got 9"),
                       (config(rank_pattern={"x": 2}),
                       "rank_pattern: expected patterns that match an adapted matrix, got 'x'")),
        "adapter": rows(("", "adapter: expected a non-empty string without dots, got ''"),
                        (None, "adapter: expected", TYPE),
                        ("items", "adapter: expected a name that nn.ModuleDict does not use itself, got 'items'")),
        "accelerate_frozen": rows(("yes", "accelerate_frozen: expected True or False, got 'yes'", TYPE)),
        "check": rows(("ignore", "check: expected")),
    },
    "load": {
        "model": rows(NOT_A_MODEL, (lambda good: Blocks().blocks, "has no module of that name")),
        "path": rows((3, "path: expected the path of a folder, got 3", TYPE))
        + rows(("no such", "no such folder"), error=FileNotFoundError),
        "adapter": rows(("a.b", "adapter: expected a non-empty string without dots"),
                        ({}, "adapter: expected a non-empty string without dots", TYPE)),
        "progress": rows(("bar", "progress: expected True, False, None or a callable", TYPE)),
    },
    "from_peft": {
        "peft_model": rows(("bert", "peft_model: expected a peft.PeftModel, got 'bert'", TYPE),
                           (without_adapters, "peft_model: expected a peft.PeftModel, got Blocks", TYPE)),
        "adapter": rows(("c", r"adapter: expected one of \['default'\], got 'c'")),
    },
    "load_layout": {
        "model": rows(NOT_A_MODEL),
        "state_dict": rows(({}, "state_dict: has no keys"), ([1], "state_dict: expected a mapping", TYPE)),
        "layout": rows(("peft", "layout: expected one of"), ([], "layout: expected one of")),
        "lora_alpha": rows((NAN, "lora_alpha: expected a finite number"), ("1", "lora_alpha: expected a finite", TYPE)),
        "rename": rows(({"x": "y"}, "rename: expected paths in state_dict, got 'x'"),
                       (3, "rename: expected a mapping", TYPE)),
        "enable_lora": rows(("qkv", "enable_lora: expected True or False", TYPE),
                            ([], "enable_lora: expected True or")),
        "adapter": rows((3, "adapter: expected a non-empty string without dots, got 3", TYPE),
                        ("keys", "nn.ModuleDict")),
    },
    "merge": {
        "model": MODEL + rows((already_merged, "is merged already")),
        "adapter": rows(("c", "adapter: expected one of")),
        "requantize": rows((1, "requantize: expected True or False", TYPE)),
        "unload": rows((1, "unload: expected True or False", TYPE)),
        "progress": rows(("bar", "progress: expected True, False, None or a callable", TYPE)),
    },
    "merge_and_unload": {
        "model": MODEL + rows((already_merged, "is merged already")),
        "adapter": rows(("c", "adapter: expected one of")),
    },
    "unload": {"model": MODEL},
    "param_groups": {
        "model": MODEL,
        **{name: rows(*RATE) for name in ("lr_norm", "lr_head", "lr_bias")},
        "lr_lora": rows(*RATE, ({"default": 1.0}, "lr_lora: expected a rate for each of")),
        "weight_decay": rows(*RATE, ({"heads": 1.0}, "weight_decay: expected group names among")),
        "adapter": rows(("c", r"adapter: expected one of \['default', 'b'\], got 'c'")),
        "lr_ratio": rows((0.0, "lr_ratio: expected a finite number > 0, got 0.0"), ("2", "lr_ratio: expected", TYPE)),
    },
    "add_weighted_adapter": {
        "model": MODEL,
        "adapters": rows((["default", "c"], r"adapters: expected one of \['default', 'b'\], got 'c'"),
                         (["b", "b"], "adapters: expected one or more names, each once"),
                         ("b", "adapters: expected a list of names", TYPE)),
        "weights": rows(([1.0], "weights: expected one for each of 2 adapters"),
                        ([1.0, NAN], r"weights\[1\]: expected a finite number"),
                        (1.0, "weights: expected a list of numbers", TYPE)),
        "adapter_name": rows(("b", r"adapter_name: expected one that is none of \['default', 'b'\], got 'b'"),
                             ("a.b", "adapter_name: expected a non-empty string without dots")),
        "combination_type": rows(("sum", "combination_type: expected one of")),
        "svd_rank": rows((0, "svd_rank: expected an integer >= 1"), (1.5, "svd_rank: expected an integer", TYPE)),
        "density": rows((1.5, r"density: expected a share in \(0, 1\]"), (0.0, "density: expected a finite")),
        "majority_sign_method": rows(("most", "majority_sign_method: expected one of")),
    },
    "initialize_eva": {
        "model": MODEL,
        "covariances": rows(({}, "covariances: expected a matrix for every linear of the adapter, got none for"),
                            ({"qq": torch.eye(2)}, "covariances: expected paths of linears of the adapter, got 'qq'"),
                            ([torch.eye(2)], "covariances: expected a mapping", TYPE)),
        "adapter": rows(("c", r"adapter: expected one of \['default'\], got 'c'")),
        "progress": rows(("bar", "progress: expected True, False, None or a callable", TYPE)),
    },
    "initialize_corda": {
        "model": MODEL,
        "covariances": rows(({}, "covariances: expected a matrix for every linear of the adapter, got none for"),
                            ([torch.eye(2)], "covariances: expected a mapping", TYPE)),
        "method": rows(("best", "method: expected one of")),
        "adapter": rows(("c", r"adapter: expected one of \['default'\], got 'c'")),
    },
    "initialize_lora_ga": {
        "model": MODEL,
        **PASSES,
        "passes": rows((0, "passes: expected an integer >= 1")),
        "direction": rows(("ArB", "direction: expected one of")),
        "scale": rows(("big", "scale: expected one of")),
        "stable_gamma": rows((0, "stable_gamma: expected a positive number")),
        "adapter": rows(("c", r"adapter: expected one of \['default'\], got 'c'")),
    },
    "per_adapter_mean": {
        "losses": rows((torch.ones(2), "losses: expected the shape of ids"),
                       ([1.0], "losses: expected a floating tensor", TYPE)),
        "ids": rows((torch.zeros(3), "ids: expected an int64 tensor"),
                    ([0, 1, 2], "ids: expected an int64 tensor, got", TYPE)),
    },
    "apply_policy": {
        "model": rows(NOT_A_MODEL, (lambda good: adapted(), "already has an adapter"),
                      (lambda good: torch.nn.Linear(8, 3), "model: policy 'deep_lora' needs blocks")),
        "name": rows(("deep_lara", "name: expected one of .*did you mean 'deep_lora'")),
        "config": rows(({"r": 2}, "config: expected a fastlora.LoraConfig", TYPE)),
        "deep": rows((0, "deep: expected None for a third, or a number of blocks >= 1"),
                     (3, "deep: expected at most the 2 blocks of the stack of .*, got 3")),
    },
    "LoraConfig.preset": {"difficulty": rows(("hard", "difficulty: expected one of"),
                                  (["simple"], "difficulty: expected one of"))},
    "reallocate": {
        "model": MODEL,
        "scores": rows(({"blocks.0.w": 1.0},
                       "scores: expected keys of the adapter's matrices, got 'blocks.0.w'.*did you mean"),
                       ([1], "scores: expected", TYPE)),
        "budget": rows((1, "budget: expected"), (2.5, "budget: expected an integer", TYPE)),
        "r_min": rows((-1, "r_min: expected an integer >= 0"), ("2", "r_min: expected an integer", TYPE)),
        "r_max": rows((0, "r_max: expected an integer >= 1"), (1, "r_min: expected at most r_max = 1 .*, got 2")),
        "adapter": rows(("c", "adapter: expected one of")),
        "reinit": rows(("yes", "reinit: expected True or False", TYPE), (False, "pass reinit=True")),
        "keep": rows((1, "keep: expected True or False", TYPE), (True, "keep: expected keep or reinit, got both")),
    },
    "training.reliability": {"logits": TENSORS, "labels": LABELS, "bins": BINS, "temperature": TEMPERATURE},
    "delete_adapter": {
        "model": MODEL + rows((awaits_backward, "name: a forward of 'b' awaits its backward")),
        "name": rows(("c", r"name: expected one of \['default', 'b'\], got 'c'"),
                     ("default", "'default' runs by default")),
    },
    "save": {
        "model": MODEL,
        "path": rows((3, "path: expected the path of a folder, got 3", TYPE), (__file__, "path: expected a folder")),
        "adapter": rows(("c", r"adapter: expected one of \['default', 'b'\], got 'c'")),
        "fold_scale": rows(("yes", "fold_scale: expected True or False", TYPE)),
        "importance": rows(({"a": NAN}, "importance: expected finite scores"), ([1], "expected a mapping", TYPE)),
        "save_embedding_layers": rows(("yes", r"save_embedding_layers: expected one of \('auto', True, False\), got")),
    },
    "set_adapter": {"model": MODEL, "name": rows(("c", r"name: expected one of \['default', 'b'\], got 'c'"))},
    "set_ranks": {
        "model": MODEL + rows((awaits_backward, "a forward of 'b' awaits its backward"), adapter="b"),
        "ranks": rows(({"blocks.0.w": 1}, "ranks: expected keys of .*, got 'blocks.0.w'"),
                      ([1], "ranks: expected a mapping", TYPE),
                      ({KEY: 9}, f"rank of {KEY}: expected at most .* = 8, got 9"),
                      ({KEY: 2.0}, f"rank of {KEY}: expected an integer", TYPE)),
        "adapter": rows(("c", "adapter: expected one of")),
        "reinit": rows((1, "reinit: expected True or False", TYPE), (False, "pass reinit=True")),
        "keep": rows((1, "keep: expected True or False", TYPE), (True, "keep: expected keep or reinit, got both")),
    },
    "roles": {"model": rows(NOT_A_MODEL)},
    "summary": {"model": MODEL, "adapter": rows(("c", r"adapter: expected one of \['default', 'b'\], got 'c'"))},
    "track": TRACK,
    "to_peft": {
        "model": MODEL + rows((already_merged, "is merged; call fastlora.unmerge")),
        "adapter": rows(("c", "adapter: expected one of")),
    },
    "unmerge": {"model": MODEL + rows((lambda good: adapted(), "model: nothing is merged"))},
    "training.Cosine": {
        "optimizer": rows((None, "optimizer: expected a torch.optim.Optimizer, got None", TYPE)),
        "steps": rows((0, "steps: expected an integer >= 1"), (2.5, "steps: expected an integer", TYPE)),
        "floor": rows((0.0, "floor: expected a learning rate > 0"),
                      (1.0, "floor: expected at most the learning rate .*, got 1.0")),
        "warmup": rows((10, "warmup: expected less than steps = 10"), (-1, "warmup: expected")),
        "freeze": rows((10, "freeze: expected less than the 10 steps"),
                       ({"x": 2}, "freeze: expected names of .*, got 'x'")),
        "freeze_by": rows(("detach", "freeze_by: expected one of")),
    },
    "nn.Conv1D": LAYER,
    "nn.Linear": LAYER,
    "nn.QKVLinear": LAYER,
    "nn.MultiheadAttention": {**LORA, "r": rows((0, "r: expected an integer >= 1"),
                                                (9, "r: expected at most .* = 8, got 9")),
                              "split_qkv": rows(("yes", "split_qkv: expected one of"))},
}  # fmt: skip
