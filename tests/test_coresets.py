"""What is no lesson about `rdd_nb.coresets`: oracles and properties of chosen samples and of weights."""
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from rdd_nb import coresets
from rdd_nb.core import generator
from rdd_nb.coresets import (Selection, class_kmeans_ids, class_medoids, group_balanced_per_class, herding,
                             k_center_greedy,
                             random_per_class, stratified_per_class)
from rdd_nb.kmeans import KMeans
from rdd_nb.parts import Setup


def blobs(seed, n=1000, d=20, k=10, spread=2., offset=0.):
    gen = generator(seed, 'blobs')
    centres = torch.randn(k, d, generator=gen) * spread
    return centres[torch.randint(k, (n,), generator=gen)] + torch.randn(n, d, generator=gen) + offset


def exact(x, centres):
    return (torch.as_tensor(x).double()[:, None] - torch.as_tensor(centres).double()[None]).square().sum(2)


# Choosing samples

@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 30), st.booleans())
def test_chosen_samples_are_distinct_and_of_their_class(n_classes, ipc, more, copies):
    y = torch.arange(n_classes * (ipc + more)) % n_classes
    x = torch.zeros(len(y), 3) if copies else torch.randn(len(y), 3, generator=generator(ipc, more))
    for chosen in (random_per_class(y, ipc), class_medoids(x, y, ipc), herding(x, y, ipc), k_center_greedy(x, y, ipc)):
        assert torch.equal(y[chosen], torch.arange(n_classes).repeat_interleave(ipc))
        assert len(chosen.unique()) == len(chosen)


def test_medoid_is_the_sample_nearest_to_the_centre():
    x = blobs(0, n=300)
    chosen = class_medoids(x, torch.zeros(300).long(), 6, seed=2)
    centres = KMeans(6, random_state=generator(2, 'class_medoids', 0)).fit(x).cluster_centers_
    assert torch.equal(chosen, exact(x, centres).argmin(0))


def test_herding_keeps_the_mean_better_than_chance():
    x, y = blobs(0, n=300), torch.zeros(300).long()
    gap = lambda i: (x[i].mean(0) - x.mean(0)).norm()
    assert gap(herding(x, y, 20)) < .5 * min(gap(random_per_class(y, 20, s)) for s in range(20))


def test_k_center_is_within_twice_the_best_radius():
    x = torch.randn(9, 2, generator=generator(3))
    radius = lambda i: exact(x, x[list(i)]).min(1).values.max().sqrt()
    best = min(radius(i) for i in itertools.combinations(range(9), 3))
    for seed in range(9): assert radius(k_center_greedy(x, torch.zeros(9).long(), 3, seed).tolist()) <= 2 * best + 1e-6


def test_errors_name_class_and_counts():
    y = torch.tensor([0]*5 + [2]*9)
    with pytest.raises(ValueError, match='class 1 has no samples: expected at least 3 in each class from 0 to 2'):
        random_per_class(y, 3)
    with pytest.raises(ValueError, match='ipc=7 is more than the 5 samples of class 0'):
        random_per_class(y.clamp(max=1), 7)
    with pytest.raises(ValueError, match='class 3 has no samples'):
        class_kmeans_ids(blobs(0, n=14), torch.arange(14) % 3, 2, n_classes=4)
    with pytest.raises(ValueError, match='y has 14 labels: expected 15'): class_medoids(blobs(0, n=15), y, 3)
    with pytest.raises(ValueError, match='ipc=0'): random_per_class(y, 0)
    with pytest.raises(ValueError, match='k=6 is more than the 5 samples of class 0'):
        class_kmeans_ids(blobs(0, n=14), y.clamp(max=1), 6)
    for labels in (y - 1, y.float(), y[:, None], []):
        with pytest.raises(ValueError, match='y has shape'): random_per_class(labels, 3)


# Choices and weights

@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), ipc=st.integers(1, 12), n_groups=st.integers(1, 5))
def test_group_balanced_is_as_equal_as_there_are_samples(seed, ipc, n_groups):
    gen = generator(seed, 'groups')
    y = torch.randint(3, (120,), generator=gen)
    group = (torch.rand(120, generator=gen)**3 * n_groups).long()
    chosen = group_balanced_per_class(y, group, ipc, seed)
    assert torch.equal(y[chosen], torch.arange(3).repeat_interleave(ipc)) and len(chosen.unique()) == 3 * ipc
    for c in range(3):
        got = group[chosen[y[chosen] == c]].bincount(minlength=n_groups)
        there = group[y == c].bincount(minlength=n_groups)
        # groups that could have given more got as many as any, to within one
        unfilled = got[got < there]
        assert len(unfilled) == 0 or unfilled.min() >= got.max() - 1


