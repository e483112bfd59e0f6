"""One optimiser for a whole model: AdamW, for banks only on the rows that took part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sparingly.ops.row_adamw import check_values, rises, update_checked

ADVICE = "Lower the learning rate, or clip the gradient"


def optimizer(
    model: nn.Module | Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> RowAdamW:
    """One :class:`RowAdamW` for all parameters of ``model`` that require a gradient.

    ``model``: a module, or parameters or parameter groups as any ``torch.optim.Optimizer`` takes them.
    """
    params = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else model
    return RowAdamW(params, lr, betas, eps, weight_decay)


class RowAdamW(torch.optim.Optimizer):
    """AdamW whose row-sparse gradients update only the rows that they hold.

    A parameter with dense gradients is updated as by ``torch.optim.AdamW``. One with sparse gradients (those of
    ``SelectiveHead`` and ``SelectiveBag``) has moments and a number of steps for each row, and a row that takes no
    part is neither read nor decayed (see :func:`sparingly.ops.row_adamw_`). Both kinds may come for one parameter in
    turn. The state of a bank is reserved at its first sparse gradient and takes memory only as rows take part
    (on Linux): 8 bytes an element.

    Args:
        params: parameters, or groups of them with their own options.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.

    Every gradient is checked before anything is written: a step that raises has changed nothing. The first optimiser
    of a process gives sparse tensors the norm that ``torch.nn.utils.clip_grad_norm_`` needs and PyTorch lacks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        for name, value, fits in (
            ("lr", lr, lr >= 0),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
        ):
            if not fits:
                raise ValueError(f"{name} must be {'in 0..1, 1 left out' if name == 'betas' else '>= 0'}, got {value}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        _give_sparse_gradients_a_norm()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; returns what ``closure`` does, if given.

        Raises ValueError if a gradient is not finite; parameters and state are then as before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All gradients are checked before the first write.
        work = [
            (group, [(p, _checked(p)) for p in group["params"] if p.grad is not None]) for group in self.param_groups
        ]
        for group, pairs in work:
            dense = []
            for param, grad in pairs:
                if grad.is_sparse or "steps" in self.state.get(param, ()):
                    self._step_rows(group, param, grad)
                else:
                    dense.append((param, grad))
            if dense:
                self._step_dense(group, dense)
        return loss

    def _step_rows(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        state = self.state[param]
        if "steps" not in state:
            _give_rows_their_own_steps(state, param)
        num_rows = param.shape[0]
        if grad.is_sparse:
            ids, values = grad._indices()[0], grad._values()
        else:
            ids, values = torch.arange(num_rows, device=param.device), grad
        beta1, beta2 = group["betas"]
        update_checked(
            param.detach().view(num_rows, -1),
            state["exp_avg"].view(num_rows, -1),
            state["exp_avg_sq"].view(num_rows, -1),
            state["steps"],
            ids,
            values.reshape(ids.shape[0], -1),
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _step_dense(self, group: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        states = [self.state[param] for param, _ in pairs]
        for state, (param, _) in zip(states, pairs, strict=True):
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        adamw(
            [param for param, _ in pairs],
            [grad for _, grad in pairs],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            # One pass over each parameter instead of a dozen: a quarter of the time for the small ones of a network.
            fused=all(one.is_cpu for pair in pairs for one in pair),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's, but counts stay integers and the moments of bfloat16 rows float32."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for key, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[param][name] = value.to(param.device)


def _checked(param: Tensor) -> Tensor:
    """The parameter's gradient, coalesced if sparse. Raises ValueError or IndexError if it must not be applied."""
    grad = param.grad
    assert grad is not None
    if not grad.is_sparse:
        if not torch.isfinite(grad.sum()) and not torch.isfinite(grad).all():
            raise ValueError(f"a gradient {list(grad.shape)} holds infinity or NaN; nothing was changed. {ADVICE}")
        return grad
    if grad._indices().shape[0] != 1:
        raise ValueError(
            f"a sparse gradient must be sparse in its rows only, got indices {list(grad._indices().shape)}"
        )
    # The autograd engine drops the mark that a gradient is coalesced; sorting again would cost as much as the update.
    if not rises(grad._indices()[0]):
        grad = grad.coalesce()
    values = grad._values()
    check_values(grad._indices()[0], values.reshape(values.shape[0], -1), param.shape[0])
    return grad


@cache
def _give_sparse_gradients_a_norm() -> None:
    """Fill a gap of PyTorch's, by which ``torch.nn.utils.clip_grad_norm_`` and ``Trainer`` refuse sparse gradients."""
    for device in ("SparseCPU", "SparseCUDA"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::linalg_vector_norm", device):
            _GAPS.impl("linalg_vector_norm", _sparse_norm, device)


_GAPS = torch.library.Library("aten", "IMPL")


def _sparse_norm(
    grad: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    if dim is not None or keepdim:
        raise NotImplementedError("the norm of a sparse tensor is that of all its values: dim must be None")
    whole = grad if rises(grad._indices()[0]) else grad.coalesce()
    return torch.linalg.vector_norm(whole._values(), order, dtype=dtype)


def _give_rows_their_own_steps(state: dict[str, Any], param: Tensor) -> None:
    """Moments and steps of every row; those of earlier dense steps, if there were any, are kept."""
    before = state.pop("step", None)
    state["steps"] = _zeros(param.shape[:1], torch.int32, param.device)
    if before is not None:
        state["steps"].fill_(int(before))
    for name in ("exp_avg", "exp_avg_sq"):
        if name in state:
            state[name] = state[name].to(torch.promote_types(param.dtype, torch.float32)).contiguous()
        else:
            dtype = torch.promote_types(param.dtype, torch.float32)
            state[name] = _zeros(param.shape, dtype, param.device)


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU of pages that exist only once they are written to (PyTorch's own are all written at once)."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(tuple(shape), dtype=str(dtype).removeprefix("torch.")))
