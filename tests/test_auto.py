"Choosing a method without group labels: what it may see, what the criteria compute, and what a stopped choice leaves."
import json, re

import numpy as np
import pytest
import torch

from rdd_nb import auto
from rdd_nb.auto import PORTFOLIO, Answers, Criterion, Evidence, choose, distill_auto, distill_together, hold_out, judge
from rdd_nb.data import GroupedDataset, overlap
from rdd_nb.distill import distill
from rdd_nb.training import Training
from rdd_nb.methods import METHODS, as_method
from rdd_nb.sources import load_data

QUICK = dict(steps=3, batch='random(8)')
SMALL = {'k-center': 'k-center', 'distribution': as_method('distribution', **QUICK),
         'rdd-distance': as_method('rdd-distance', **QUICK)}
FAST = dict(portfolio=SMALL, training=Training(epochs=2), networks=1, draws=20, progress=False, device='cpu')


@pytest.fixture(scope='module')
def splits():
    "Digits 0 to 2, 30 training samples of each."
    whole = load_data('digits')
    def few(d, n): return d.subset(torch.cat([(d.y == c).nonzero()[:n, 0] for c in range(3)]))
    return [GroupedDataset(p.pixels(), p.y, p.group, ['0', '1', '2'], p.groups, name='few').renormalise(.5, .5)
            for p in (few(whole.train, 30), few(whole.val, 12))]


def evidence(scores, y, splits=(None, None)):
    return Evidence(*splits, {k: Answers(torch.as_tensor(s), torch.as_tensor(y)) for k, s in scores.items()})


# Work that is shared

def test_members_are_what_distill_makes(splits):
    trained = as_method('gradient', steps=3, batch='random(8)', network='convnet(life=2, steps=1)')
    methods = SMALL | {'k-center': METHODS['k-center'], 'trained': trained,
                       'errors': as_method('rdd-distance', **QUICK, clustering='kmeans(2, errors, steps=3)'),
               'errors again': as_method('rdd-distance', **QUICK, start='kcenter',
                                         clustering='kmeans(3, errors, steps=3)'),
               'other width': as_method('distribution', **QUICK, network=dict(width=8)),
                       'more steps': as_method('rdd-distance', **QUICK | dict(steps=5), start='kcenter')}
    found = distill_together(splits[0], methods, 2, 1, 'cpu', False)
    for name, m in methods.items():
        assert torch.equal(found[name].x, distill(splits[0], m, 2, 1, 'cpu', progress=False).x), name


def test_real_features_are_computed_once(splits, monkeypatch):
    from rdd_nb.models import Classifier
    seen, features = [], Classifier.features

    def counting(self, x):
        if not x.requires_grad: seen.append(len(x))
        return features(self, x)

    monkeypatch.setattr(Classifier, 'features', counting)
    same = {start: as_method('distribution', **QUICK, start=start) for start in ('kmeans', 'kcenter', 'random')}
    distill_together(splits[0], same, 2, 0, 'cpu', False)
    assert sum(seen) == 3 * 24      # 3 steps of 8 samples of 3 classes, not 3 times as many


# No group label

def test_groups_change_nothing(splits):
    train, val = splits
    options = FAST | dict(criterion='tail(0.2) + worstcluster(errors)')
    with_groups = choose(train, val, 2, **options)
    assert train.group is not None and train.group.any()
    without = choose(train.without_groups(), val.without_groups(), 2, **options)
    assert with_groups.scores == without.scores and with_groups.support == without.support
    assert with_groups.name == without.name and with_groups.asked == without.asked


@pytest.mark.parametrize('criterion', ['tail', 'sharedtail', 'mistakes(2, 3, 1)', 'worstcluster',
                                       'worstcluster(features)'])
def test_criteria_are_not_shown_groups(splits, criterion, monkeypatch):
    seen = []

    class Watching(auto.MeanCriterion):
        def scores(self, e, p):
            seen.append((e.train.group, e.val.group))
            return Criterion.read(criterion).scores(e, p)

    choose(*splits, 2, **FAST | dict(criterion=Watching()))
    assert seen == [(None, None)]
    del Criterion.known['watching']


