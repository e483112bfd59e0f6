"""Assigning classes to groups of limited size by preference: deferred acceptance (Gale and Shapley, 1962).

Every class proposes to the groups on its list, best first; a full group keeps those that want it most. The result does
not depend on the order of the proposals. O(classes * candidates * log(capacity)), no pass per group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparingly.ops._numba import heap_better, heap_sink, inlined, kernel

Scorer = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(classes int64 [n], groups that may be named, bool [groups] or None) -> scores, groups [n, candidates], best first"""


@inlined
def _holds(homes, number, group):
    found = False
    for copy in range(homes.shape[1]):
        found = found or homes[number, copy] == group
    return found


@kernel
def _rise(scores, members, group, place, score, member):
    """Put a pair at ``place``, the end of the group's heap (worst first), and let it rise."""
    while place > 0:
        parent = (place - 1) // 2
        if not heap_better(scores[group, parent], members[group, parent], score, member):
            break
        scores[group, place] = scores[group, parent]
        members[group, place] = members[group, parent]
        place = parent
    scores[group, place] = score
    members[group, place] = member


@kernel
def _propose(classes, groups, wishes, homes, room, heap_scores, heap_members):
    """One round: each of ``classes`` gets at most one more group; True where it got none.

    groups int64 and wishes float32 [n, candidates], best first; homes [num_classes, copies] holds the groups of earlier
    rounds; room [groups] is what each may take in this round. A group of -1 is a pad.
    """
    n = classes.shape[0]
    following = np.zeros(n, np.int64)
    waiting = np.arange(n)[::-1].copy()
    depth = n
    taken = np.zeros(room.shape[0], np.int64)
    lost = np.zeros(n, np.bool_)
    while depth:
        depth -= 1
        place = waiting[depth]
        placed = False
        while following[place] < groups.shape[1]:
            candidate = following[place]
            following[place] += 1
            group = groups[place, candidate]
            wish = wishes[place, candidate]
            if group < 0 or room[group] == 0 or _holds(homes, classes[place], group):
                continue
            if taken[group] < room[group]:
                _rise(heap_scores, heap_members, group, taken[group], wish, place)
                taken[group] += 1
                placed = True
                break
            worst, loser = heap_scores[group, 0], heap_members[group, 0]
            if wish > worst or (wish == worst and place < loser):
                heap_sink(heap_scores, heap_members, group, taken[group], wish, place)
                waiting[depth] = loser
                depth += 1
                placed = True
                break
        lost[place] = not placed
    return lost, taken


@kernel
def _settle(classes, homes, copy, heap_members, taken, sizes):
    for group in range(taken.shape[0]):
        for place in range(taken[group]):
            homes[classes[heap_members[group, place]], copy] = group
        sizes[group] += taken[group]


@kernel
def _fill(classes, homes, copy, sizes, capacity):
    """Whoever is left goes to the emptiest group that does not hold it yet, moving a member on where it must."""
    for place in range(classes.shape[0]):
        number = classes[place]
        best = -1
        for group in range(sizes.shape[0]):
            smaller = best < 0 or sizes[group] < sizes[best]
            if smaller and sizes[group] < capacity and not _holds(homes, number, group):
                best = group
        if best < 0:
            # Only groups that hold it have room: another class, held by a full group, moves there in its stead.
            best = _swap(number, homes, sizes, capacity)
        homes[number, copy] = best
        sizes[best] += 1


@kernel
def _swap(number, homes, sizes, capacity):
    """Free a place in a full group by moving one of its classes to a group with room; the group that was freed."""
    for free in range(sizes.shape[0]):
        if sizes[free] >= capacity:
            continue
        for other in range(homes.shape[0]):
            if _holds(homes, other, free):
                continue
            for copy in range(homes.shape[1]):
                group = homes[other, copy]
                if group >= 0 and not _holds(homes, number, group):
                    homes[other, copy] = free
                    sizes[free] += 1
                    sizes[group] -= 1
                    return group
    return -1


def assign(scorer: Scorer, homes: Tensor, groups: int, capacity: int) -> Tensor:
    """Every class in as many different groups as ``homes`` has columns, no group with over ``capacity`` classes.

    homes int64 [num_classes, copies]: rows of -1 are to be assigned, the others stay. Returns a new tensor without -1.

    First every class gets one group, as near to its first wish as the limit allows, then every class a second one from
    the room that is left, and so on. ``scorer`` names wishes, and is asked again, about groups with room only, for
    classes whose whole list is full.

    Raises ValueError if the groups have no room for all copies, or are fewer than the copies.
    """
    num_classes, copies = homes.shape
    if copies > groups or groups * capacity < num_classes * copies:
        raise ValueError(
            f"{copies} copies of {num_classes} classes need room in {copies} different groups, "
            f"got {groups} groups of {capacity}"
        )
    new = homes.numpy().astype(np.int64, copy=True)
    moving = np.flatnonzero(new[:, 0] < 0)
    sizes = np.bincount(new[new >= 0], minlength=groups).astype(np.int64)
    scores = np.empty((groups, capacity), dtype=np.float32)
    members = np.empty((groups, capacity), dtype=np.int64)
    if not moving.size:
        return torch.from_numpy(new)
    wishes, wanted = (value.numpy() for value in scorer(torch.from_numpy(moving), None))
    for copy in range(copies):
        lost, taken = _propose(moving, wanted, wishes, new, capacity - sizes, scores, members)
        _settle(moving, new, copy, members, taken, sizes)
        left = moving[lost]
        # Each pass empties the list or fills groups; the handful that three leave are placed by room.
        for _ in range(3):
            if not left.size or not (sizes < capacity).any():
                break
            less, fewer = (
                value.numpy() for value in scorer(torch.from_numpy(left), torch.from_numpy(sizes < capacity))
            )
            lost, taken = _propose(left, fewer, less, new, capacity - sizes, scores, members)
            _settle(left, new, copy, members, taken, sizes)
            left = left[lost]
        _fill(left, new, copy, sizes, capacity)
    return torch.from_numpy(new)
