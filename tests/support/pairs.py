"""Few of many parametrized cases, that still hold every pair of parameter values.

Most faults need one or two parameters at certain values, few need three (Kuhn, Wallace & Gallo
2004, "Software fault interactions and implications for software testing").
"""

import heapq
from itertools import combinations


def every_pair(cases):
    """Indices, in order, of cases that hold each pair of values that occurs in `cases`.

    cases: dicts of parameter → value, values told apart by identity. A single parameter's values
    are all held. Greedy: the case with the most pairs that are still missing is taken next; the
    first of equals.
    """
    seen = {}
    rows = [[seen.setdefault((k, id(v)), len(seen)) for k, v in case.items()] for case in cases]
    pairs = [set(combinations(sorted(row), min(2, len(row)))) for row in rows]
    missing = set().union(*pairs)
    queue = [(-len(found), i) for i, found in enumerate(pairs)]
    heapq.heapify(queue)
    taken = []
    while missing:
        count, i = heapq.heappop(queue)
        left = len(pairs[i] & missing)
        if left == -count:
            taken.append(i)
            missing -= pairs[i]
        else:  # it was counted before others were taken
            heapq.heappush(queue, (-left, i))
    return sorted(taken)