@pytest.mark.parametrize('name', ['group-balanced', 'fairdd', 'cobra'])
def test_a_candidate_that_sees_groups_is_refused(splits, name):
    with pytest.raises(ValueError, match='sees group labels'):
        choose(*splits, 2, **FAST | dict(portfolio=SMALL | {name: name}))


# What the criteria compute

def planted(n=200, rare=.1):
    "Candidate A knows the usual and not the rare, B both a little less well; B has the larger mean loss."
    y, few = np.zeros(n, dtype=int), int(rare * n)
    a, b = np.zeros((1, n, 2)), np.zeros((1, n, 2))
    a[..., 0], b[..., 0] = 6, 1.2
    a[:, :few, 0] = -.5
    return evidence(dict(A=a, B=b), y)


def test_the_mean_follows_the_majority_and_the_tail_does_not():
    s = judge(planted(), 'mean')[0]
    assert s['A'] < s['B']
    for criterion in ('tail(0.1)', 'tail(0.2, doubt)', 'sharedtail(0.1, doubt)'):
        s = judge(planted(), criterion)[0]
        assert s['B'] < s['A'], criterion


def test_tail_is_the_mean_of_each_candidates_worst():
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=(2, 40, 3)), rng.integers(0, 3, 40)
    p = np.exp(scores) / np.exp(scores).sum(2, keepdims=True)
    loss = -np.log(p[:, np.arange(40), y]).mean(0)
    found, _, _ = judge(evidence(dict(A=scores, B=scores[:, :, ::-1].copy()), y), 'tail(0.25)')
    assert found['A'] == pytest.approx(np.sort(loss)[-10:].mean())
    errors, _, _ = judge(evidence(dict(A=scores, B=scores), y), 'mean(error)')
    assert errors['A'] == pytest.approx((scores.argmax(2) != y).mean())


def test_the_shared_tail_looks_at_the_same_samples():
    y, scores = [0] * 10, np.zeros((2, 1, 10, 2))
    scores[0, 0, 0, 1], scores[1, 0, 1, 1], scores[:, 0, 2, 1] = 3, 3, 2       # own failures, and one of both
    found, _, _ = judge(evidence(dict(A=scores[0], B=scores[1]), y), 'sharedtail(0.1)')
    assert found['A'] == found['B'] == pytest.approx(np.log(1 + np.exp(2)))


def test_mistakes_weigh_by_the_loss_of_the_early_networks(splits):
    train, val = splits
    class Early(torch.nn.Module):
        "Knows class 0 and confuses the others."
        def __init__(self, sure): super().__init__(); self.sure = torch.nn.Parameter(torch.tensor([sure, 0., 0.]))
        def forward(self, x): return self.sure.expand(len(x), 3)

    right = torch.nn.functional.one_hot(val.y, 3).double() * 9
    a, b = right.clone(), right.clone()
    a[val.y == 1] = 0           # A fails where the early networks fail, B where they do not
    b[val.y == 0] = 0
    e = evidence(dict(A=a[None].numpy(), B=b[None].numpy()), val.y, splits)
    e.kept |= {(80, k): Early(s) for k, s in enumerate((2., 3., 4.))}
    assert judge(e, 'mean')[0]['A'] == pytest.approx(judge(e, 'mean')[0]['B'], rel=.2)
    found = {power: judge(e, f'mistakes({power}, of=doubt)')[0] for power in (1, 2)}
    assert found[1]['A'] > 2 * found[1]['B'] and found[2]['A'] / found[2]['B'] > found[1]['A'] / found[1]['B']
    early = torch.stack([e.kept[80, k](val.x).detach() for k in range(3)]).log_softmax(2)
    w = -early[:, torch.arange(len(val)), val.y].mean(0).double()
    by_hand = (w * e.answers['A'].measured('doubt')).sum() / w.sum()
    assert found[1]['A'] == pytest.approx(float(by_hand), rel=1e-5)
    assert judge(e, 'mistakes(0)')[0]['A'] == pytest.approx(judge(e, 'mean')[0]['A'])


