"""How the suite thins out its cases (`support/pairs.py`)."""

from itertools import combinations, product

from pairs import every_pair

AXES = {
    "impl": ["a", "b"],
    "dtype": ["x", "y", "z"],
    "layout": [True, False],
    "name": list("pqrst"),
}


def pairs_of(cases):
    return {pair for case in cases for pair in combinations(sorted(case.items(), key=str), 2)}


def test_every_pair_is_held_by_few_cases():
    cases = [dict(zip(AXES, values, strict=True)) for values in product(*AXES.values())]
    cases.remove({"impl": "a", "dtype": "x", "layout": True, "name": "p"})  # no whole product
    taken = every_pair(cases)
    assert taken == sorted(set(taken)) and len(taken) < len(cases) / 2
    assert pairs_of(cases[i] for i in taken) == pairs_of(cases)


def test_fewer_than_two_parameters():
    assert every_pair([{"name": name} for name in "pqr"]) == [0, 1, 2]
    assert every_pair([{"name": "p"}, {"name": "p"}]) == [0]
