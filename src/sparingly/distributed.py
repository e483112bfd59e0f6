"""Data-parallel training whose processes exchange the rows that took part, and no others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_NONE, _SPARSE, _DENSE = range(3)


@torch.no_grad()
def average_gradients(model: nn.Module | Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Replace each gradient by its mean over the processes: call it between ``backward()`` and ``step()``.

    Dense gradients travel in one buffer per dtype. Of a row-sparse one each process sends the rows that it holds; the
    mean holds the rows that any of them holds, so that every process makes the same step, and that of one process with
    the joined batch where the parts are equally large. A parameter without a gradient here that has one elsewhere gets
    it; one that is dense in some process is dense in all.

    Args:
        model: the same one in every process, or its parameters in the same order.
        group: the processes; None: all of them. Of any backend that takes the gradients' device; gloo for the CPU.

    Stands in for ``DistributedDataParallel``, which takes sparse gradients of ``torch.nn.Embedding`` only. Raises
    RuntimeError without a process group, ValueError if the processes have different numbers of parameters; gradients
    are as before then.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("there is no process group: call torch.distributed.init_process_group, under torchrun")
    params = list(model.parameters()) if isinstance(model, nn.Module) else list(model)
    params = [param for param in params if param.requires_grad]
    if not params:
        return
    world, device = dist.get_world_size(group), params[0].device
    sizes = torch.tensor([len(params), -len(params)], device=device)
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
    if int(sizes[0]) != -int(sizes[1]):
        raise ValueError(f"processes must have one model, got {-int(sizes[1])} to {int(sizes[0])} parameters")
    kinds = torch.tensor([_kind(param) for param in params], device=device)
    dist.all_reduce(kinds, dist.ReduceOp.MAX, group=group)
    dense: dict[torch.dtype, list[nn.Parameter]] = {}
    sparse: list[nn.Parameter] = []
    for param, kind in zip(params, kinds.tolist(), strict=True):
        if kind == _DENSE:
            dense.setdefault(param.dtype, []).append(param)
        elif kind == _SPARSE:
            sparse.append(param)
    for some in dense.values():
        _average_dense(some, world, group)
    if sparse:
        _average_rows(sparse, world, group)


def _kind(param: nn.Parameter) -> int:
    if param.grad is None:
        return _NONE
    return _SPARSE if param.grad.is_sparse else _DENSE


def _average_dense(params: list[nn.Parameter], world: int, group: dist.ProcessGroup | None) -> None:
    grads = [torch.zeros_like(param) if param.grad is None else param.grad.to_dense() for param in params]
    buffer = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(buffer, group=group)
    parts = buffer.div_(world).split([grad.numel() for grad in grads])
    for param, part in zip(params, parts, strict=True):
        param.grad = part.view(param.shape)


def _average_rows(params: list[nn.Parameter], world: int, group: dist.ProcessGroup | None) -> None:
    grads = [_rows(param) for param in params]
    counts = torch.tensor([ids.shape[0] for ids, _ in grads], device=params[0].device)
    every = [torch.empty_like(counts) for _ in range(world)]
    dist.all_gather(every, counts, group=group)
    for number, (param, (ids, values)) in enumerate(zip(params, grads, strict=True)):
        held = [int(some[number]) for some in every]
        # In the order of the processes: every one of them then sums in the same order.
        found = _gathered(ids, held, group), _gathered(values / world, held, group)
        joined = torch.sparse_coo_tensor(found[0].unsqueeze(0), found[1], param.shape, check_invariants=False)
        param.grad = joined.coalesce()


def _rows(param: nn.Parameter) -> tuple[Tensor, Tensor]:
    """ids [n] and values [n, ...] of a parameter's row-sparse gradient; n = 0 without one."""
    if param.grad is None:
        return torch.empty(0, dtype=torch.int64, device=param.device), param.new_empty((0, *param.shape[1:]))
    return param.grad._indices()[0].contiguous(), param.grad._values()


def _gathered(mine: Tensor, held: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """What all processes hold, one after the other; they send as many rows as the one that holds most."""
    most = max(held)
    padded = mine.new_zeros((most, *mine.shape[1:]))
    padded[: mine.shape[0]] = mine
    every = [torch.empty_like(padded) for _ in held]
    dist.all_gather(every, padded, group=group)
    return torch.cat([some[:count] for some, count in zip(every, held, strict=True)])