def test_the_early_networks_see_training_data_only(splits):
    train, val = splits
    e, other = Evidence(train, val, {}), Evidence(train, val.subset([0, 1, 2]), {})
    one, same, next_one = e.reference(3, 0), other.reference(3, 0), e.reference(3, 1)
    assert e.reference(3, 0) is one
    for p, q, r in zip(*(n.state_dict().values() for n in (one, same, next_one))): assert torch.equal(p, q)
    assert not all(torch.equal(p, r) for p, r in zip(one.parameters(), next_one.parameters()))


def test_the_worst_cluster_is_fitted_on_training_data_only(splits):
    train, val = splits
    e = Evidence(train, val, {})
    ids = auto.frozen_clusters(e, 'pixels', 2, 'classes')
    one = [Evidence(train, val.subset([i]), {}) for i in range(len(val))]
    alone = torch.cat([auto.frozen_clusters(o, 'pixels', 2, 'classes') for o in one])
    assert torch.equal(ids, alone) and torch.equal(ids // 2, val.y) and len(ids.unique()) > 3


def test_the_worst_cluster_by_hand(splits):
    train, val = splits
    wrong = torch.nn.functional.one_hot(val.y, 3).double()
    wrong[::3] = wrong[::3].roll(1, 1)
    e = Evidence(train, val, dict(A=Answers(wrong[None], val.y), B=Answers(wrong[None], val.y)))
    ids, error = auto.frozen_clusters(e, 'pixels', 2, 'classes'), (wrong.argmax(1) != val.y).double()
    worst = max(float(error[ids == c].mean()) for c in ids.unique())
    assert judge(e, 'worstcluster(pixels, 2, 0.001, within=classes)')[0]['A'] == pytest.approx(worst)
    assert judge(e, 'worstcluster(pixels, 2, 1)')[0]['A'] == pytest.approx(float(error.mean()))


def test_text_form():
    for text in ('mean', 'tail(0.2, error)', "worstcluster('features', 4) + 0.5*tail", '0.5*(mean + tail)'):
        c = Criterion.read(text)
        assert Criterion.read(repr(c)) == c
    assert Criterion.read('0.5*(mean + tail)').parts == Criterion.read('0.5*mean + 0.5*tail').parts


# How sure it is

def test_regret_and_support():
    scores, support, regret = judge(planted(), 'tail(0.1)')
    assert support == dict(A=0, B=1) and regret == 0
    y, close = [0] * 50, np.random.default_rng(1).normal(size=(1, 50, 2))
    _, support, regret = judge(evidence(dict(A=close, B=close[:, ::-1].copy()), y), 'mean')
    assert sum(support.values()) == pytest.approx(1) and regret > 0 and min(support.values()) > 0


def test_bootstrap_weights():
    w = auto._weights(30, 50, 0)
    assert torch.allclose(w.sum(1), torch.ones(51, dtype=torch.double)) and (w[0] == 1 / 30).all()
    assert ((w * 30).round() - w * 30).abs().max() < 1e-9 and len(w.unique(dim=0)) == 51


def test_halving_keeps_the_best_half(splits):
    four = SMALL | {'kmeans': 'kmeans'}
    found = choose(*splits, 2, **FAST | dict(portfolio=four), rounds=(.4, .7, 1))
    first, second, third = (r['scores'] for r in found.rounds)
    assert set(second) == set(sorted(first, key=first.get)[:2]) == set(third) == set(found.support)
    assert found.name == min(third, key=third.get) and found.scores == first | second | third


# Files

def test_a_run_keeps_its_choice(splits, tmp_path, monkeypatch):
    train, val = splits
    data = type('Splits', (), dict(train=train, val=val))
    made = distill_auto(data, dict(name='few'), 2, 0, out=tmp_path/'run', **FAST)
    kept = json.loads((tmp_path/'run/auto.json').read_text())
    assert kept['name'] in SMALL and set(kept['scores']) == set(SMALL) and kept['held_out'] == 0
    assert kept['method'] == as_method(SMALL[kept['name']]).describe() and made.provenance['method'] == 'auto'
    assert torch.equal(made.x, distill(train, SMALL[kept['name']], 2, 0, 'cpu', progress=False).x)
    assert [p.name for p in tmp_path.iterdir()] == ['run']
    monkeypatch.setattr(auto, '_round', lambda *_: pytest.fail('chosen again'))
    again = distill_auto(data, dict(name='few'), 2, 0, out=tmp_path/'run', resume=True, **FAST)
    assert torch.equal(again.x, made.x) and kept == json.loads((tmp_path/'run/auto.json').read_text())
    with pytest.raises(ValueError, match='resume=True'): distill_auto(data, None, 2, 0, out=tmp_path/'run', **FAST)
    with pytest.raises(ValueError, match='another criterion'):
        distill_auto(data, None, 2, 0, out=tmp_path/'run', resume=True, **FAST, criterion='mean')


def test_a_stop_after_the_choice(splits, tmp_path, monkeypatch):
    data = type('Splits', (), dict(train=splits[0], val=splits[1]))
    with monkeypatch.context() as m:
        def stop(*_, **__): raise KeyboardInterrupt
        m.setattr(auto, 'distill', stop)
        with pytest.raises(KeyboardInterrupt): distill_auto(data, None, 2, 0, out=tmp_path/'run', **FAST)
    assert [p.name for p in tmp_path.iterdir()] == ['.run.auto.json']
    monkeypatch.setattr(auto, '_round', lambda *_: pytest.fail('chosen again'))
    distill_auto(data, None, 2, 0, out=tmp_path/'run', resume=True, **FAST)
    assert [p.name for p in tmp_path.iterdir()] == ['run'] and (tmp_path/'run/auto.json').exists()


def test_training_data_alone(splits, tmp_path, capsys):
    train = splits[0]
    fit, val = hold_out(train, 3)
    assert len(fit) + len(val) == len(train) and overlap(fit, val) == 0 and fit.group is val.group is None
    made = distill_auto(train, None, 2, 0, out=tmp_path/'run', **FAST | dict(progress=True))
    assert f'{len(hold_out(train)[1])} of {len(train)} training samples are held out' in capsys.readouterr().out
    assert json.loads((tmp_path/'run/auto.json').read_text())['held_out'] == len(hold_out(train)[1])
    assert made.provenance['data_hash'] == train.hash()      # the set itself is made from all of them


@pytest.mark.parametrize('changes, message', [
    (dict(portfolio={'kmeans': 'kmeans'}), 'portfolio=.*at least two'),
    (dict(portfolio=SMALL | {'x': 'nothing'}), "method='nothing' is not known"),
    (dict(criterion='tial(0.1)'), "did you mean 'tail'"),
    (dict(criterion='tail(2)'), r'tail=2: expected a number in \(0, 1\]'),
    (dict(criterion='tail(0.1, mean)'), "of=.*choose from loss, doubt, error"),
    (dict(rounds=(.5, .25)), 'rounds=.*growing shares'),
    (dict(rounds=()), 'rounds=.*growing shares'),
    (dict(networks=0), 'networks=0'),
    (dict(draws=1), 'draws=1'),
])
def test_refusals(splits, changes, message, monkeypatch):
    monkeypatch.setattr(auto, '_round', lambda *_: pytest.fail('work was done'))
    with pytest.raises(ValueError, match=message) as e: choose(*splits, 2, **FAST | changes)
    assert '\n' not in str(e.value) and len(str(e.value)) <= 300


def test_validation_data_must_fit(splits):
    train, val = splits
    for other in (val.subset([]), GroupedDataset(val.pixels(), val.y, classes=['a', 'b', 'c']), None):
        with pytest.raises(ValueError, match='^val=.*expected validation samples'): choose(train, other, 2, **FAST)


def test_other_units_are_brought_to_those_of_the_training_data(splits):
    train, val = splits
    assert choose(train, val.renormalise(0, 1), 2, **FAST).scores == pytest.approx(choose(train, val, 2, **FAST).scores)


def test_the_default_portfolio_is_blind_and_distinct():
    assert 6 <= len(PORTFOLIO) <= 10 and len(set(map(repr, PORTFOLIO.values()))) == len(PORTFOLIO)
    assert not any(m.sees_groups for m in PORTFOLIO.values())
    assert re.fullmatch(r'[a-z -]+(, [a-z -]+)*', ', '.join(PORTFOLIO))
