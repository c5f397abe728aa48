"""Atoms: what can only be removed together.

Every dimension of every value carries a vector of atom ids, one per coordinate. Operators unite the atoms of
coordinates that must stay or go as one, and fix atoms that can never go. An atom is then the finest unit of surgery.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from raycomp.speedup.graph.graph import Value

Ids = NDArray[np.int64]


class Atoms:
    """A union-find over the coordinates of all dimensions.

    Dimensions of size 0 and 1 are fixed and never relate to others, so that broadcasting and squeezing need no care.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1024, dtype=np.int64)
        self._size = 0
        self._reasons: dict[int, str] = {}
        self._dims: dict[tuple[Value, int], Ids] = {}
        self._grouped: dict[Value, Ids] = {}
        self._single = int(self.fresh(1)[0])
        self._reasons[self._single] = "the dimension has one coordinate"

    def fresh(self, count: int) -> Ids:
        """New atoms, free and apart."""
        while self._size + count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros_like(self._parent)])
        ids = np.arange(self._size, self._size + count, dtype=np.int64)
        self._parent[ids] = ids
        self._size += count
        return ids

    def fixed(self, count: int, reason: str) -> Ids:
        """`count` coordinates that can never go."""
        atom = self.fresh(1)
        self._reasons[int(atom[0])] = reason
        return np.repeat(atom, count)

    def __len__(self) -> int:
        return self._size

    def roots(self, ids: Ids) -> Ids:
        """The representative of each atom."""
        parent = self._parent
        found = parent[ids]
        while True:
            above = parent[found]
            if np.array_equal(above, found):
                break
            found = above
        self._parent[ids] = found
        return found

    def unite(self, left: Ids, right: Ids) -> None:
        """Makes one atom of each pair of coordinates."""
        pairs = np.unique(np.stack([self.roots(left), self.roots(right)], axis=1), axis=0)
        for a, b in pairs[pairs[:, 0] != pairs[:, 1]]:
            self._unite_pair(int(a), int(b))

    def _unite_pair(self, a: int, b: int) -> None:
        root_a, root_b = self._root(a), self._root(b)
        if root_a == root_b:
            return
        low, high = min(root_a, root_b), max(root_a, root_b)
        self._parent[high] = low
        reason = self._reasons.pop(high, None)
        if reason is not None:
            self._reasons.setdefault(low, reason)

    def _root(self, atom: int) -> int:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = int(self._parent[atom])
        return atom

    def fix(self, ids: Ids, reason: str) -> None:
        """Says that these coordinates can never go; the first reason stays."""
        for root in np.unique(self.roots(ids)):
            self._reasons.setdefault(int(root), reason)

    def reason(self, atom: int) -> str | None:
        """Why an atom can't go; None where it is free."""
        return self._reasons.get(self._root(atom))

    def fixed_roots(self) -> dict[int, str]:
        """The fixed atoms with their reasons."""
        return {self._root(atom): reason for atom, reason in self._reasons.items()}

    def known(self, value: Value, dim: int) -> bool:
        """Whether the dimension has its atoms already."""
        return value.shape[dim] <= 1 or (value, dim) in self._dims

    def ids(self, value: Value, dim: int) -> Ids:
        """The atoms of one dimension (fresh ones, where no operator has set them yet)."""
        dim = dim % max(value.ndim, 1)
        size = value.shape[dim]
        if size <= 1:
            return np.full(size, self._single, dtype=np.int64)
        if (value, dim) not in self._dims:
            self._dims[value, dim] = self.fresh(size)
        return self._dims[value, dim]

    def bind(self, value: Value, dim: int, ids: Ids) -> None:
        """Says that the dimension's coordinates are these atoms."""
        dim = dim % max(value.ndim, 1)
        if value.shape[dim] <= 1 or len(ids) <= 1:
            return
        if len(ids) != value.shape[dim]:
            raise ValueError(f"{len(ids)} atoms for dimension {dim} of {value.name} {value.shape}")
        if (value, dim) in self._dims:
            self.unite(self._dims[value, dim], ids)
        else:
            self._dims[value, dim] = ids

    def same(self, left: Value, left_dim: int, right: Value, right_dim: int) -> None:
        """Says that two dimensions of the same size go coordinate by coordinate."""
        if self.known(left, left_dim % max(left.ndim, 1)):
            self.bind(right, right_dim, self.ids(left, left_dim))
        else:
            self.bind(left, left_dim, self.ids(right, right_dim))

    def fix_dim(self, value: Value, dim: int, reason: str) -> None:
        """Says that no coordinate of a dimension can go."""
        dim = dim % max(value.ndim, 1)
        if value.shape[dim] <= 1:
            return
        if (value, dim) in self._dims:
            self.fix(self._dims[value, dim], reason)
        else:
            self._dims[value, dim] = self.fixed(value.shape[dim], reason)

    def fix_value(self, value: Value, reason: str) -> None:
        """Says that no coordinate of any dimension can go."""
        for dim in range(value.ndim):
            self.fix_dim(value, dim, reason)

    def bind_grouped(self, weight: Value, ids: Ids) -> None:
        """Says which channels the columns of a grouped weight stand for, all groups one after the other.

        A grouped weight's columns are another set of channels in each group, so that no dimension of it carries them.
        """
        if weight in self._grouped:
            self.unite(self._grouped[weight], ids)
        else:
            self._grouped[weight] = ids

    def grouped(self, weight: Value) -> Ids:
        """The atoms given by `bind_grouped`."""
        return self._grouped[weight]

    def dims(self) -> list[Ids]:
        """The atoms of every dimension that has more than one coordinate."""
        return list(self._dims.values())
