"""One option for each unit, the least harm within a budget of bytes: the multiple-choice knapsack, by dynamic programming."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptfleet.contracts.errors import ContractError

_MAX_CELLS = 20_000
"""Budgets are counted in this many pieces at most; each option's bytes are rounded up, so the budget always holds."""


@dataclass(frozen=True)
class Option:
    num_bytes: int
    harm: float


def fill(units: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The chosen option of each unit, by number. Exact up to the rounding of bytes to 1/20,000 of what there is to choose about.

    ContractError: the smallest options together exceed the budget.
    """
    smallest = [min(option.num_bytes for option in options) for options in units]
    spare = budget - sum(smallest)
    if spare < 0:
        raise ContractError(f"the budget is {budget:,} bytes, but the smallest options take {sum(smallest):,}. Raise it.")
    most = sum(max(option.num_bytes for option in options) for options in units) - sum(smallest)
    spare = min(spare, most)
    piece = max(1, -(-spare // _MAX_CELLS))
    num_cells = spare // piece + 1
    # harm_C[c]: the least harm of the units so far with at most c pieces beyond the smallest
    harm_C = np.zeros(num_cells)
    choices = np.zeros((len(units), num_cells), dtype=np.int16)
    costs = [[-(-(option.num_bytes - low) // piece) for option in options] for options, low in zip(units, smallest, strict=True)]
    for u, options in enumerate(units):
        best_C = np.full(num_cells, np.inf)
        for number, (option, cost) in enumerate(zip(options, costs[u], strict=True)):
            if cost >= num_cells:
                continue
            with_C = np.full(num_cells, np.inf)
            with_C[cost:] = harm_C[: num_cells - cost] + option.harm
            better_C = with_C < best_C
            best_C[better_C] = with_C[better_C]
            choices[u, better_C] = number
        harm_C = best_C
    chosen: list[int] = []
    cell = num_cells - 1
    for u in range(len(units) - 1, -1, -1):
        chosen.append(int(choices[u, cell]))
        cell -= costs[u][chosen[-1]]
    return chosen[::-1]
