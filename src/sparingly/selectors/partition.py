"""Balanced groups of classes and a router, trained with the layer, that says which groups a token needs.

Classes are put into groups of limited size, each class into several of them; a token is scored against the groups and
then against the classes of the few best. The router learns from the targets, and from time to time the classes move to
the groups that the router expects their inputs in, under the limit (BLISS); classes that are often confused so come to
share groups. A group's rows are read once for all tokens of a batch that chose it.

Several homes for a class pay more than more probes. On 288,992 trained classes of a spelling task, 4,500 rows in the
groups probed held the exact top-1 of 87 % of unseen misspellings with 1,024 groups and one home each, of 94 % with two
homes, and of 98 % with 4,096 groups and four (fitted to the rows only, before any training of the router).

References: Gupta et al., "BLISS: A Billion scale Index using Iterative Re-partitioning", KDD 2022, sections 3-4 (there
several partitions and count sketches of networks; here one partition with copies and one linear router). Dahiya et al.,
"NGAME: Negative Mining-aware Mini-batching for Extreme Classification", WSDM 2023, section 3 (negatives from the
target's own cluster).

    @inproceedings{gupta2022bliss, title={BLISS: A Billion Scale Index Using Iterative Re-Partitioning},
      author={Gupta, Gaurav and Medini, Tharun and Shrivastava, Anshumali and Smola, Alexander J},
      booktitle={KDD}, year={2022}}
    @inproceedings{dahiya2023ngame, title={NGAME: Negative Mining-Aware Mini-Batching for Extreme Classification},
      author={Dahiya, Kunal and Gupta, Nilesh and Saini, Deepak and others}, booktitle={WSDM}, year={2023}}
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparingly.ops import topk_rows
from sparingly.ops._arrays import check_matrix, check_rows
from sparingly.selection import Selection
from sparingly.selectors._assign import assign
from sparingly.selectors._blocks import expand, topk_blocks
from sparingly.selectors._router import SHARPNESS, Router, best_groups, cluster, unit
from sparingly.selectors.base import Selector, check_bank

CLASSES_PER_GROUP = 64
"""Aimed at before copies, where the number of groups is not given."""
SLACK = 1.05
"""Places in all groups, over what the copies of all classes need."""
WISHES = 32
"""Groups that a class names when classes are assigned."""
BEAM = 12
"""Families that are followed at least; more of them with more probes."""
MIN_SEEN = 4
"""Targets that a class must have been before its mean input decides where it sits."""
ROUTE_EVERY = 4
"""The router learns in every fourth step: its dense gradient and update cost as much as some 100 tokens."""
ROUTE_SCORES = 1 << 19
"""Token-group scores per routing step."""
BLOCK_SHARE = 0.5
"""Groups are computed as blocks from so many tokens per group on. Measured: at 0.25 each token reading its own rows
took 0.8 times as long, at 1.0 longer."""
BLOCK_KEPT = 1 << 24
"""Scores that blocks keep at once, k for each token and probe; larger batches are split (192 MB)."""


class _Tables(NamedTuple):
    """Who sits where, as the kernels read it: rebuilt from ``homes`` whenever that changes."""

    members: Tensor  # int32 [groups, capacity], -1 pads last
    others: Tensor  # int32 [groups, capacity, copies - 1], the member's other groups
    lengths: Tensor  # int64 [groups]


def tables(homes: Tensor, groups: int) -> _Tables:
    """homes int32 [num_classes, copies] -> members in rising order by group, with their other groups."""
    copies = homes.shape[1]
    flat = homes.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    lengths = torch.bincount(flat, minlength=groups)
    place = torch.arange(order.shape[0]) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    members = torch.full((groups, int(lengths.max())), -1, dtype=torch.int32)
    members[flat[order], place] = (order // copies).int()
    others = torch.full((*members.shape, max(copies - 1, 0)), -1, dtype=torch.int32)
    for shift in range(1, copies):
        others[flat[order], place, shift - 1] = homes[order // copies, (order + shift) % copies]
    return _Tables(members, others, lengths)


class Partition(Selector):
    """Groups of at most ``capacity`` classes, of which the router picks ``probes``.

    Args:
        groups: how many; None: the power of two nearest to num_units / 64.
        probes: groups per token, the initial ``setting``.
        copies: in how many different groups each class sits.
        repartition_every: classes move to where the router expects them after so many calls of
            :meth:`routing_loss`; 0: never.
        seed: of the clustering.

    A bias [num_units] of the bank counts in the scores but not in the fit; the router learns it in training.
    Parameters ``vectors`` [groups, d], ``families`` [families, d] and their biases are empty until :meth:`fit` but stay
    the same objects, so that an optimiser may be made before. On other devices than the CPU the selection itself runs
    on the CPU.
    """

    vectors: nn.Parameter
    families: nn.Parameter
    group_bias: nn.Parameter
    family_bias: nn.Parameter
    homes: Tensor
    routed: Tensor
    _means: Tensor
    _seen: Tensor

    def __init__(
        self,
        groups: int | None = None,
        probes: int = 16,
        copies: int = 4,
        *,
        repartition_every: int = 1000,
        seed: int = 0,
    ):
        super().__init__()
        least_values = {"groups": (groups, 1), "probes": (probes, 1), "copies": (copies, 1)}
        for name, (value, least) in {**least_values, "repartition_every": (repartition_every, 0)}.items():
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.groups, self.copies, self.repartition_every, self.seed = groups, copies, repartition_every, seed
        self.probes = self.setting = probes
        for name, shape in (("vectors", (0, 0)), ("families", (0, 0)), ("group_bias", (0,)), ("family_bias", (0,))):
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.register_buffer("homes", torch.empty(0, copies, dtype=torch.int32))
        self.register_buffer("routed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_means", torch.empty(0, 0), persistent=False)
        self.register_buffer("_seen", torch.empty(0, dtype=torch.int64), persistent=False)
        self._tables: tuple[Any, _Tables] | None = None

    # -- fitting

    @torch.no_grad()
    def fit(self, bank: Tensor, bias: Tensor | None = None, hidden: Tensor | None = None) -> None:
        """Group the classes of a bank [num_units, d].

        The first time, or for a bank of another shape, groups and router come from clustering the rows. Later, a
        router that has learned is kept, and every class moves to the groups where the router expects it: by the mean
        of its inputs where at least four were seen, else by its row. :meth:`reset` forgets the router.

        Raises ValueError or TypeError for a bad bank, or one with fewer classes than ``copies``; the old fit stays.
        """
        check_bank(bank, bias)
        groups = self._groups_for(bank.shape[0])
        if self.copies > groups:
            raise ValueError(f"copies must be at most groups ({groups}), got {self.copies}")
        rows = unit(bank.detach().cpu())
        keeps = self.routed > 0 and self.vectors.shape == (groups, rows.shape[1]) and self.num_units == rows.shape[0]
        if keeps:
            known = self._known()
            rows[known] = unit(self._means[known].cpu())
            router = self._router()
        else:
            vectors, families = cluster(rows, groups, torch.Generator().manual_seed(self.seed))
            zeros = torch.zeros(groups + families.shape[0])
            router = Router(families * SHARPNESS, zeros[groups:], vectors * SHARPNESS, zeros[:groups])
        homes = assign(
            _scorer(rows, router),
            torch.full((rows.shape[0], self.copies), -1),
            groups,
            self.capacity_for(rows.shape[0]),
        )
        if not keeps:
            for name, value in router._asdict().items():
                parameter = getattr(self, name)
                parameter.data = value.to(parameter)
            self.routed.zero_()
            self._means, self._seen = self._means.new_empty(0, 0), self._seen.new_empty(0)
        self.homes = homes.int().to(self.homes.device)
        self.num_units = rows.shape[0]

    def reset(self) -> None:
        """Forget what the router learned: the next :meth:`fit` starts from the rows."""
        self.routed.zero_()

    def _groups_for(self, num_units: int) -> int:
        if self.groups is not None:
            return self.groups
        return max(self.copies, 1 << max(0, round(math.log2(num_units / CLASSES_PER_GROUP))))

    def capacity_for(self, num_units: int) -> int:
        """The most classes that any group ever holds."""
        groups = self._groups_for(num_units)
        return min(num_units, math.ceil(SLACK * self.copies * num_units / groups))

    def _router(self) -> Router:
        return Router(*(getattr(self, name).detach().float().cpu() for name in Router._fields))

    def _table(self) -> _Tables:
        key = (self.homes.data_ptr(), self.homes._version, self.homes.shape)
        if self._tables is None or self._tables[0] != key:
            self._tables = (key, tables(self.homes.cpu(), self.vectors.shape[0]))
        return self._tables[1]

    # -- answering

    @torch.no_grad()
    def route(self, hidden: Tensor, probes: int | None = None) -> Tensor:
        """The best groups of each token: hidden [tokens, d] -> int64 [tokens, min(probes, groups)], best first."""
        self.check_fitted()
        check_matrix("hidden", hidden, self.vectors.shape[1])
        router = self._router()
        groups, families = router.vectors.shape[0], router.families.shape[0]
        count = min(self.setting if probes is None else probes, groups)
        if count < 1:
            raise ValueError(f"setting must be at least 1, got {count}")
        beam = max(BEAM, count, -(-count * families // groups))
        return best_groups(hidden.detach().float().cpu(), router, beam, count)[1]

    @torch.no_grad()
    def select(self, hidden: Tensor) -> Selection:
        """hidden [tokens, d] -> ids [tokens, probes * capacity], each class once per token, pads (-1) last."""
        probed = self.route(hidden)
        return Selection(self._expand(probed).to(hidden.device), self.num_units)

    def _expand(self, probed: Tensor) -> Tensor:
        table = self._table()
        return expand(probed, table.members, table.others, table.lengths)

    @torch.no_grad()
    def topk(
        self, hidden: Tensor, bank: Tensor, bias: Tensor | None, k: int, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Selector.topk`. Few tokens read each their own rows; many read each group that any of them chose
        once."""
        probed = self.route(hidden)
        if bank.shape[0] != self.num_units:
            raise ValueError(f"bank must have {self.num_units} rows, as when fitted, got {bank.shape[0]}")
        blocks = bank.is_cpu and bank.dtype != torch.float64 and bank.is_contiguous()
        check_rows(bank, scale, bias)
        if not blocks or probed.numel() < BLOCK_SHARE * self.vectors.shape[0]:
            return topk_rows(hidden, bank, self._expand(probed).to(hidden.device), k, scale, bias)
        table = self._table()
        step = max(1, BLOCK_KEPT // (k * probed.shape[1]))
        parts = [
            topk_blocks(some, bank, scale, bias, table.members, table.lengths, groups, k)
            for some, groups in zip(hidden.split(step), probed.split(step), strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([scores for scores, _ in parts]), torch.cat([classes for _, classes in parts])

    # -- learning

    @torch.no_grad()
    def negatives(self, hidden: Tensor, target: Tensor, count: int) -> Tensor | None:
        """Random classes of groups that random targets of the batch sit in; see :meth:`Selector.negatives`."""
        right = target[target >= 0].cpu()
        if not self.fitted or not right.numel() or count < 1:
            return None
        picked = right[torch.randint(right.shape[0], (count,))]
        group = self.homes.cpu()[picked, torch.randint(self.copies, (count,))].long()
        table = self._table()
        place = (torch.rand(count, dtype=torch.float64) * table.lengths[group]).long()
        return table.members[group, place].long().to(target.device)

    def routing_loss(self, hidden: Tensor, target: Tensor) -> Tensor | None:
        """-log of the router's probability of the groups that hold the target, mean over targets; on a part of the
        tokens in every fourth call, else None. Keeps the classes' mean inputs, and re-partitions when due.

        See :meth:`Selector.routing_loss`.
        """
        if not self.fitted or not hidden.shape[0]:
            return None
        inputs = unit(hidden.detach())
        with torch.no_grad():
            self._observe(inputs, target)
        self.routed += 1
        step = int(self.routed)
        if self.repartition_every and step % self.repartition_every == 0:
            self._repartition()
        if step % ROUTE_EVERY:
            return None
        tokens = min(hidden.shape[0], max(16, ROUTE_SCORES // self.vectors.shape[0]))
        stride = hidden.shape[0] // tokens
        return self._loss(inputs[step % stride :: stride][:tokens], target[step % stride :: stride][:tokens])

    def _loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        scores = nn.functional.linear(inputs, self.vectors.float(), self.group_bias.float())
        logs = scores.log_softmax(dim=1)
        token, place = (target >= 0).nonzero(as_tuple=True)
        right = self.homes[target[token, place]].long()
        loss = -logs[token[:, None], right].logsumexp(dim=1).mean()
        # Families learn where the groups' probability lies, which is what following them is to find.
        share = logs.detach().exp().reshape(inputs.shape[0], self.families.shape[0], -1).sum(dim=2)
        family = nn.functional.linear(inputs, self.families.float(), self.family_bias.float())
        return loss - (share * family.log_softmax(dim=1)).sum(dim=1).mean()

    def _observe(self, inputs: Tensor, target: Tensor) -> None:
        """Move the mean inputs of the targets' classes. O(targets); memory is touched for classes seen only."""
        if self._seen.shape[0] != self.num_units:
            self._means = torch.zeros(self.num_units, inputs.shape[1], device=inputs.device)
            self._seen = torch.zeros(self.num_units, dtype=torch.int64, device=inputs.device)
        token, place = (target >= 0).nonzero(as_tuple=True)
        numbers, inverse, counts = target[token, place].unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(numbers.shape[0], inputs.shape[1], device=inputs.device).index_add_(
            0, inverse, inputs[token]
        )
        self._seen[numbers] += counts
        # A plain mean at first, then one that forgets: the network below moves.
        rate = counts / torch.minimum(self._seen[numbers], counts + 15)
        self._means[numbers] += rate[:, None] * (sums / counts[:, None] - self._means[numbers])

    def _known(self) -> Tensor:
        if self._seen.shape[0] != self.num_units:
            return torch.empty(0, dtype=torch.int64)
        return (self._seen >= MIN_SEEN).nonzero()[:, 0].cpu()

    @torch.no_grad()
    def _repartition(self) -> None:
        """Classes seen often enough move to where the router expects their mean input; the others stay."""
        known = self._known()
        if not known.numel():
            return
        homes = self.homes.cpu().long()
        homes[known] = -1

        def scorer(numbers: Tensor, open_groups: Tensor | None) -> tuple[Tensor, Tensor]:
            return _wishes(unit(self._means[numbers].cpu()), router, open_groups)

        router = self._router()
        self.homes = (
            assign(scorer, homes, router.vectors.shape[0], self.capacity_for(self.num_units))
            .int()
            .to(self.homes.device)
        )

    # -- storing

    def settings(self) -> list[int]:
        """1, 2, 4, ... probes, up to half of the groups."""
        groups = self.vectors.shape[0] if self.fitted else self.groups or 0
        return [1 << power for power in range(max(1, groups // 2).bit_length())] if groups else []

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, and ``setting``."""
        names = ("groups", "probes", "copies", "repartition_every", "seed", "setting")
        return {name: getattr(self, name) for name in names}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """An unfitted selector takes on the width of the state too."""
        for name in ("vectors", "families"):
            value = state_dict.get(prefix + name)
            parameter = getattr(self, name)
            if isinstance(value, Tensor) and value.dim() == 2 and not parameter.numel():
                parameter.data = parameter.data.new_empty(value.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _scorer(rows: Tensor, router: Router) -> Any:
    return lambda numbers, open_groups: _wishes(rows[numbers], router, open_groups)


def _wishes(rows: Tensor, router: Router, open_groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """The groups that each row wants, by log probability within its list: [n, wishes] both, pads -1 last."""
    groups, families = router.vectors.shape[0], router.families.shape[0]
    if open_groups is not None:
        shut = ~open_groups.reshape(families, -1).any(dim=1)
        router = router._replace(
            family_bias=router.family_bias.masked_fill(shut, -torch.inf),
            group_bias=router.group_bias.masked_fill(~open_groups, -torch.inf),
        )
    count = min(WISHES, groups)
    scores, wanted = best_groups(rows, router, max(BEAM, -(-count * families // groups)), count)
    return (scores - scores.logsumexp(dim=1, keepdim=True)).contiguous(), wanted


__all__ = ["Partition"]
