"Evaluation against pandas, scikit-learn and scipy: metrics, intervals, units of images, protocols, bad input."
import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from rdd_nb.data import GroupedDataset, from_arrays
from rdd_nb.corruptions import corrupt
from rdd_nb.training import PROTOCOLS, Training, predict, predict_scores, protocol, train, train_together
from rdd_nb.evaluation import (
    ARCHITECTURES, evaluate, evaluate_architectures, evaluate_estimator, fit_clusters, read_predictions,
    reference_clusters)
from rdd_nb.intervals import METRICS, interval, paired, summarise, wilson
from rdd_nb.metrics import NoiseWarning, group_metrics
from rdd_nb.models import MODELS, make_model
from rdd_nb.risk import CVaR
from rdd_nb.intervals import accuracy_interval
from rdd_nb.synthetic import SyntheticDataset

# the toys are small; tested where it matters
pytestmark = pytest.mark.filterwarnings('ignore::rdd_nb.metrics.NoiseWarning')
FAST = Training(width=4, epochs=3, batch=16)


def toy(n=60, classes=3, groups=True, seed=0, shape=(1, 8, 8)):
    "Noisy images around one prototype per class, every fourth inverted."
    g = torch.Generator().manual_seed(7)
    prototypes = torch.rand(classes, *shape, generator=g)
    g.manual_seed(seed)
    y = torch.arange(n) % classes
    raw = (prototypes[y] * .6 + .4 * torch.rand(n, *shape, generator=g)).clamp(0, 1)
    odd = torch.arange(n) % 4 == 0
    raw[odd] = 1 - raw[odd]
    return from_arrays(
        raw,
        y,
        odd.long() if groups else None,
        groups=['many', 'few'] if groups else None,
        classes=[f'c{i}' for i in range(classes)],
        name='toy',
    )


def set_of(data, ipc=4, **kw):
    chosen = torch.cat([data.class_indices(c)[:ipc] for c in range(data.n_classes)])
    return SyntheticDataset(data.x[chosen], data.y[chosen], data.mean, data.std, data.classes, **kw)


def one_line(e): return '\n' not in str(e.value) and 0 < len(str(e.value)) < 300


# Metrics

@st.composite
def outcomes(draw):
    n, classes, groups = draw(st.integers(1, 40)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    column = lambda k: torch.tensor(draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n)))
    return classes, groups, column(classes), column(classes), column(groups), column(5)


@settings(max_examples=40)
@given(outcomes())
def test_metrics_are_those_of_pandas(outcome):
    classes, groups, predicted, y, group, cluster = outcome
    names = ['maj|ority', 'minority', 'x y'][:groups]
    test = GroupedDataset(
        torch.zeros(len(y), 1, 2, 2), y, group, classes=[f'c{i}' for i in range(classes)], groups=names
    )
    found = group_metrics(predicted, test, dict(cluster=cluster))
    frame = pd.DataFrame(
        dict(
            hit=(predicted == y).numpy().astype(float),
            y=[f'c{i}' for i in y],
            group=[names[i] for i in group],
            cluster=cluster,
        )
    )
    by = frame.groupby('group').hit
    assert found['accuracy'] == pytest.approx(accuracy_score(y, predicted)) == pytest.approx(frame.hit.mean())
    assert (
        found['group_accuracy'] == pytest.approx(by.mean().to_dict()) and found['group_counts'] == by.size().to_dict()
    )
    assert found['worst_group_accuracy'] == pytest.approx(by.mean().min())
    cells = frame.groupby(frame.y + '|' + frame.group).hit
    assert (
        found['class_group_accuracy'] == pytest.approx(cells.mean().to_dict())
        and found['class_group_counts'] == cells.size().to_dict()
    )
    assert found['cluster_min_accuracy'] == pytest.approx(frame.groupby('cluster').hit.mean().min())
    table = confusion_matrix(y, predicted, labels=range(classes)) if classes > 1 else np.array([[len(y)]])
    assert found['accuracy'] == pytest.approx(np.trace(table) / table.sum())
    assert found['confusion'] == table.tolist()
    alone = group_metrics(predicted, test.without_groups())
    assert alone['group_accuracy'] == {'all': pytest.approx(frame.hit.mean())} and alone['group_counts'] == {
        'all': len(y)
    }
    json.dumps(found, allow_nan=False)


def test_a_row_holds_what_it_says():
    "Everything in a row of `evaluate`, recomputed from the networks with numpy."
    data = toy()
    test = toy(seed=5, n=70).renormalise(data.mean, data.std)
    s, clusters = set_of(data), dict(cluster=fit_clusters(data, test), reference_cluster=reference_clusters(test))
    row = evaluate(s, test, FAST, 3, 11, clusters, 'cpu', minimum=1)
    hits = []
    for k in range(3):
        net = train(s.x, s.y, 3, FAST, (11, k), 'cpu')
        with torch.no_grad(): hits.append((net((test.pixels() - s.mean) / s.std).argmax(1) == test.y).double().numpy())
    assert not np.array_equal(hits[0], hits[1])                                        # networks differ
    hit, y, group = np.mean(hits, 0), test.y.numpy(), test.group.numpy()
    assert row['accuracy'] == pytest.approx(hit.mean())
    by_group = {g: hit[group == i].mean() for i, g in enumerate(['many', 'few'])}
    assert (
        row['group_accuracy'] == pytest.approx(by_group)
        and row['worst_group_accuracy'] == pytest.approx(min(by_group.values()))
        and row['balanced_accuracy'] == pytest.approx(np.mean(list(by_group.values())))
    )
    assert row['group_counts'] == {'many': int((group == 0).sum()), 'few': int((group == 1).sum())}
    cells = {f'c{c}|{g}': hit[(y == c) & (group == i)].mean() for c in range(3) for i, g in enumerate(['many', 'few'])}
    assert row['class_group_accuracy'] == pytest.approx(cells)
    worst = min(cells, key=cells.get)
    n = row['class_group_counts'][worst]
    assert (
        row['worst_class_group_accuracy'] == pytest.approx(cells[worst])
        and row['worst_class_group']['name'] == worst
        and row['worst_class_group']['n'] == n
    )
    assert (row['worst_class_group']['low'], row['worst_class_group']['high']) == pytest.approx(
        wilson(cells[worst] * n, n)
    )
    # CVaR: the worst fifth of six cells is one and a fifth of a cell
    lowest = np.sort(list(cells.values()))
    assert row['tail_class_group_accuracy'] == pytest.approx((lowest[0] + .2 * lowest[1]) / 1.2)
    assert np.array(row['confusion']).sum() == 3 * 70 and np.trace(np.array(row['confusion'])) == sum(
        h.sum() for h in hits
    )
    for name, ids in clusters.items():
        minima = [min(h[ids.numpy() == c].mean() for c in np.unique(ids)) for h in hits]
        assert row[f'{name}_min_accuracy'] == pytest.approx(np.mean(minima))
    assert (
        (row['seed'], row['networks'], row['images']) == (11, 3, 12)
        and row['evaluation_seconds'] >= 0
        and row['evaluation_peak_mb'] >= 0
    )
    json.dumps(row, allow_nan=False)


