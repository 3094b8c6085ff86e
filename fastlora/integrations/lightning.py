"""Lightning: statistics, penalty and freezing as a callback, and checkpoints that hold adapters only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._utils.installed import blame_extra
from ..nn.linear import adapted_layers
from ..tracking.tracker import Tracker
from .adapters_only import AdaptersOnly, adapters_only
from .checkpoints import refuse_newer
from .session import Session, adapted_model, checked_checkpoints

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    blame_extra(error, __name__, "lightning", "lightning", "lightning.pytorch")
    raise


class FastLoraCallback(Callback):
    r"""Statistics, FW-LoRA's penalty and a frozen start for ``lightning.Trainer``, and small checkpoints.

    - ``track``: True, False, or options of :func:`fastlora.track`; the tracker is ``callback.tracker``, and its scores
      stay readable after ``fit``.
    - ``penalty``: λ, or options of ``Tracker.penalty``; its gradient joins the loss's before clipping.
    - ``freeze``: optimizer steps in which the adapter stands still (its gradients are off).
    - ``adapter``: which one is tracked, penalized and frozen; the active one when training begins, unless named.
    - ``checkpoints="adapters"``: inside the Trainer's entry points, state dicts leave out the frozen base, and the
      checkpoints with them; ``"full"`` leaves them alone. The tracker's state is the callback's in either.

    The LightningModule holds one model that ``inject`` was called on. Raises ``TypeError`` or ``ValueError`` naming the
    argument; while training ``ValueError`` where it holds none, and for a checkpoint that does not fit, naming the
    differences.

    >>> from fastlora.integrations.lightning import FastLoraCallback
    >>> callback = FastLoraCallback(track={"warmup": 4}, penalty=1e-4)
    >>> callback.tracker  # none before fit() of lightning.Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        *,
        track: bool | Mapping[str, Any] = True,
        penalty: float | Mapping[str, Any] | None = None,
        freeze: int = 0,
        checkpoints: str = "adapters",
        adapter: str | None = None,
    ):
        self.session = Session(track, penalty, freeze, adapter)
        self.checkpoints = checked_checkpoints(checkpoints)
        self._only: AdaptersOnly | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def tracker(self) -> Tracker | None:
        """The tracker of the last ``fit``; None before the first, and where ``track`` is False."""
        return self.session.tracker

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._close_only()
        if self.checkpoints == "adapters":
            self._only = adapters_only(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        saved, self._saved = self._saved, None
        self.session.begin(adapted_model(pl_module), saved, max(trainer.max_steps, 0))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Strategies that shard restore a checkpoint after they have set the model up, which is after on_fit_start.
        saved, self._saved = self._saved, None
        if saved is not None:
            self.session.resume(saved)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.session.hold(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self._steps_adapters(optimizer):
            return
        self.session.add_penalty()  # gradients are unscaled by now
        self.session.step(getattr(trainer.precision_plugin, "scaler", None))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.session.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.session.close()
        self._close_only()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._close_only()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.session.model is None else self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        refuse_newer(state_dict, "checkpoint")
        self._saved = state_dict

    def _steps_adapters(self, optimizer: Any) -> bool:
        """Whether this optimizer, of perhaps several, has the adapters."""
        layers = adapted_layers(self.session.model).values()
        own = {id(p) for layer in layers for f in (layer.lora_A, layer.lora_B) for p in f.parameters()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _close_only(self) -> None:
        if self._only is not None:
            self._only.close()
            self._only = None
