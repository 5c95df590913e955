"Metrics by group against numpy and pandas: calibration, the worst part, adjusted averages, tables."
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rdd_nb.data import GroupedDataset
from rdd_nb.intervals import accuracy_interval, wilson
from rdd_nb.metrics import (GroupFrame, NoiseWarning, deo, ece, group_metrics, notes, population_shares,
                            summary_metrics, tidy)


def dataset(y, group, classes=2, groups=3):
    return GroupedDataset(torch.zeros(len(y), 1, 2, 2), y, group, classes=[f'c{i}' for i in range(classes)],
                          groups=[f'g{i}' for i in range(groups)])


def sample(n=600, seed=0, sizes=(.7, .28, .02)):
    g = torch.Generator().manual_seed(seed)
    group, y = torch.multinomial(torch.tensor(sizes), n, True, generator=g), torch.randint(2, (n,), generator=g)
    p = torch.rand(n, 2, generator=g).softmax(1)
    return dataset(y, group), p


# Calibration

def test_ece_by_hand():
    "Bins of equal mass, counted out; every sample in one bin."
    g = torch.Generator().manual_seed(0)
    c, h = torch.rand(90, generator=g), torch.rand(90, generator=g) < .6
    order = c.argsort()
    expected = sum(abs(float(c[i].mean()) - float(h[i].double().mean())) * len(i) / 90 for i in order.split(9))
    assert ece(c, h, bins=10) == pytest.approx(expected, abs=1e-6)
    assert ece(c, h, bins=1) == pytest.approx(abs(float(c.mean()) - float(h.double().mean())), abs=1e-6)


@settings(max_examples=40)
@given(st.integers(1, 80), st.integers(1, 20), st.integers(0, 99))
def test_ece_bounds(n, bins, seed):
    g = torch.Generator().manual_seed(seed)
    c, h = (torch.rand(n, generator=g) * 5).round() / 5, torch.rand(n, generator=g) < .5      # many ties
    value, p = ece(c, h, bins), torch.randperm(n, generator=g)
    assert 0 <= value <= 1 and value == pytest.approx(ece(c[p], h[p], bins))
    assert value >= abs(float((c - h.float()).mean())) - 1e-6


def test_ece_of_honest_and_of_boastful_confidence():
    g = torch.Generator().manual_seed(1)
    c = torch.rand(20_000, generator=g)
    assert ece(c, torch.rand(20_000, generator=g) < c) < .02 and ece(c**.25, torch.rand(20_000, generator=g) < c) > .2
    with pytest.raises(ValueError, match='same length'): ece(c, c[:5])


def test_calibration_of_groups_large_enough():
    data, p = sample()
    found = group_metrics(p.argmax(1), data, probabilities=p)
    assert set(found['group_ece']) == {g for g, n in found['group_counts'].items()
                                       if n >= 200} != set(found['group_counts'])
    member = data.group == 0
    assert found['group_ece']['g0'] == pytest.approx(ece(p.max(1).values[member], (p.argmax(1) == data.y)[member]))
    assert found['ece'] == pytest.approx(ece(p.max(1).values, p.argmax(1) == data.y))
    assert 'ece' not in group_metrics(p.argmax(1), data)


# The worst part

def test_small_parts_are_not_the_worst():
    group, y = torch.repeat_interleave(torch.arange(3), torch.tensor([40, 20, 4])), torch.arange(64) % 2
    hit = torch.cat([torch.arange(40) % 10 > 0, torch.arange(20) % 2 > 0, torch.zeros(4, dtype=torch.bool)])
    data = dataset(y, group)
    row = group_metrics(torch.where(hit, y, 1 - y), data)
    found = summary_metrics(row)
    assert found['worst_group'] == dict(name='g1', n=20, low=pytest.approx(wilson(10, 20)[0]),
                                        high=pytest.approx(wilson(10, 20)[1])) and found['worst_group_accuracy'] == .5
    assert found['small'] == {'group': ['g2'], 'class_group': ['c0|g2', 'c1|g2']} and found['minimum'] == 10
    said = notes(row | found)
    assert any('g2 (n = 4)' in s for s in said) and not any('g0' in s for s in said)
    assert any('n = 20' in s and 'interval' in s for s in said)
    assert summary_metrics(row, minimum=1)['worst_group']['name'] == 'g2' and 'small' in found
    assert not summary_metrics(row, minimum=1)['small']
    # nobody is large enough: all are looked at
    nobody = summary_metrics(row, minimum=1000)
    assert nobody['worst_group']['name'] == 'g2' and 'and no other' in notes(row | nobody)[0]
    json.dumps(row | found | dict(notes=said), allow_nan=False)
    assert issubclass(NoiseWarning, UserWarning)