def test_clusters_come_from_training_pixels_alone():
    data, test = toy(n=90), toy(n=50, seed=3)
    ids = fit_clusters(data, test)
    assert ids.shape == (50,) and torch.equal(ids, fit_clusters(data, test)) and len(ids.unique()) > 3
    part = torch.arange(10, 30)
    # the test set has no say in where they are
    assert torch.equal(fit_clusters(data, test.subset(part)), ids[part])
    centres = np.stack([data.x.flatten(1).numpy()[(fit_clusters(data, data) == c).numpy()].mean(0) for c in range(10)])
    expected = ((test.x.flatten(1).numpy()[:, None] - centres) ** 2).sum(2).argmin(1)
    # the centres are the means of what is nearest to them
    assert (ids.numpy() == expected).mean() > .95
    assert int(fit_clusters(data.subset(torch.arange(4)), test).max()) <= 3
    ours = reference_clusters(test).numpy()
    assert np.array_equal(ours, SklearnKMeans(10, random_state=0).fit_predict(test.x.flatten(1).numpy()))


# Intervals

@settings(max_examples=40)
@given(n=st.integers(1, 3000), share=st.floats(0, 1), confidence=st.sampled_from([.8, .9, .95, .99]))
def test_wilson_is_that_of_scipy(n, share, confidence):
    k = round(share * n)
    expected = stats.binomtest(k, n).proportion_ci(confidence, method='wilson')
    low, high = wilson(k, n, confidence)
    assert (
        (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
        and 0 <= low <= k / n + 1e-12
        and k / n <= high + 1e-12
        and high <= 1
    )


def test_wilson_of_fractions_lies_between():
    "Averages over networks are no whole numbers."
    lows, highs = zip(*(wilson(k / 4, 10) for k in range(41)))
    assert (
        list(lows) == sorted(lows) and list(highs) == sorted(highs) and lows[0] == 0 and highs[-1] == pytest.approx(1)
    )


numbers = st.floats(-1, 1, width=32)


@settings(max_examples=60)
@given(st.lists(numbers, min_size=2, max_size=9), st.sampled_from([.9, .95]))
def test_interval_is_that_of_scipy(values, confidence):
    found = interval(values, confidence)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                                # scipy warns of equal values
        expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert found['mean'] == pytest.approx(np.mean(values), abs=1e-12)
    if np.std(values) > 1e-6:
        assert (found['low'], found['high']) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found['low'] <= found['mean'] <= found['high']


def test_one_value_has_no_interval(): assert interval([.5]) == dict(mean=.5, low=None, high=None)


def rows_of(table, seeds=None):
    "Rows of a comparison from {method: [accuracy of each seed]}; the groups' accuracies follow from it."
    return [
        dict(
            method=m,
            seed=s,
            accuracy=a,
            worst_group_accuracy=a / 2,
            worst_class_group_accuracy=a / 4,
            group_accuracy=dict(many=a**2, few=a / 2),
            seconds=float(s),
        )
        for m, values in table.items()
        for s, a in zip((seeds or {}).get(m, range(99)), values)
    ]


@settings(max_examples=30)
@given(st.integers(2, 7), st.integers(0, 1000))
def test_paired_is_that_of_scipy(n, seed):
    rng = np.random.default_rng(seed)
    table = {m: rng.random(n) for m in ('rdd', 'kmeans', 'gradient', 'other')}
    rows = rows_of(table)
    rng.shuffle(rows)                                                                  # pairs go by seed, not by place
    found = {(r['method'], r['baseline'], r['metric']): r for r in paired(rows)}
    assert {k[1] for k in found} == {'kmeans', 'gradient'} and all(k[0] != k[1] for k in found)
    metrics = {
        'accuracy': lambda a: a,
        'worst_group_accuracy': lambda a: a / 2,
        'worst_class_group_accuracy': lambda a: a / 4,
        'group_accuracy|many': lambda a: a**2,
        'group_accuracy|few': lambda a: a / 2,
    }
    assert len(found) == (3 + 3) * len(metrics)
    for (m, b, metric), r in found.items():
        one, two = metrics[metric](table[m]), metrics[metric](table[b])
        expected = stats.ttest_rel(one, two).confidence_interval(.95)
        assert (r['difference'], r['low'], r['high']) == pytest.approx(
            ((one - two).mean(), expected.low, expected.high)
        ) and r['n_seeds'] == n


def test_only_shared_seeds_are_paired():
    rows = rows_of(
        dict(rdd=[0.5, 0.6, 0.9], kmeans=[0.3, 0.1], gradient=[0.2]), dict(rdd=[0, 1, 2], kmeans=[2, 1], gradient=[7])
    )
    found = {(r['baseline'], r['metric']): r for r in paired(rows) if r['method'] == 'rdd'}
    assert not [k for k in found if k[0] == 'gradient']
    r = found['kmeans', 'accuracy']
    assert r['n_seeds'] == 2 and r['difference'] == pytest.approx(((.9 - .3) + (.6 - .1)) / 2)
    alone = paired(rows_of(dict(rdd=[.5], kmeans=[.25])))
    assert all(r['low'] is None and r['high'] is None and r['n_seeds'] == 1 for r in alone) and len(alone) == 5
    assert paired(rows_of(dict(rdd=[.5, .6]))) == [] == paired([])


def test_summary():
    table = dict(b=[.5, .7], a=[.1, .2], c=[.9])
    found = summarise(rows_of(table)[::-1][::-1])
    assert [s['method'] for s in found] == ['b', 'a', 'c'] and [s['n_seeds'] for s in found] == [2, 2, 1]
    for s in found:
        values = np.array(table[s['method']])
        assert s['accuracy'] == accuracy_interval(values) and s['group_accuracy']['many'] == accuracy_interval(values**
                                                                                                               2)
        assert set(s['group_accuracy']) == {'many', 'few'}
        assert {k
                for k in s
                if k in METRICS} == {'accuracy', 'worst_group_accuracy', 'worst_class_group_accuracy', 'seconds'}
    assert summarise([]) == []


def test_costs_that_nobody_knows():
    "A set that was not made by `distill` has no seconds: the summary leaves them out, it does not say NaN."
    rows = [r | dict(seconds=None, peak_mb=None) for r in rows_of(dict(mine=[.5, .6]))]
    found, = summarise(rows)
    json.dumps(found, allow_nan=False)
    assert found['accuracy']['mean'] == pytest.approx(.55)


# The units of the images

@pytest.mark.parametrize('shape', [(1, 8, 8), (3, 8, 8)])
def test_test_images_come_in_the_units_of_the_set(shape):
    "Sets and test data may have been normalised with different numbers; what counts are the pixels."
    data, test = toy(shape=shape), toy(shape=shape, seed=9)
    s = set_of(data)
    row = evaluate(s, test, FAST, 1, 0, device='cpu')
    for mean, std in ((0., 1.), (.2, 3.), ([.1, .5, .9][:shape[0]], [.2, .3, .4][:shape[0]])):
        assert evaluate(s, test.renormalise(mean, std), FAST, 1, 0, device='cpu')['accuracy'] == row['accuracy']
        assert (
            evaluate(data, test.renormalise(mean, std), FAST, 1, 0, device='cpu')['accuracy']
            == evaluate(data, test, FAST, 1, 0, device='cpu')['accuracy']
        )
    raw = SyntheticDataset(s.pixels(), s.y, torch.zeros(1), torch.ones(1), s.classes)
    net = train(raw.x, raw.y, 3, FAST, (0, 0), 'cpu')
    expected = (predict(net, test.pixels()) == test.y).double().mean().item()
    assert evaluate(raw, test, FAST, 1, 0, device='cpu')['accuracy'] == pytest.approx(expected)


# Training

def test_the_same_twice_and_something_else_with_another_seed():
    data, test = toy(), toy(seed=1)
    s = set_of(data)
    drop = lambda row: {k: v for k, v in row.items() if not k.startswith('evaluation_')}
    torch.manual_seed(0)
    state, one = torch.get_rng_state(), drop(evaluate(s, test, FAST, 2, 0, device='cpu'))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert drop(evaluate(s, test, FAST, 2, 0, device='cpu')) == one
    parameters = [
        torch.cat([p.flatten() for p in train(s.x, s.y, 3, FAST, seed, 'cpu').parameters()]) for seed in (0, 0, 1)
    ]
    assert torch.equal(*parameters[:2]) and not torch.equal(*parameters[1:])
    for changes in (dict(augment='crop rotate'), dict(epochs=4), dict(lr=.01), dict(risk='cvar(tail=0.3)')):
        other = train(s.x, s.y, 3, Training(**vars(FAST) | changes), 0, 'cpu')
        assert not torch.equal(parameters[0], torch.cat([p.flatten() for p in other.parameters()]))


def test_training_learns_and_never_looks_at_groups():
    data = toy(n=120)
    net = train(data.x, data.y, 3, Training(width=8, epochs=25, batch=32), 0, 'cpu')
    assert not net.training and (predict(net, data.x) == data.y).double().mean() > .95
    for batch in (1, 7, 1000): assert torch.equal(predict(net, data.x, batch), predict(net, data.x))
    other = GroupedDataset(data.x, data.y, 1 - data.group, data.classes, data.groups, data.mean, data.std)
    a, b = (evaluate(d, toy(seed=2), FAST, 1, 0, device='cpu') for d in (data, other))
    assert a['class_group_accuracy'] == b['class_group_accuracy']


def test_every_sample_is_seen_in_every_epoch(monkeypatch):
    "Also the last, smaller batch; and the step size ends near zero."
    import rdd_nb.training as module
    seen, rates = [], []
    monkeypatch.setattr(module, 'augment', lambda x, **k: (seen.append(x.flatten(1)[:, 0].clone()), (x,))[1])
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        'step',
        lambda self, *a, **k: (rates.append(self.param_groups[0]['lr']), step(self, *a, **k))[1],
    )
    x, y = torch.arange(21.).view(-1, 1, 1, 1).expand(-1, 1, 8, 8) / 21, torch.arange(21) % 3
    train(x, y, 3, Training(width=4, epochs=4, batch=8, lr=.1), 0, 'cpu')
    assert [len(v) for v in seen] == [8, 8, 5] * 4
    epochs = [torch.cat(seen[3 * e:3 * e + 3]) for e in range(4)]
    assert all(torch.equal(e.sort().values, x[:, 0, 0, 0]) for e in epochs) and not torch.equal(*epochs[:2])
    np.testing.assert_allclose(
        rates, [0.05 * (1 + math.cos(math.pi * t / 12)) for t in range(12)], rtol=1e-6, atol=1e-12
    )


