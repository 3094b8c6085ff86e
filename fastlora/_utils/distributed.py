"""Models that data-parallel training wraps or shards: what is underneath, who takes part, whole tensors from shards."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .errors import check_model, wrong_type, wrong_value
from .torch_compat import PrivateName, inside_compiled

_FIRST = "call fastlora.{} before DistributedDataParallel, fully_shard and Accelerator.prepare"


@dataclass(frozen=True)
class ProcessGroupInfo:
    """The processes that train one model on different data, and what they divide the sum of their gradients by."""

    groups: tuple[Any, ...]  # one process group a mesh dimension: one but for replicated shards
    divisor: float

    @property
    def size(self) -> int:
        return math.prod(map(torch.distributed.get_world_size, self.groups))

    @property
    def rank(self) -> int:
        rank = 0
        for group in self.groups:
            rank = rank * torch.distributed.get_world_size(group) + torch.distributed.get_rank(group)
        return rank

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the ranks."""
        for group in self.groups:
            torch.distributed.all_reduce(tensor, group=group)
        return tensor

    def min(self, values: Tensor) -> Tensor:
        """The smallest entries among the ranks, of a copy."""
        values = values.clone()
        for group in self.groups:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MIN, group=group)
        return values

    def in_step(self, items: Iterator[Any]) -> Iterator[Any]:
        """Items until one of the ranks has no more: the others would wait for it."""
        nothing = object()
        device = torch.device("cuda") if torch.distributed.get_backend(self.groups[0]) == "nccl" else None
        while True:
            item = next(items, nothing)
            if not int(self.min(torch.tensor(int(item is not nothing), device=device))):
                return
            yield item

    def from_first(self, value: Any) -> Any:
        """What the first rank has, everywhere."""
        box = [value]
        for group in self.groups:
            torch.distributed.broadcast_object_list(box, group=group, group_src=0)
        return box[0]


def _available() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The wrappers of ``torch.compile``, DDP, DataParallel and ``AveragedModel`` around a model, and the model last."""
    while True:
        yield model
        inner = inside_compiled(model)
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)):
            inner = model.module
        if inner is None:
            return
        model = inner


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under ``torch.compile`` and DDP, whose wrappers lengthen every name."""
    return list(wrappers(check_model(model)))[-1]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: a shard of a whole that other processes hold the rest of."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, which every process of its mesh must ask for; others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """A tensor that all processes have, sharded as ``target`` is; nothing is sent."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def shards(model: nn.Module) -> list[nn.Module]:
    """The modules that ``fully_shard`` was called on, the outermost first."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Have parameters be the shards again: a forward without backward leaves the outermost ones whole for a while."""
    for module in shards(model):
        module.reshard()


def once(ranks: ProcessGroupInfo | None, together: bool, action: Callable[[], None]) -> None:
    """Run on the first rank only; ``together``: all ranks are here, wait for it, and raise what it raises."""
    error = None
    if ranks is None or ranks.rank == 0:
        try:
            action()
        except Exception as raised:
            error = raised
    if ranks is not None and together:
        error = ranks.from_first(error)
    if error is not None:
        raise error


def refuse_parallel(model: nn.Module, function: str) -> None:
    """``ValueError`` for a model whose parameters are in the hands of data- or tensor-parallel training."""
    if not isinstance(model, nn.Module):
        return
    wrapped = next((m for m in wrappers(model) if isinstance(m, nn.parallel.DistributedDataParallel)), None)
    if wrapped is not None:
        first = _FIRST.format(function)
        raise ValueError(f"model: is wrapped by DistributedDataParallel, which would not see new parameters; {first}")
    _refuse_tensor_parallel(model)
    if shards(model):
        raise ValueError(f"model: is sharded by fully_shard, which knows its parameters; {_FIRST.format(function)}")


def refuse_partitioned(model: nn.Module) -> None:
    """``ValueError`` that names a parameter of which FSDP1 or ZeRO-3 has left a part here, and what to do."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"model: {name or 'it'!r} is wrapped by FullyShardedDataParallel (FSDP1), which flattens parameters; "
                "use torch.distributed.fsdp.fully_shard, after fastlora.inject"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") and not parameter.numel():
            raise ValueError(
                f"model: {name!r} is partitioned by DeepSpeed's ZeRO-3, which gathers it in its engine's forward; "
                "elsewhere use deepspeed.zero.GatheredParameters(list(model.parameters()))"
            )
        if getattr(parameter, "_fsdp_flattened", False) and "lora_A." in name and parameter.dim() != 2:
            raise ValueError(
                f"model: {name!r} is held in parts by FullyShardedDataParallel (FSDP1); wrap the blocks that hold "
                "adapted layers, not each of them, or use torch.distributed.fsdp.fully_shard"
            )


def _refuse_tensor_parallel(model: nn.Module) -> None:
    """As ``refuse_partitioned``, and tensor parallelism."""
    refuse_partitioned(model)
    planned = next((m for m in model.modules() if (getattr(m, "_tp_size", None) or 1) > 1), None)
    if planned is not None:
        raise ValueError(
            f"model: {type(planned).__name__} is split by a tensor-parallel plan (tp_plan) over {planned._tp_size} "
            "processes; tensor parallelism is not implemented: load it without tp_plan, and use fully_shard or DDP"
        )
    owned = {id(p) for module in shards(model) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if is_sharded(parameter) and not (id(parameter) in owned and _data_parallel(parameter)):
            raise ValueError(
                f"model: {name!r} is a DTensor with placements {tuple(parameter.placements)}, not one of fully_shard "
                "alone; tensor parallelism is not implemented: use fully_shard or DDP"
            )


def _data_parallel(parameter: Any) -> bool:
    """Whether a DTensor is sharded as ``fully_shard`` does: over its mesh's last dimension, replicated over others."""
    *others, last = parameter.placements
    return last.is_shard() and all(placement.is_replicate() for placement in others)