def test_clusters_obey_the_minimum_but_for_the_references_own():
    y = torch.zeros(30, dtype=torch.long)
    predicted, ids = torch.tensor([1] * 3 + [0] * 27), torch.tensor([0] * 3 + [1] * 27)
    data = GroupedDataset(torch.zeros(30, 1, 1, 1), y, classes=['a', 'b'])
    found = group_metrics(predicted, data, dict(cluster=ids, reference_cluster=ids), minimum=10)
    assert (found['cluster_min_accuracy'], found['reference_cluster_min_accuracy']) == (1, 0)


def test_equal_parts_are_noise_and_a_real_minority_is_not():
    rng = np.random.default_rng(0)
    def row(level):
        hits = rng.binomial(200, level)
        cells = {f'c{i}|g': h / 200 for i, h in enumerate(hits)}
        base = dict(group_accuracy={'g': hits.mean() / 200}, group_counts={'g': 4000},
                    class_accuracy=dict(list(cells.items())[:1]), class_counts={'c0|g': 200},
                    class_group_accuracy=cells, class_group_counts=dict.fromkeys(cells, 200))
        return base | summary_metrics(base)
    chance = [any('may be chance' in s for s in notes(row([.8] * 20))) for _ in range(100)]
    # wrong alarms the other way are those 5 %
    assert np.mean(chance) > .85
    assert not any('may be chance' in s for s in notes(row([.5] + [.8] * 19)))


# Averages

@settings(max_examples=30)
@given(st.integers(0, 99))
def test_adjusted_average(seed):
    "As in WILDS: test accuracies of the cells, weighted by how often they occur in training."
    test, p = sample(seed=seed, sizes=(.34, .33, .33))
    train, _ = sample(n=900, seed=seed + 1, sizes=(.8, .15, .05))
    row = group_metrics(p.argmax(1), test)
    found = summary_metrics(row, population=population_shares(train))
    hit = (p.argmax(1) == test.y).double()
    expected = sum(
        hit[(test.y == c) & (test.group == g)].mean() * ((train.y == c) & (train.group == g)).double().mean()
        for c in range(2) for g in range(3))
    assert found['adjusted_accuracy'] == pytest.approx(float(expected))
    assert summary_metrics(row, population=population_shares(test))['adjusted_accuracy'] == pytest.approx(
        row['accuracy'])
    assert 'adjusted_accuracy' not in summary_metrics(row)
    assert 'adjusted_accuracy' not in summary_metrics(row, population={'no|body': 1})
    assert sum(population_shares(train).values()) == pytest.approx(1) == sum(
        population_shares(train.without_groups()).values())


# Difference of equalised odds

def gaps(predicted, y, group):
    "The gap of every class by plain loops over the samples, as the papers define it."
    found = []
    for c in sorted(set(y)):
        accuracy = []
        for g in sorted(set(group)):
            hits = [p == c for p, t, h in zip(predicted, y, group) if t == c and h == g]
            if hits: accuracy.append(sum(hits) / len(hits))
        found.append(max(accuracy) - min(accuracy))
    return found


def random_case(classes, groups, seed, n=400):
    g = torch.Generator().manual_seed(seed)
    y, group = torch.randint(classes, (n,), generator=g), torch.randint(groups, (n,), generator=g)
    right = torch.rand(n, generator=g) < .3 + .5 * group / groups
    return torch.where(right, y, torch.randint(classes, (n,), generator=g)), y, group


@pytest.mark.parametrize('classes, groups', [(2, 2), (3, 2), (4, 3)])
@pytest.mark.parametrize('seed', range(3))
def test_deo_is_that_of_plain_loops(classes, groups, seed):
    predicted, y, group = random_case(classes, groups, seed)
    expected = gaps(predicted.tolist(), y.tolist(), group.tolist())
    row = group_metrics(predicted, dataset(y, group, classes, groups))
    assert deo(row) == pytest.approx(dict(deo_m=max(expected), deo_a=np.mean(expected)))
    assert {k: v for k, v in summary_metrics(row, minimum=1).items() if k.startswith('deo')} == deo(row)