def test_the_risk_is_that_of_the_losses():
    "One step of full-batch training goes down the risk."
    data = toy(n=12)
    t = Training(
        width=4, epochs=1, batch=12, momentum=0.0, weight_decay=0.0, lr=0.1, risk='0.5*mean + 0.5*cvar(tail=0.25)'
    )
    net = train(data.x, data.y, 3, t, 0, 'cpu')
    import rdd_nb.models as models
    start = models.make_model('convnet', (1, 8, 8), 3, seed=('evaluation', 0), width=4)
    losses = torch.nn.functional.cross_entropy(start(data.x), data.y, reduction='none')
    (.5 * losses.mean() + .5 * losses.topk(3).values.mean()).backward()
    for a, b in zip(net.parameters(), start.parameters()):
        torch.testing.assert_close(a.detach(), b.detach() - 0.1 * b.grad, rtol=1e-4, atol=1e-6)
    assert t.risk == 0.5 * t.risk.parts[0][1] + 0.5 * CVaR(0.25) and json.loads(json.dumps(t.describe()))[
        'risk'
    ] == repr(t.risk)


@pytest.mark.parametrize('name', MODELS)
def test_every_architecture(name):
    data = toy(n=6)
    row = evaluate(data, toy(n=8), Training(name, epochs=1, batch=6), 1, device='cpu')
    assert 0 <= row['accuracy'] <= 1


