"""Claims about answer.py: what is asked, and what is told."""

import numpy as np
import pytest

import answer
import tasks
from scales import BadInput
from tasks import KNOWN, TEST


def test_one_experiment_is_told_and_the_query_is_not(trained, main):
    """Of the first split and system that ask for one gene and know the other: the told experiment comes first, others
    that are known follow, and none is of the query. Two that are never apart in this way are refused by name."""
    part, names = trained.screen.split[:, 1:], trained.screen.treatment_names[1:]
    known = np.isin(part, KNOWN)
    system = int(np.flatnonzero((part == TEST).any(axis=1))[0])
    query, told = names[np.argmax(part[system] == TEST)], names[np.argmax(known[system])]
    place = {"screen": "dags", "scale": "smoke", "out": trained.settings.out, "eval_cells": 6}
    s = answer.Settings(model="dags", query=query, told=told, **place)
    split, screen, found, asked = answer.find(s)
    assert (split, found, names[asked - 1]) == (0, system, query)
    given = answer.given_of(s, screen, found, asked, 3)
    gene = {name: list(screen.genes).index(name) for name in (query, told)}
    assert np.flatnonzero(given.query).tolist() == [gene[query]]
    treated = given.context_treatments.argmax(axis=1)
    assert treated[0] == gene[told] and len(set(treated.tolist())) == 3 and gene[query] not in treated
    assert all(known[system, list(names).index(screen.genes[i])] for i in treated)
    pools = [screen.pool(found, t) for t in (tasks.CONTROL, 1 + list(names).index(told))]
    for cells, pool in zip((given.controls, given.context[0]), pools):
        assert all((cell == pool).all(axis=1).any() for cell in cells)
    with pytest.raises(BadInput, match="name others"):
        answer.find(answer.Settings(model="dags", query=query, told=query, **place))
