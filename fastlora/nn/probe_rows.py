"""How P is drawn: Rademacher rows, sampled columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.torch_compat import multiply_each, norm_of_each
from ..ops.multi_tensor import Signs, squared_norms
from ..ops.reference import column_shares, philox, signs

_COLUMN_TAG = 3  # fourth Philox counter word: draws share no bits with signs
_AHEAD = 64  # steps whose random numbers are made at once: a step alone costs as many launches
_DECAY = 0.9  # of the norms, whenever they are measured
# Norms of the columns are measured in the first sampled steps, and then in every eighth: they change slowly, and
# measuring them costs twice what the probes do.
REFRESH_FIRST, REFRESH_EVERY = 8, 8


def refreshes_norms(sample: int) -> bool:
    """Whether the norms of the columns are measured again with a tracker's sample number ``sample`` (from 0)."""
    return sample < REFRESH_FIRST or sample % REFRESH_EVERY == 0


class Copies:
    """What is drawn, where layers read it: itself on its own device, on each other a copy that ``follow`` fills."""

    def __init__(self, drawn: Tensor, cut: Callable[[Tensor], Any] = lambda whole: whole):
        self._drawn, self._cut = drawn, cut
        self._elsewhere: list[Tensor] = []
        self._on = {drawn.device: cut(drawn)}

    def on(self, device: torch.device) -> Any:
        """``cut`` of what is drawn as layers on ``device`` read it, the same tensors after every draw."""
        if device not in self._on:
            self._elsewhere.append(self._drawn.to(device, copy=True))
            self._on[device] = self._cut(self._elsewhere[-1])
        return self._on[device]

    def follow(self) -> None:
        """Take over what was drawn now."""
        for copy in self._elsewhere:
            copy.copy_(self._drawn)