def test_tables():
    x, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2
    x[:, 0] += 4 * y
    data = from_arrays(x, y)
    assert evaluate(data, data, Training('mlp', width=8, epochs=20, batch=10), 1, device='cpu')['accuracy'] > .9


# In blocks, in bfloat16, in processes, in one stack

def flat(parts): return torch.cat([p.detach().flatten() for p in parts])


@pytest.mark.parametrize('model', ['convnet', 'vgg11', 'vit'])
def test_blocks_give_the_gradient_of_the_batch(model, monkeypatch):
    import rdd_nb.training as module
    data, t = toy(n=18, shape=(3, 16, 16)), Training(model, width=8 if model == 'convnet' else None)
    net = t.network((3, 16, 16), 3, 0).eval()
    torch.nn.functional.cross_entropy(net(data.x), data.y).backward()
    whole = flat(p.grad for p in net.parameters())
    for block in (5, 100):
        monkeypatch.setattr(module, '_block', lambda x, t: block)
        net.zero_grad()
        module._backward(net, data.x, data.y, t)
        assert (flat(p.grad for p in net.parameters()) - whole).norm() < 1e-4 * whole.norm()


def test_where_blocks_are_used():
    from rdd_nb.training import _block
    large, digits = torch.zeros(100, 1, 28, 28), torch.zeros(100, 1, 8, 8)
    # the small digits go in one piece, as ever
    assert _block(large, Training()) == 20 and _block(digits, Training()) >= 100
    for t in (Training(norm='batch'), Training(risk='cvar(tail=0.2)')): assert _block(large, t) == 100
    assert _block(torch.zeros(50, 7), Training('mlp')) == 50


def test_batch_normalisation_sees_the_whole_batch():
    data = toy(n=24, shape=(1, 16, 16))
    t = Training(width=128, norm='batch', epochs=2, batch=24)
    net = train(data.x, data.y, 3, t, 0, 'cpu')
    assert not net.training and int(net.body[1].num_batches_tracked) == 2


def test_bfloat16_is_close_and_leaves_the_network_in_float32():
    data, test = toy(n=120), toy(n=300, seed=2)
    t = dict(width=8, epochs=15, batch=32)
    nets = [train(data.x, data.y, 3, Training(**t, precision=p), 0, 'cpu') for p in ('float32', 'bfloat16')]
    assert all(p.dtype == torch.float32 for p in nets[1].parameters()) and not torch.equal(
        *[flat(n.parameters()) for n in nets]
    )
    a, b = ((predict(n, test.x) == test.y).double().mean() for n in nets)
    assert abs(a - b) < .05 and a > .9


@pytest.mark.parametrize(
    'changes',
    [
        dict(),
        dict(norm='layer', depth=1),
        dict(norm='none'),
        dict(model='mlp'),
        dict(model='vit'),
        dict(augment='crop rotate scale'),
        dict(risk='cvar(tail=0.3)'),
    ],
    ids=str,
)
def test_a_stack_of_networks_is_the_networks_one_by_one(changes):
    data = toy(n=30)
    t = Training(**dict(width=8 if changes.get('model') != 'vit' else None, epochs=3, batch=12) | changes)
    alone, stack = [train(data.x, data.y, 3, t, (4, k), 'cpu') for k in range(3)], train_together(
        data.x, data.y, 3, t, [(4, k) for k in range(3)], 'cpu'
    )
    for a, b in zip(alone, stack):
        assert (
            not b.training and (flat(a.parameters()) - flat(b.parameters())).norm() < 1e-3 * flat(a.parameters()).norm()
        )
        assert torch.allclose(predict_scores(a, data.x), predict_scores(b, data.x), atol=1e-2)
    assert (flat(stack[0].parameters()) - flat(stack[1].parameters())).norm() > .1
    with pytest.raises(ValueError, match='batch'):
        train_together(data.x, data.y, 3, Training(norm='batch'), (0, 1), 'cpu')


def test_processes_give_the_same_row():
    data, test = toy(), toy(seed=1)
    one, two = (evaluate(set_of(data), test, FAST, 3, 0, device='cpu', jobs=jobs) for jobs in (1, 2))
    for row in (one, two): row.pop('evaluation_seconds'); row.pop('evaluation_peak_mb')
    assert one == two


# Soft labels