@pytest.mark.parametrize('seed', range(3))
def test_deo_is_that_of_fairlearn(seed):
    "For two classes DEO_M is the larger gap of true and false positive rates, and DEO_A their mean."
    fairlearn = pytest.importorskip('fairlearn.metrics')
    predicted, y, group = random_case(2, 3, seed)
    found = deo(group_metrics(predicted, dataset(y, group)))
    for key, agg in (('deo_m', 'worst_case'), ('deo_a', 'mean')):
        expected = fairlearn.equalized_odds_difference(y.numpy(), predicted.numpy(), sensitive_features=group.numpy(),
                                                       agg=agg)
        assert found[key] == pytest.approx(expected)


def test_deo_where_parts_are_missing_or_small():
    y, group = torch.tensor([0] * 40 + [1] * 20), torch.tensor([0] * 20 + [1] * 20 + [0] * 17 + [1] * 3)
    predicted = torch.where(torch.arange(60) < 10, 1, y)
    predicted[57:] = 0                                     # the three of class 1 in group 1 are wrong
    row = group_metrics(predicted, dataset(y, group, groups=2))
    assert deo(row) == dict(deo_m=1, deo_a=.75) and deo(row, minimum=10) == dict(deo_m=.5, deo_a=.5)
    assert summary_metrics(row)['deo_m'] == .5
    alone = group_metrics(y, dataset(y, torch.zeros_like(y)))
    assert deo(alone) == {} and 'deo_m' not in summary_metrics(alone)


# Tables

def rows():
    return [dict(method=m, seed=s, accuracy=.8 + b, group_accuracy=dict(many=.9 + b, few=.5 + b + .02 * s, rare=.1),
                 group_counts=dict(many=400, few=100, rare=3), minimum=10, ece=.1, group_ece=dict(many=.05, few=.2))
            for s in range(3) for m, b in (('kmeans', 0), ('rdd', .05))]


def test_tidy():
    table = tidy(rows())
    assert len(table) == 18 and list(table.columns) == ['method', 'seed', 'group', 'n', 'accuracy', 'ece']
    assert table[(table.method == 'rdd') & (table.seed == 2)].set_index('group').accuracy['few'] == pytest.approx(.59)
    assert table[table.group == 'rare'].ece.isna().all()
    for bad in (lambda: tidy(rows(), 'colour'), lambda: tidy([]), lambda: tidy(rows(), 'class')):
        with pytest.raises(ValueError): bad()


def test_the_shape_of_metricframe():
    one = GroupFrame(rows()[0])
    assert list(one.by_group.index) == ['many', 'few', 'rare'] and one.overall.accuracy == pytest.approx(.8)
    assert tuple(one.by_group.loc['few', ['low', 'high']]) == pytest.approx(wilson(50, 100))
    # 'rare' is left out
    assert one.group_min().accuracy == .5 and one.group_max().accuracy == .9
    assert one.difference().accuracy == pytest.approx(.4) and one.ratio().accuracy == pytest.approx(5 / 9)
    assert one.difference('to_overall').accuracy == pytest.approx(.3)
    assert one.ratio('to_overall').accuracy == pytest.approx(5 / 8)
    assert one.difference().ece == pytest.approx(.15) and 'n' not in one.group_min()
    assert GroupFrame(rows()[0], minimum=1).group_min().accuracy == .1
    several = GroupFrame(rows())
    assert several.by_group.index.nlevels == 2
    assert several.difference().accuracy.to_dict() == pytest.approx(dict(kmeans=.9 - .52, rdd=.95 - .57))
    assert several.difference('to_overall').accuracy.to_dict() == pytest.approx(dict(kmeans=.28, rdd=.28))
    assert several.ratio('to_overall').accuracy['rdd'] == pytest.approx(.57 / .85)
    over_seeds = accuracy_interval([.55, .57, .59], 100)
    low, high = several.by_group.loc[('rdd', 'few'), ['low', 'high']]
    assert (low, high) == pytest.approx((over_seeds['low'], over_seeds['high']))
    assert over_seeds['high'] - .57 == pytest.approx(4.302652729911275 * .02 / 3**.5, rel=.03)      # Student's, nearly
    for frame in (one, several):
        assert '<table' in frame._repr_html_() and 'few' in repr(frame)
        for f in (frame.difference, frame.ratio):
            with pytest.raises(ValueError, match='to_overall'): f('sideways')


def test_names_are_escaped():
    row = rows()[0] | dict(group_accuracy={'<script>': .5, 'b': .6}, group_counts={'<script>': 50, 'b': 50},
                           group_ece={})
    assert '<script>' not in GroupFrame(row)._repr_html_()
    assert '<script>' not in GroupFrame([row, row | dict(method='<script>')])._repr_html_()
