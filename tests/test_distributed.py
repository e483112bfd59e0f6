"""Two processes, each with half of a batch, train as one with all of it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sparingly as sp

STEPS = 4
# A gradient that is zero but for rounding must not make a whole step, as it would with the usual eps.
RATES: dict[str, Any] = {"lr": 0.01, "eps": 1e-3}


class Network(nn.Module):
    """A bag, selective layers of both kinds, and a layer that only some processes use."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.bag = sp.SelectiveBag(50, 12)
        self.keys = sp.SelectiveFFN(12, 144, selector=sp.ProductKey(heads=2, k=3, key_dim=6))
        self.experts = sp.SelectiveFFN(12, 144, selector=sp.Experts(k=2), block=4)
        self.last = nn.Linear(12, 3)
        self.aside = nn.Linear(3, 3)
        self.idle = nn.Linear(2, 2)

    def forward(self, ids: torch.Tensor, aside: bool) -> torch.Tensor:
        hidden = self.bag(ids)
        hidden = hidden + self.keys(hidden)
        scores = self.last(hidden + self.experts(hidden))
        return self.aside(scores) if aside else scores + 0.0


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    draw = [torch.randint(0, 50, (8, 4), generator=generator) for _ in range(STEPS)]
    return [(ids, ids.sum(dim=1) % 3) for ids in draw]


def loss(model: nn.Module, ids: torch.Tensor, target: torch.Tensor, aside: bool) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids, aside), target)


def work(folder: str) -> None:
    """What each process of the test does, started by torchrun."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        model = Network()
        optimizer = sp.optimizer(model, **RATES)
        sent = []
        gather = dist.all_gather

        def watch(every: Any, mine: torch.Tensor, **options: Any) -> None:
            sent.append(mine.numel())
            gather(every, mine, **options)

        dist.all_gather = watch
        for ids, target in batches():
            optimizer.zero_grad()
            part = slice(rank * 4, rank * 4 + 4)
            loss(model, ids[part], target[part], aside=rank == 1).backward()
            rows = max(sum(one.grad._values().numel() for one in model.parameters() if one.grad is not None
                           and one.grad.is_sparse), 1)  # fmt: skip
            sent.clear()
            sp.average_gradients(model)
            optimizer.step()
        states = {"model": model.state_dict(), "sent": sum(sent), "rows": rows, "idle": model.idle.weight.grad is None}
        torch.save(states, f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


def test_two_processes_train_as_one_with_the_joined_batch(tmp_path: Path):
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    done = subprocess.run([sys.executable, *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    states = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    model = Network()
    before = copy.deepcopy(model.state_dict())
    optimizer = sp.optimizer(model, **RATES)
    for ids, target in batches():
        optimizer.zero_grad()
        for rank in range(2):
            part = slice(rank * 4, rank * 4 + 4)
            (loss(model, ids[part], target[part], aside=rank == 1) / 2).backward()
        bias: Any = model.experts.selector.bias
        bias.grad /= 2  # Its load is that of each batch, whatever the loss is divided by.
        optimizer.step()
    for name, value in model.state_dict().items():
        if name.endswith("used"):
            continue
        assert torch.equal(states[0]["model"][name], states[1]["model"][name]), name
        torch.testing.assert_close(states[0]["model"][name], value, rtol=1e-4, atol=1e-6, msg=name)
        moves = value.is_floating_point() and not name.startswith("idle")
        assert not moves or not torch.equal(value, before[name]), name
    assert all(state["idle"] for state in states)
    # No more than the rows of the process that holds most, and their ids.
    assert all(state["sent"] < 1.2 * max(one["rows"] for one in states) for state in states)


def test_a_missing_group_is_named():
    with pytest.raises(RuntimeError, match=r"no process group: call torch.distributed.init_process_group"):
        sp.average_gradients(nn.Linear(2, 2))


if __name__ == "__main__":
    work(sys.argv[1])