def test_soft_labels():
    data, test = toy(n=90), toy(n=300, seed=3)
    hard = train(data.x, data.y, 3, FAST, 0, 'cpu')
    same = train(data.x, torch.nn.functional.one_hot(data.y, 3).float(), 3, FAST, 0, 'cpu')
    assert torch.allclose(flat(hard.parameters()), flat(same.parameters()), atol=1e-5)
    s = set_of(data)
    # a teacher that errs: what is learned is what it says
    s.soft = torch.nn.functional.one_hot((s.y + 1) % 3, 3).float()
    t = Training(width=8, epochs=40, batch=16)
    row = evaluate(s, test, t, 1, device='cpu')
    assert (
        row['labels'] == 'soft'
        and row['accuracy'] < 0.2 < 0.7 < evaluate(set_of(data), test, t, 1, device='cpu')['accuracy']
    )
    assert row['bytes'] == s.x.numel() * 4 + s.soft.numel() * 4
    s.soft = .5 * s.soft + .5 * torch.nn.functional.one_hot(s.y, 3)
    calm = predict_scores(train(s.x, s.soft, 3, t, 0, 'cpu'), s.x).softmax(1)
    assert calm.max() < .75                                                            # nobody is surer than the labels


# What a row says

def test_the_row_tells_how_it_came_about():
    data, test = toy(), toy(n=400, seed=2)
    s = set_of(data, provenance=dict(bytes=1234, seconds=7.5, peak_mb=3., steps=200, method='mine'))
    row = evaluate(s, test, FAST, 3, 5, device='cpu', population=data)
    assert (row['bytes'], row['seconds'], row['peak_mb'], row['steps']) == (1234, 7.5, 3.0, 200) and evaluate(
        set_of(data), test, FAST, 1, device='cpu'
    )['bytes'] == 12 * 64 * 4 + 12
    assert (
        row['training'] == FAST.describe()
        and row['labels'] == 'hard'
        and row['test_hash'] == test.hash()
        and row['evaluation_steps'] == 3 * 3 * 1
    )
    assert [len(v) for v in (row['by_network']['accuracy'], row['by_network']['group_accuracy']['few'])] == [3, 3]
    assert np.mean(row['by_network']['accuracy']) == pytest.approx(row['accuracy']) and np.mean(
        row['by_network']['group_accuracy']['few']
    ) == pytest.approx(row['group_accuracy']['few'])
    # a quarter of the training images is odd
    shares = data.group.double().mean().item()
    assert row['class_counts'].keys() == {'c0', 'c1', 'c2'} and 0 <= row['ece'] <= 1 and shares == .25
    json.dumps(row, allow_nan=False)


def test_groups_too_small_are_named():
    data, test = toy(), toy(n=40, seed=2)
    with pytest.warns(NoiseWarning, match='fewer than 10 test samples'):
        row = evaluate(set_of(data), test, FAST, 1, device='cpu', minimum=10)
    assert (
        row['small']['class_group']
        and row['worst_class_group']['n'] >= 10
        and any('fewer than 10' in n for n in row['notes'])
    )


def test_corrupted_test_images():
    "Accuracy under a corruption is that on corrupted pixels, normalised afterwards."
    data, test = toy(), toy(n=90, seed=2).renormalise(.3, .5)
    s = set_of(data)
    row = evaluate(
        s,
        test,
        FAST,
        2,
        3,
        device='cpu',
        corruptions={'noise-5': lambda x: corrupt(x, 'noise-5'), 'upside down': lambda x: x.flip(2)},
    )
    nets = [train(s.x, s.y, 3, FAST, (3, k), 'cpu') for k in range(2)]
    for name, raw in (('noise-5', corrupt(test.pixels(), 'noise-5')), ('upside down', test.pixels().flip(2))):
        hit = np.mean([(predict(n, (raw - s.mean) / s.std) == test.y).double().numpy() for n in nets], 0)
        found = row['corruptions'][name]
        assert found['accuracy'] == pytest.approx(hit.mean())
        assert found['group_accuracy'] == pytest.approx(
            {g: hit[(test.group == i).numpy()].mean() for i, g in enumerate(test.groups)}
        ) and found['worst_group_accuracy'] == min(found['group_accuracy'].values())
    assert row['corruption_accuracy'] == pytest.approx(np.mean([c['accuracy'] for c in row['corruptions'].values()]))
    by_name = evaluate(s, test, FAST, 2, 3, device='cpu', corruptions='noise-5')
    assert by_name['corruptions'] == {'noise-5': row['corruptions']['noise-5']} and 'corruptions' not in evaluate(
        s, test, FAST, 1, device='cpu'
    )
    with pytest.raises(ValueError, match='noise'): evaluate(s, test, FAST, 1, device='cpu', corruptions='nois-5')


# Estimators