def _parameter_groups(model: nn.Module) -> list[Any]:
    """What ``fully_shard`` keeps of its parameters, which torch has no public way to ask for; nothing if it is gone."""
    asked = [getattr(module, "_get_fsdp_state", lambda: None)() for module in shards(model)]
    found = [getattr(s, "_fsdp_param_groups", None) or [getattr(s, "_fsdp_param_group", None)] for s in asked]
    return [group for groups in found for group in groups if group is not None]


def _mesh_of_shards(model: nn.Module) -> tuple[Any, float | None] | None:
    """The mesh over which a model is sharded, and what its gradients are divided by if that was set."""
    if not shards(model):
        return None
    groups = _parameter_groups(model)
    if groups and hasattr(groups[0], "mesh_info"):
        return groups[0].mesh_info.mesh, getattr(groups[0], "gradient_divide_factor", None)
    sharded = next((p for p in model.parameters() if is_sharded(p)), None)
    if sharded is None:
        raise RuntimeError(
            "this torch does not tell the mesh of fully_shard, and no parameter is a shard now: track the model before "
            "its first forward, or pass process_group"
        )
    return sharded.device_mesh, None


def running_ddp(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    """The DDP wrapper of a model that was given without it: the one that runs, if torch tells."""
    if not _available():
        return None
    ask = getattr(nn.parallel.DistributedDataParallel, "_get_active_ddp_module", None)
    if ask is not None:
        wrappers = [ask()]
    else:
        wrappers = [o for o in gc.get_objects() if issubclass(type(o), nn.parallel.DistributedDataParallel)]
    return next((w for w in wrappers if w is not None and any(m is model for m in w.modules())), None)


def private_names() -> list[PrivateName]:
    """The private names of DDP and ``fully_shard`` that are used here."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    ddp = nn.parallel.DistributedDataParallel
    mesh = "the mesh is that of a parameter, whose gradients count as averages"
    return [
        PrivateName("DDP._get_active_ddp_module", hasattr(ddp, "_get_active_ddp_module"), "the wrappers are searched"),
        PrivateName("FSDPModule._get_fsdp_state", hasattr(FSDPModule, "_get_fsdp_state"), mesh),
    ]


def _check_group(process_group: Any) -> None:
    known = process_group is None or (isinstance(process_group, str) and process_group == "auto")
    is_group = torch.distributed.is_available() and isinstance(process_group, torch.distributed.ProcessGroup)
    if not known and not is_group:
        wrong = wrong_value if isinstance(process_group, str) else wrong_type
        raise wrong("process_group", "'auto', None or a process group", process_group)


def ranks_of(model: nn.Module, process_group: Any = "auto") -> ProcessGroupInfo | None:
    """Who trains this model together, or None for nobody but this process.

    ``"auto"``: the group of the DDP wrapper that is given or runs right now, or the mesh of ``fully_shard``; a process
    group says it. Raises ``ValueError`` for parallel training that is not implemented.
    """
    _check_group(process_group)
    refuse_partitioned(unwrapped(model))
    if process_group is None or not _available():
        return None
    if not isinstance(process_group, str):
        return _counted((process_group,), None)
    found = [m for m in wrappers(model) if isinstance(m, nn.parallel.DistributedDataParallel)]
    model = unwrapped(model)
    _refuse_tensor_parallel(model)
    wrapper = found[0] if found else running_ddp(model)
    if wrapper is not None:
        return _counted((wrapper.process_group,), None)
    mesh, divisor = _mesh_of_shards(model) or (None, None)
    return None if mesh is None else _counted(tuple(mesh.get_group(i) for i in range(mesh.ndim)), divisor)


def _counted(groups: tuple[Any, ...], divisor: float | None) -> ProcessGroupInfo | None:
    ranks = ProcessGroupInfo(groups, 1.0)
    return None if ranks.size == 1 else ProcessGroupInfo(groups, float(divisor or ranks.size))


def several_processes() -> bool:
    """Whether ``torch.distributed`` runs more processes than this one."""
    return _available() and torch.distributed.get_world_size() > 1
