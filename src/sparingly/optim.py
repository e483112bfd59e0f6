"""One optimiser for a whole model: AdamW, for banks only on the rows that took part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    max_norm: float | None = None,
) -> RowAdamW:
    """One :class:`RowAdamW` for all parameters of ``model`` that require a gradient.

    ``model``: a module, or parameters or parameter groups as any ``torch.optim.Optimizer`` takes them.
    """
    params = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else model
    return RowAdamW(params, lr, betas, eps, weight_decay, max_norm)


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
        max_norm: gradients count as scaled down to this norm where that of all of them together is larger; None: never.
            ``torch.nn.utils.clip_grad_norm_`` does not take sparse gradients.

    Every gradient is checked before anything is written: a step that raises has changed nothing.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_norm: float | None = None,
    ):
        for name, value, fits in (
            ("lr", lr, lr >= 0),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("max_norm", max_norm, max_norm is None or max_norm > 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
        ):
            if not fits:
                allowed = {"betas": "in 0..1, 1 left out", "max_norm": "> 0, or None"}.get(name, ">= 0")
                raise ValueError(f"{name} must be {allowed}, got {value}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_norm = max_norm

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
        if self.max_norm is not None:
            work = _clipped(work, self.max_norm)
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
            fused=False,
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


Work = list[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]


def _clipped(work: Work, max_norm: float) -> Work:
    """The same with gradients scaled to a norm of at most ``max_norm`` together; those of the parameters stay."""
    values = [grad._values() if grad.is_sparse else grad for _, pairs in work for _, grad in pairs]
    if not values:
        return work
    norms = [torch.linalg.vector_norm(value, dtype=torch.float32) for value in values]
    factor = max_norm / max(float(torch.stack([norm.to(norms[0].device) for norm in norms]).norm()), max_norm)
    return work if factor == 1.0 else [(group, [(p, _scaled(g, factor)) for p, g in pairs]) for group, pairs in work]


def _scaled(grad: Tensor, factor: float) -> Tensor:
    if not grad.is_sparse:
        return grad * factor
    values = grad._values() * factor
    return torch.sparse_coo_tensor(grad._indices(), values, grad.shape, is_coalesced=True, check_invariants=False)


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