@pytest.mark.parametrize(
    'estimator',
    [
        KNeighborsClassifier(3),
        RandomForestClassifier(20, random_state=1),
        make_pipeline(StandardScaler(), LogisticRegression()),
        LinearSVC(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_estimators(estimator):
    data, test = toy(n=90), toy(n=300, seed=2)
    s = set_of(data, ipc=12)
    row = evaluate_estimator(
        estimator,
        s,
        test,
        repeats=2,
        clusters=dict(cluster=fit_clusters(data, test)),
        corruptions='noise-3',
        population=data,
    )
    with pytest.raises(Exception): estimator.predict(test.x.flatten(1).numpy())        # a clone was fitted
    assert (
        ('ece' in row) == hasattr(estimator, 'predict_proba')
        and row['labels'] == 'hard'
        and row['corruptions'].keys() == {'noise-3'}
    )
    if not isinstance(estimator, RandomForestClassifier):
        model = clone(estimator).fit(s.x.flatten(1).numpy(), s.y.numpy())
        expected = model.predict(((test.pixels() - s.mean) / s.std).flatten(1).numpy()) == test.y.numpy()
        assert row['accuracy'] == pytest.approx(expected.mean()) and row['group_accuracy']['few'] == pytest.approx(
            expected[test.group == 1].mean()
        )
        assert row['by_network']['accuracy'][0] == row['by_network']['accuracy'][1]
    # random states of their own, the same every time
    else:
        assert row['by_network']['accuracy'][0] != row['by_network']['accuracy'][1]
    again = evaluate_estimator(estimator, s, test, repeats=2)
    assert again['accuracy'] == row['accuracy'] and set(evaluate(s, test, FAST, 1, device='cpu')) - set(row) == {
        'evaluation_steps',
        'ece',
        'group_ece',
    } - set(row)
    json.dumps(row, allow_nan=False)


def test_soft_labels_are_weights_for_an_estimator():
    data, test = toy(n=60), toy(n=300, seed=2)
    s, model = set_of(data, ipc=6), LogisticRegression(C=.5, tol=1e-8, max_iter=2000)
    hard = evaluate_estimator(model, s, test)
    s.soft = torch.nn.functional.one_hot(s.y, 3).float()
    soft = evaluate_estimator(model, s, test)
    assert (hard['labels'], soft['labels']) == ('hard', 'soft') and hard['accuracy'] == soft['accuracy']
    # whatever the image: the shares are learned
    s.soft = torch.tensor([[.5, .25, .25]]).expand(len(s), 3)
    flat_answer = evaluate_estimator(model, s, test)
    assert flat_answer['class_accuracy']['c0'] == 1
    from rdd_nb.evaluation import _fitted, _for_estimator
    x, y, w, _ = _for_estimator(model, s)
    p = _fitted(model, x, y, w, 0, 3)(test.x)[1]
    assert torch.allclose(
        p.mean(0), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), atol=0.02
    ) and w.sum() == pytest.approx(len(s))
    assert evaluate_estimator(KNeighborsClassifier(1), s, test)['labels'] == 'hard'


def test_an_estimator_that_never_saw_a_class():
    data, test = toy(), toy(n=90, seed=1)
    s = SyntheticDataset(data.x[data.y != 1], data.y[data.y != 1], data.mean, data.std, data.classes)
    with pytest.warns(UserWarning, match='no samples of class c1'):
        row = evaluate_estimator(LogisticRegression(), s, test)
    assert row['class_accuracy']['c1'] == 0 and 0 <= row['ece'] <= 1
    with pytest.raises(ValueError, match='fit and predict'): evaluate_estimator(3, s, test)


# Architectures and places

def test_what_does_not_fit_costs_one_line():
    data, test = toy(), toy(n=60, seed=1)
    with pytest.warns(UserWarning) as said:
        rows = evaluate_architectures(
            set_of(data),
            test,
            {k: ARCHITECTURES[k] for k in ('ConvNet', 'ConvNet, batch norm', 'ConvNet, 4 blocks', 'MLP')}
            | dict(trees=DecisionTreeClassifier()),
            FAST,
            1,
            device='cpu',
            minimum=1,
            population=data,
        )
    assert [r['method'] for r in rows] == ['ConvNet', 'ConvNet, batch norm', 'ConvNet, 4 blocks', 'MLP', 'trees'] and [
        r['method'] for r in rows if 'error' in r
    ] == ['ConvNet, 4 blocks']
    assert any('at most 3' in str(w.message) and str(w.message).startswith('ConvNet, 4 blocks: ') for w in said)
    assert 'at most 3' in rows[2]['error'] and all('accuracy' in r for r in rows if 'error' not in r)
    assert all('adjusted_accuracy' in r for r in rows if 'error' not in r)
    other = SyntheticDataset(data.x, data.y, 0., 1., ['a', 'b', 'c', 'd'])
    with pytest.raises(ValueError, match='4 classes'):
        evaluate_architectures(other, test, {'ConvNet': {}}, FAST, 1, device='cpu')  # not the architecture's fault


def test_every_named_architecture_can_be_built():
    for shape, most in (((1, 8, 8), 1), ((1, 28, 28), 0), ((3, 32, 32), 0)):
        failed = 0
        for changes in ARCHITECTURES.values():
            try: Training(**changes).network(shape, 10, 0)
            except ValueError as e: failed += 1; assert '\n' not in str(e)
        assert failed == most


@pytest.mark.parametrize(
    'model, changes, size, words',
    [
        ('convnet', dict(depth=4), 8, ('convnet', '8x8', 'at most 3')),
        ('convnet', dict(), 1, ('convnet', '1x1', 'at most 0')),
        ('convnet', dict(depth=-1), 8, ('depth=-1', 'from 1 to')),
        ('mlp', dict(depth=-1), 8, ('depth=-1', 'from 1 to')),
        ('resnet18', dict(norm='instance'), 8, ('resnet18', '8x8', 'more than 8x8')),
        ('vgg11', dict(), 1, ('vgg11', '1x1', 'at least 2x2')),
        ('alexnet', dict(), 3, ('alexnet', '3x3', 'at least 4x4')),
        ('vit', dict(), 6, ('vit', '6x6', 'patch=4')),
        *[(m, dict(), None, (m, '(5,)', 'mlp')) for m in ('resnet18', 'vgg11', 'alexnet', 'vit')],
    ],
)
def test_networks_too_deep_for_an_image_say_so(model, changes, size, words):
    g = torch.Generator().manual_seed(0)
    data = from_arrays(torch.rand(6, *((1, size, size) if size else (5,)), generator=g), torch.arange(6) % 3)
    with pytest.raises(ValueError) as e: evaluate(data, data, Training(model, epochs=1, **changes), 1, device='cpu')
    assert one_line(e) and all(w in str(e.value) for w in words)


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('size', [(4, 4), (8, 8), (8, 16), (9, 9)], ids=str)
def test_a_network_that_can_be_built_sees_its_images(model, size):
    "What would be normalised away is a score that is the same for all images."
    if model == 'vit' and size != (4, 4) and size != (8, 8): pytest.skip('patches of four pixels')
    x = torch.randn(4, 1, *size, generator=torch.Generator().manual_seed(0))
    for norm in ('instance', 'batch', 'layer') if model in ('convnet', 'resnet18', 'vgg11') else (None,):
        if model == 'resnet18' and norm == 'instance' and max(size) <= 8: norm = None
        net = make_model(model, (1, *size), 3, norm=norm)
        assert net(x).std(0).max() > 2e-5, norm


def test_architectures_for_tables():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 5, generator=g), torch.arange(400) % 2
    x[:, 0] += 3 * y
    data = from_arrays(x, y, (torch.arange(400) % 4 == 0).long())
    entries = {'logistic regression': LogisticRegression(), 'MLP': dict(model='mlp')}
    rows = evaluate_architectures(
        data.subset(slice(0, 60)),
        data.subset(slice(60, 400)),
        entries,
        Training(epochs=20, batch=20),
        networks=1,
        device='cpu',
    )
    assert [r['method'] for r in rows] == list(entries) and min(r['accuracy'] for r in rows) > .85


# Input that does not fit

def test_missing_classes_are_a_warning():
    data, test = toy(), toy(seed=1)
    s = SyntheticDataset(data.x[data.y != 1][:6], data.y[data.y != 1][:6], data.mean, data.std, data.classes)
    with pytest.warns(UserWarning, match='no samples of class c1'): row = evaluate(s, test, FAST, 1, device='cpu')
    assert 0 <= row['accuracy'] <= 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        evaluate(set_of(data), toy(n=600, seed=1), Training(width=8, epochs=20, batch=16), 1, device='cpu')


@pytest.mark.parametrize(
    'make, word',
    [
        (lambda d: (d.x, d.y), 'tuple'),
        (lambda d: d.x, 'Tensor'),
        (lambda d: None, 'NoneType'),
        (lambda d: SyntheticDataset(d.x, d.y, d.mean, d.std, ['a', 'b', 'c', 'd']), '4 classes'),
        (lambda d: SyntheticDataset(d.x[:, :, :4], d.y, d.mean, d.std, d.classes), '(1, 4, 8)'),
        (lambda d: SyntheticDataset(d.x.flatten(1), d.y, 0.0, 1.0, d.classes), '(64,)'),
        (lambda d: SyntheticDataset(d.x, d.y, d.mean, d.std, ['c1', 'c0', 'c2']), 'c1'),
    ],
    ids=['tuple', 'tensor', 'none', 'classes', 'size', 'table', 'order of the classes'],
)
def test_sources_that_do_not_fit(make, word):
    with pytest.raises(ValueError) as e: evaluate(make(toy()), toy(seed=1), FAST, 1, device='cpu')
    assert one_line(e) and word in str(e.value)


def test_names_of_classes_may_be_missing_on_one_side():
    data = toy()
    s = SyntheticDataset(data.x, data.y, data.mean, data.std)
    assert (
        s.classes == ['0', '1', '2']
        and evaluate(s, data, FAST, 1, device='cpu')['accuracy']
        == evaluate(data, data, FAST, 1, device='cpu')['accuracy']
    )


@pytest.mark.parametrize(
    'kw, word',
    [
        (dict(networks=0), 'networks'),
        (dict(networks=-1), 'networks'),
        (dict(device='tpu'), 'device'),
        (dict(training=Training('convnettt')), 'convnettt'),
        (dict(training=Training(augment='flipp')), 'flipp'),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(kw, word):
    with pytest.raises(ValueError) as e:
        evaluate(toy(), toy(seed=1), **dict(training=FAST, networks=1, device='cpu') | kw)
    assert one_line(e) and word in str(e.value)


@pytest.mark.parametrize(
    'kw',
    [
        dict(epochs=0),
        dict(batch=0),
        dict(lr=0),
        dict(lr=-1),
        dict(lr=float('nan')),
        dict(epochs='many'),
        dict(epochs=2.5),
        dict(risk='cvr(.2)'),
        dict(risk=3),
        dict(risk='twolevel(mean, mean)'),
        dict(precision='float16'),
    ],
    ids=str,
)
def test_training_that_cannot_be_meant(kw):
    with pytest.raises(ValueError) as e: Training(**kw)
    assert one_line(e)


# Protocols of the field

def released_loop(net, x, y, epochs, lr=.01):
    "The loop of DC's `evaluate_synset`, from its description: one epoch more, a new optimiser at the drop."
    make = lambda lr: torch.optim.SGD(net.parameters(), lr, momentum=.9, weight_decay=5e-4)
    optimizer = make(lr)
    for epoch in range(epochs + 1):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        if epoch == epochs // 2 + 1: optimizer = make(lr / 10)
    return net


@pytest.mark.parametrize('epochs', [30, 31])
def test_dc_is_the_released_loop(epochs):
    data = toy(n=12)
    t = protocol('dc', 'cifar10', training=Training(width=4), epochs=epochs + 1)
    start = make_model('convnet', (1, 8, 8), 3, seed=('evaluation', 7), width=4)
    expected = released_loop(start, data.x, data.y, epochs)
    found = train(data.x, data.y, 3, t, 7, 'cpu')
    torch.testing.assert_close(flat(found.parameters()), flat(expected.parameters()), rtol=1e-3, atol=1e-5)
    smooth = train(data.x, data.y, 3, Training(**vars(t) | dict(schedule='cosine')), 7, 'cpu')
    assert (flat(smooth.parameters()) - flat(expected.parameters())).norm() > 10 * (
        flat(found.parameters()) - flat(expected.parameters())
    ).norm()


def test_rded_learns_what_the_teacher_says():
    "Whatever the labels of the set are; with half a cosine, and without decay of biases."
    data = toy(n=60)
    teacher = train(data.x, data.y, 3, Training(width=8, epochs=30, batch=16), 0, 'cpu')
    wrong = GroupedDataset(data.x, (data.y + 1) % 3, mean=data.mean, std=data.std, classes=data.classes)
    t = protocol('rded', training=Training(width=8), epochs=40, lr=.01)
    net = train(wrong.x, wrong.y, 3, t, 0, 'cpu', teacher)
    assert (predict(net, data.x) == predict(teacher, data.x)).double().mean() > .8
    row = evaluate(wrong, toy(seed=1), Training(width=8), 1, device='cpu', protocol='rded', teacher=teacher)
    assert row['labels'] == 'teacher' and row['training']['protocol'] == 'rded' and row['training']['batch'] == 50
    t = protocol('rded', training=Training(width=4), epochs=3)
    together = train_together(data.x, data.y, 3, t, (0, 1), 'cpu', teacher)
    alone = train(data.x, data.y, 3, t, 1, 'cpu', teacher)
    # scores, since AdamW moves even a bias whose gradient is rounding alone
    torch.testing.assert_close(predict_scores(together[1], data.x), predict_scores(alone, data.x), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match='teacher') as e:
        evaluate(wrong, toy(seed=1), FAST, 1, device='cpu', protocol='rded')
    assert one_line(e)


def test_a_protocol_is_chosen_by_the_data():
    for name in PROTOCOLS: assert protocol(name, 'mnist/test', training=Training('mlp', width=9)).width == 9
    assert [(protocol('dc', d).augment, protocol('dc', d).epochs) for d in ('mnist/test', 'MNIST', 'cifar10', '')] == [
        ('dc', 1001)
    ] * 2 + [('', 301)] * 2
    assert [protocol('rded', 'cifar10', ipc).batch for ipc in (1, 10, 50)] == [10, 50, 100]
    assert 'flip' not in str(protocol('rded', 'mnist')) and protocol('rded', 'cifar10').augment == 'flips'
    row = evaluate(set_of(toy()), toy(seed=1), FAST, 1, device='cpu', protocol='dc')
    assert (
        row['training'] == protocol('dc', 'toy', training=FAST).describe() | dict(protocol='dc')
        and row['evaluation_steps'] == 301
    )
    for kw in (dict(name='dd'), dict(name='dc', epochs=0), dict(name='dc', schedule='linear')):
        with pytest.raises(ValueError) as e: protocol(**kw)
        assert one_line(e)


def test_augmentations_of_the_field():
    "Every image moves by itself; what is moved out is lost, what comes in is the mean of the batch or zero."
    from rdd_nb.core import generator
    from rdd_nb.training import _augmented
    x = torch.zeros(200, 1, 28, 28)
    x[..., 10:18, 12:16] = 1
    out = _augmented(x, 'dc', generator(0))
    assert len(torch.unique(out.flatten(1), dim=0)) > 50 and out.min() > -.2
    # how far the bar comes up and down
    rows = [out[:, 0, r].amax(1) > .9 for r in range(28)]
    assert [bool(rows[r].any()) for r in (6, 7, 21, 22)] == [False, True, True, False]
    # the mean of the batch, or 0 where it was scaled
    corners = out[:, 0, 0, 0]
    assert (corners - x.mean()).abs().min() < 1e-4 and (corners.abs() < 1e-6).sum() > 40
    for name in ('dsa', 'dsa-digits', 'flips', 'dc', ''):
        y = _augmented(x, name, generator(1))
        assert y.shape == x.shape and torch.isfinite(y).all() and torch.equal(y, _augmented(x, name, generator(1)))
    with pytest.raises(ValueError, match='dsaa'): _augmented(x, 'dsaa', generator(1))


@pytest.mark.parametrize(
    'kw',
    [
        dict(optimizer='sgdd'),
        dict(schedule='linear'),
        dict(temperature=0),
        dict(epochs=10**22),
        dict(epochs=True and 0),
    ],
    ids=str,
)
def test_settings_of_protocols_out_of_range(kw):
    with pytest.raises(ValueError) as e: Training(**kw)
    assert one_line(e)


# Metrics of one's own, kept predictions, no groups

def test_own_metrics_and_kept_predictions(tmp_path):
    data, test = toy(), toy(n=70, seed=2)
    s, path = set_of(data), tmp_path / 'predictions.safetensors'
    seen = []
    metrics = dict(
        hit=lambda y, p, g: np.mean(y == p), few=lambda y, p, g: (seen.append((y, p, g)), np.mean((y == p)[g == 1]))[1]
    )
    row = evaluate(s, test, FAST, 2, device='cpu', metrics=metrics, keep=path)
    assert (
        row['metrics'] == pytest.approx(dict(hit=row['accuracy'], few=row['group_accuracy']['few'])) and len(seen) == 2
    )
    frame = read_predictions(path)
    assert frame.columns.tolist() == ['y', 'group', 'network 0', 'network 1'] and frame.y.tolist() == [
        test.classes[c] for c in test.y
    ]
    assert [(frame.y == frame[f'network {k}']).mean() for k in (0, 1)] == pytest.approx(row['by_network']['accuracy'])
    assert frame.group.tolist() == [test.groups[g] for g in test.group] and [p.name for p in tmp_path.iterdir()] == [
        path.name
    ]
    by_tree = evaluate_estimator(
        DecisionTreeClassifier(), s, test.without_groups(), keep=path, metrics=dict(g=lambda y, p, g: float(g is None))
    )
    assert read_predictions(path).columns.tolist() == ['y', 'network 0'] and by_tree['metrics'] == dict(g=1.)
    json.dumps(row, allow_nan=False)
    for bad in ('good', float('nan'), None, [1, 2]):
        with pytest.raises(ValueError, match=r"metrics\['m'\]") as e:
            evaluate(s, test, FAST, 1, device='cpu', metrics=dict(m=lambda y, p, g: bad))
        assert one_line(e)


def test_other_files_are_no_predictions(tmp_path):
    from rdd_nb.synthetic import save
    save(set_of(toy()), tmp_path / 's.safetensors')
    (tmp_path / 'b.safetensors').write_bytes(b'no')
    for name, error in (('s', ValueError), ('b', ValueError), ('c', FileNotFoundError)):
        with pytest.raises(error) as e: read_predictions(tmp_path / f'{name}.safetensors')
        assert one_line(e)


def test_without_groups_the_worst_is_a_class():
    row = evaluate(set_of(toy()), toy(n=90, seed=1, groups=False), FAST, 1, device='cpu')
    assert row['worst_class_group']['name'] == row['worst_class']['name'] and not any('|all' in n for n in row['notes'])