FUNCTIONS = {
    'random': lambda x, y, ipc, seed, group: random_per_class(y, ipc, seed),
    'stratified': lambda x, y, ipc, seed, group: stratified_per_class(x, y, ipc, seed),
    'herding': lambda x, y, ipc, seed, group: herding(x, y, ipc),
    'kcenter': lambda x, y, ipc, seed, group: k_center_greedy(x, y, ipc, seed),
    'kmeans': lambda x, y, ipc, seed, group: class_medoids(x, y, ipc, seed),
    'groups': lambda x, y, ipc, seed, group: group_balanced_per_class(y, group, ipc, seed),
}

@pytest.mark.parametrize('name', FUNCTIONS)
def test_a_selection_gives_the_rows_of_its_function(name):
    x, y = blobs(0, n=300), torch.arange(300) % 3
    group, part = (torch.arange(300) % 7 == 0).long(), Selection.read(name)
    for seed, ipc in ((1, 5), (2, 5), (1, 1)):
        setup = Setup(x, y, 3, seed, ipc=ipc, group=group)
        rows = part.rows(setup)
        torch.manual_seed(seed)                                     # the global state does not matter
        assert rows.dtype == torch.int64 and torch.equal(rows, FUNCTIONS[name](x, y, ipc, seed, group))
        for got, wanted in zip(part.begin(setup), (x[rows], y[rows])): assert torch.equal(got, wanted)
    assert name == 'herding' or not torch.equal(rows, part.rows(Setup(x, y, 3, 2, ipc=5, group=group)))
    assert part.sees_groups == (name == 'groups')


def test_every_selection_is_tried():
    elsewhere = {"patches", "balanced"}      # in test_teacher and test_methods
    assert set(FUNCTIONS) == {name for name in Selection.known if not name.endswith("selection")} - elsewhere


def test_selection_by_group_needs_groups():
    with pytest.raises(ValueError, match='needs the group of each sample'):
        Selection.read('groups').begin(Setup(torch.zeros(4, 2), torch.zeros(4).long(), 1))


def test_stratified_with_more_and_fewer_clusters_than_places():
    x, y = blobs(1, n=200), torch.arange(200) % 2
    for k in (1, 2, 30):
        chosen = stratified_per_class(x, y, 6, k=k)
        assert torch.equal(y[chosen], torch.arange(2).repeat_interleave(6)) and len(chosen.unique()) == 12
    with pytest.raises(ValueError, match='k=150 is more than the 100 samples of class 0'):
        stratified_per_class(x, y, 6, k=150)


@pytest.mark.parametrize('bandwidth', [.5, 3., 20.])
@pytest.mark.parametrize('offset', [0., 1000.])
def test_density_weights_against_scikit_learn(bandwidth, offset):
    from sklearn.neighbors import KernelDensity
    x, y = blobs(2, n=300, offset=offset).double(), torch.arange(300) % 3
    p = coresets.density_weights(x, y, bandwidth, chunk_mb=.02)
    for c in range(3):
        own = x[y == c].numpy()
        score = KernelDensity(bandwidth=bandwidth).fit(own).score_samples(own)
        expected = np.exp(-(score - score.min()))
        np.testing.assert_allclose(p[y == c].numpy(), expected / expected.sum(), rtol=1e-4)


def test_density_weights_are_bounded_and_see_features():
    x, y = torch.cat([torch.zeros(99, 3), torch.full((1, 3), 50.)]), torch.zeros(100, dtype=torch.long)
    p = coresets.density_weights(x, y, 1.)
    assert p[99] / p[0] == pytest.approx(99, rel=1e-4)              # alone, against 99 copies
    x, y = blobs(4, n=100), torch.arange(100) % 2
    assert torch.allclose(coresets.density_weights(x, y, 3., features=lambda x: x * 3),
                          coresets.density_weights(x * 3, y, 3.))
    one = coresets.density_weights(x[:3], torch.tensor([0, 1, 1]))
    assert one[0] == 1 and torch.allclose(one[1:], torch.tensor([.5, .5]))
    with pytest.raises(ValueError, match='y has 99 labels'): coresets.density_weights(x, y[1:])
    with pytest.raises(ValueError, match='bandwidth=nan'): coresets.density_weights(x, y, float('nan'))