class ColumnSampler:
    r"""k columns of x for every matrix, drawn with replacement from (seed, step, matrix) and the norms seen before.

    .. math:: \sum_i w_i \lVert G_{:, j_i} \rVert^2,\quad \sum_i w_i \lVert G_{:, j_i} \rVert_1,\quad
              w_i = \frac{1}{k\, p_{j_i}},\quad p = 0.9\, q + 0.1 / K

    q follows an average of the squared norms ``sum_m ||dy_m||^2 x_mj^2``. The weights are applied to Q in ``values``,
    so that what a layer multiplies are columns of x as they are. Shares are integers: every rank draws the same.
    A matrix counts from the step after the first that showed its norms: ``known``. ``columns``: ``index`` by layer,
    each of which has the next of ``sizes`` matrices (1 without).
    """

    def __init__(
        self, widths: Sequence[int], probes: int, seed: int, device: torch.device, kinds: Sequence[str],
        sizes: Sequence[int] = (),
    ):  # fmt: skip
        self.seed = torch.tensor(seed, dtype=torch.int64, device=device)
        self.probes, self._kinds = probes, (bool({"grad_sq", "fisher"} & {*kinds}), "grad_abs" in kinds)
        self.index = torch.zeros(len(widths), probes, dtype=torch.int64, device=device)
        self.columns = Copies(self.index, lambda index: index.split([*sizes] or 1))
        self.weight = torch.ones(len(widths), probes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(widths), dtype=torch.int64, device=device)
        self.known = torch.zeros(len(widths), dtype=torch.bool, device=device)
        each = {width: [i for i, other in enumerate(widths) if other == width] for width in dict.fromkeys(widths)}
        self._members = [torch.tensor(members, device=device) for members in each.values()]
        self._places = list(each.values())
        self.norms = [
            torch.zeros(len(members), width, dtype=torch.float64, device=device) for width, members in each.items()
        ]
        self._ahead: tuple[tuple[int, int], Tensor] | None = None
        self._share()

    def _share(self) -> None:
        shares = [(column_shares(norms, *self._kinds) * 2.0**48).long().clamp(min=1) for norms in self.norms]
        self._shares = [(part, part.cumsum(1)) for part in shares]

    def draw(self, step: int) -> None:
        """Fill ``index``, ``weight`` and ``known`` for an optimizer step, in place."""
        chance = self._chances(step)
        for members, (shares, ends) in zip(self._members, self._shares, strict=True):
            total = ends[:, -1:]
            place = (chance[members] * total).long()
            found = torch.searchsorted(ends, place, right=True)
            self.index.index_copy_(0, members, found)
            self.weight.index_copy_(0, members, total / (self.probes * shares.gather(1, found)).double())
        self.known.copy_(self.counts > 0)
        self.columns.follow()

    def _chances(self, step: int) -> Tensor:
        """Uniform numbers of 52 bits in [0, 1): float64 [matrices, k]."""
        key = (step // _AHEAD, int(self.probes))
        if self._ahead is None or self._ahead[0] != key:
            device, pairs = self.index.device, (self.probes + 1) // 2
            steps = torch.arange(key[0] * _AHEAD, (key[0] + 1) * _AHEAD, device=device).view(-1, 1, 1)
            counters = torch.broadcast_tensors(
                torch.arange(pairs, device=device), steps, torch.arange(len(self.index), device=device).view(-1, 1)
            )
            a, b, c, d = philox(self.seed, *counters, torch.full_like(counters[0], _COLUMN_TAG))
            words = torch.stack([(a >> 6 << 26) + (b >> 6), (c >> 6 << 26) + (d >> 6)], dim=-1)
            self._ahead = key, words.flatten(2)[..., : self.probes].double() * 2.0**-52
        return self._ahead[1][step % _AHEAD]

    def restart(self, seed: int) -> None:
        """Draw from another seed, and from norms that were put in place."""
        self.seed.fill_(seed)
        self._ahead = None
        self._share()

    def learn(self, found: Sequence[Tensor | None], keep: Tensor) -> None:
        """Fold norms [K] of every matrix of one step into the averages, where ``keep`` [matrices] says so."""
        for members, places, norms in zip(self._members, self._places, self.norms, strict=True):
            nothing = norms.new_zeros(norms.shape[1])
            rows = [nothing if found[i] is None else found[i].to(norms.device) for i in places]
            fresh = torch.stack(rows).to(norms.dtype)
            total = fresh.sum(1, keepdim=True)
            usable = keep[members].unsqueeze(1) & total.isfinite() & (total > 0)
            norms.copy_(torch.where(usable, _DECAY * norms + (1.0 - _DECAY) * (fresh / total), norms))
        self.counts += keep
        self._share()

    def values(self, grads: Sequence[Tensor | None], kinds: Sequence[str], factor: float | Tensor) -> dict[str, Tensor]:
        """Every statistic of the matrices that have a Q [N, k], float64; ``factor`` multiplies what is squared."""
        live = [i for i, grad in enumerate(grads) if grad is not None]
        Q, device, found = [grads[i] for i in live], self.weight.device, {}
        for kind in kinds:
            # Weights are positive, so that the 1-norm is the weighted sum.
            weight = self.weight if kind == "grad_abs" else self.weight.sqrt()
            made = {key: weight.to(*key).unbind() for key in dict.fromkeys((q.device, q.dtype) for q in Q)}
            weighted = multiply_each(Q, [made[q.device, q.dtype][i] for i, q in zip(live, Q, strict=True)])
            if kind == "grad_abs":
                found[kind] = torch.stack([norm.to(device) for norm in norm_of_each(weighted, 1)]).double()
            else:
                found[kind] = squared_norms(weighted, factor).to(device)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"norms": [norms.clone() for norms in self.norms], "counts": self.counts.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a saved state's norms in place; ``restart`` makes draws of them."""
        for norms, saved in zip(self.norms, state["norms"], strict=True):
            norms.copy_(saved)
        self.counts.copy_(state["counts"])


_ROWS_TAG, _SIGN_TAG = 1, 2  # fourth Philox counter word: probe rows and sample signs never share bits


class RademacherProbes:
    """P of every group of layers: ±1 rows from (seed, step, group), all groups in one pass.

    ``E P^T P = k I``, so ``E ||G P^T||^2 / k = ||G||_F^2``. On a GPU they have the dtype of the factors, with which a
    kernel reads them, where ``dtypes`` is one: ±1 is exact in each.
    """

    def __init__(
        self, widths: Sequence[int], probes: int, seed: int, device: torch.device, dtypes: Collection[torch.dtype] = ()
    ):
        self.seed, self.probes = torch.tensor(seed, dtype=torch.int64, device=device), probes
        counts = [(width * probes + 127) // 128 for width in widths]
        self._signs = Signs(counts, _ROWS_TAG, device)
        self._flat = torch.zeros(sum(counts) * 128, dtype=torch.float32, device=device)
        narrow = {*dtypes} in ({torch.bfloat16}, {torch.float16}) and device.type != "cpu"
        self._read = self._flat.to(*dtypes) if narrow else self._flat
        sizes = [128 * count for count in counts]

        def cut(flat: Tensor) -> list[Tensor]:
            each = zip(flat.split(sizes), widths, strict=True)
            return [part[: width * probes].view(probes, width) for part, width in each]

        self.rows = Copies(self._read, cut)

    def draw(self, step: int) -> None:
        """Fill P for an optimizer step, in place."""
        self._signs.fill_(self._flat, self.seed, step)
        if self._read is not self._flat:
            self._read.copy_(self._flat)
        self.rows.follow()

    def restart(self, seed: int) -> None:
        """Draw from another seed."""
        self.seed.fill_(seed)

    def values(self, grads: Sequence[Tensor | None], kinds: Sequence[str], factor: float | Tensor) -> dict[str, Tensor]:
        """The statistic of the matrices that have a Q [N, k], float64; ``factor`` multiplies it."""
        norms = squared_norms([grad for grad in grads if grad is not None], factor / self.probes)
        return {kind: norms.to(self.seed.device) for kind in kinds}


class SampleSigns:
    """Independent ±1 for each (sample, probe) of every micro-batch, from (seed, step, micro-batch)."""

    def __init__(self, seed: Tensor, probes: int):
        self.seed, self.probes = seed, probes
        self.place = (0, 1)  # this process's rank and the number of ranks, whose micro-batches are numbered through
        self.samples: dict[int, int] = {}  # of each micro-batch of this step, those that are the tracked adapter's
        self.compiled = CompiledSigns(seed, probes)
        self._drawn: tuple[int, int, Copies] | None = None  # micro-batch, samples in it, and their signs

    def take(self, samples: int, own: int | None, step: int, micro: int, device: torch.device) -> Tensor:
        """[S, k] of a forward, the same for every layer, on ``device``; ``own`` samples are the adapter's (None: all).

        Raises ``RuntimeError`` where layers of one forward see different numbers of samples.
        """
        if torch.compiler.is_compiling():
            return self.compiled.take(samples, own).to(device)
        if self._drawn is None or self._drawn[:2] != (micro, samples):
            if micro in self.samples:
                before = self._drawn[1]
                raise RuntimeError(f"fisher: calls of one forward saw {before} and {samples} samples in dimension 0")
            rank, size = self.place
            drawn = sample_signs(self.seed, step, (micro - 1) * size + rank + 1, samples, self.probes)
            self._drawn = micro, samples, Copies(drawn)
            self.samples[micro] = samples if own is None else own
        return self._drawn[2].on(device)

    def count(self) -> int | Tensor:
        """Samples of this step that are the tracked adapter's."""
        seen = sum(self.samples.values())
        return seen + self.compiled.samples if self.compiled.used else seen

    def advance(self, step: int) -> None:
        """Another optimizer step begins, or the same one anew: its samples are forgotten."""
        self._drawn = None
        self.samples.clear()
        self.compiled.advance(step)


def sample_signs(seed: Tensor, step: int, micro: int, samples: int, probes: int) -> Tensor:
    """Independent ±1 for each (sample, probe) of a micro-batch: [S, k]."""
    blocks = (samples * probes + 127) // 128
    out = torch.empty(128 * blocks, dtype=torch.float32, device=seed.device)
    Signs([blocks], _SIGN_TAG, out.device, micro).fill_(out, seed, step)
    return out[: samples * probes].view(samples, probes)


class CompiledSigns:
    """The signs of :func:`sample_signs` inside compiled code: the step and the micro-batch are tensors there."""

    def __init__(self, seed: Tensor, probes: int):
        self.seed, self.probes, self.used = seed, probes, False
        self._step, self._micro, self.samples = (torch.zeros_like(seed) for _ in range(3))
        self._signs: Tensor | None = None

    def forward(self, rank: int, size: int) -> None:
        """One more micro-batch begins; those of all ranks are numbered through."""
        self._signs, self.used = None, True
        self._micro.add_(torch.where(self._micro == 0, rank + 1, size))

    def take(self, samples: int, own: int | None) -> Tensor:
        """[S, k], the same for every layer of a forward."""
        if self._signs is None:
            tag = torch.full_like(self.seed, _SIGN_TAG)
            drawn = signs(self.seed, self._step, self._micro, tag, samples * self.probes)
            self._signs = drawn.view(samples, self.probes)
            self.samples.add_(samples if own is None else own)
        return self._signs

    def advance(self, step: int) -> None:
        """Another optimizer step begins."""
        self._step.fill_(step)
        self._micro.zero_()
        self.samples.zero_()
