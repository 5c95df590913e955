"""Every setting of every method either acts or is refused, named methods are described, and random combinations end
in a result or in one line."""
import dataclasses
import functools
import os
import random

import pytest
import torch

from rdd_nb.compare import FULL
from rdd_nb.data import from_arrays
from rdd_nb.distill import Distiller, distill
from rdd_nb.matching import Batch
from rdd_nb.methods import CARDS, METHODS, Method, Network, as_method, idle, name_method


def toy(n=60, classes=3, side=8):
    "A few noisy images per class, every fifth of them inverted, with groups."
    g = torch.Generator().manual_seed(0)
    y, odd = torch.arange(n) % classes, torch.arange(n) % 5 == 0
    means, noise = (torch.rand(k, 1, side, side, generator=g) for k in (classes, n))
    raw = (means[y] * .7 + .3 * noise).clamp(0, 1)
    raw[odd] = 1 - raw[odd]
    return from_arrays(raw, y, odd.long(), groups=['many', 'few'], name='toy')


TOY = toy()


def small(m):
    "The method at toy size: steps, networks and batches as small as they can act."
    still, small = set(idle(m)), {}
    if name := next((n for n in ('start', 'labels') if getattr(getattr(m, n), 'steps', None)), None):
        small[name] = dict(steps=8)
    if name: small['labels'] = dict(steps=8)
    plan = {k: v for k, v in dict(width=4, batch=16, life=min(m.network.life, 3)).items()
            if f'network.{k}' not in still}
    if plan: small['network'] = plan
    if 'batch' not in still: small['batch'] = dict(size=6)
    if m.objective is not None: small['steps'] = 5
    if repr(m.objective).startswith('Trajectory'):
        small['objective'] = 'trajectory(experts=1, epochs=3, student_steps=2, epoch_steps=2)'
    if repr(m.objective).startswith('BatchNorm'): small['objective'] = 'batchnorm(steps=5, width=4)'
    if repr(m.objective).startswith('Unrolled'): small['objective'] = 'unrolled(steps=2, lr=0.1)'
    return as_method(m, **small)


def outcome(m, **kw):
    "Everything that a method makes: samples and labels."
    s = distill(TOY, m, 2, device='cpu', progress=False, **kw)
    return s.x if s.soft is None else torch.cat([s.x.flatten(), s.soft.flatten()])


@functools.cache
def unchanged(name): return outcome(small(METHODS[name]))


# Another value for each setting, which has to change what comes out
OTHER = dict(
    objective=lambda m: 'distribution' if 'Gradient' in repr(m.objective) else 'gradient',
    clustering=lambda m: 'kmeans(5)',
    risk=lambda m: 'twolevel(cvar(0.3), max)' if m.risk is not None and m.risk.needs_groups else 'cvar(0.3)',
    risk_at=lambda m: 'target' if m.risk_at == 'network' else 'network',
    start=lambda m: 'random' if repr(m.start) != 'RandomSelection()' else 'herding',
    base=lambda m: 'density' if m.base == 'uniform' else 'uniform',
    prior=lambda m: 'frequencies(0.5)',
    labels=lambda m: 'teacher(4)' if repr(m.labels) == 'HardLabels()' else 'hard',
    steps=lambda m: m.steps + 2,
    lr=lambda m: m.lr * 1.5,
    optimizer=lambda m: 'adam' if 'Sgd' in repr(m.optimizer) else 'sgd',
    batch=lambda m: dict(size=4),
    augment=lambda m: 'crop' if not m.augment else 'scale',
)
NETWORK = dict(model='mlp', width=6, life=2, steps=3, lr=.3, batch=7, mix=.9)
OTHER |= {f'network.{k}': lambda m, k=k, v=v: {k: v} for k, v in NETWORK.items()}


@pytest.mark.parametrize('setting', OTHER)
@pytest.mark.parametrize('name', METHODS)
def test_a_setting_acts_or_is_refused(name, setting):
    "Every method x every setting: refused in one line, or the samples or labels change."
    m = small(METHODS[name])
    field = setting.split('.')[0]
    try: changed = as_method(m, **{field: OTHER[setting](m)})
    except ValueError as e:
        assert '\n' not in str(e) and len(str(e)) < 300
        if setting in idle(m) and field not in ('clustering', 'objective', 'risk', 'risk_at'):
            assert 'no effect' in str(e), str(e)
        return
    assert changed != m
    try: after = outcome(changed)
    except ValueError as e:
        assert '\n' not in str(e) and len(str(e)) < 300
        return
    before = unchanged(name)
    assert before.shape != after.shape or not torch.equal(before, after), f'{setting} is accepted and changes nothing'


def test_what_is_idle_changes_nothing():
    "The other direction: settings that are called idle may be set behind the check's back, and nothing changes."
    for name in ('gradient', 'distribution', 'trajectory', 'batch-norm', 'kmeans', 'patches', 'unrolled'):
        m = small(METHODS[name])
        plain = unchanged(name)
        for setting in set(idle(m)) & set(OTHER) - {'clustering', 'risk', 'risk_at'}:
            field, value = setting.split('.')[0], OTHER[setting](m)
            if isinstance(value, dict): value = getattr(m, field).replace(**value)
            elif field == 'optimizer': value = type(m.optimizer).known[value]()
            forced = dataclasses.replace(m)
            object.__setattr__(forced, field, value)
            assert torch.equal(outcome(forced), plain), f'{name}: {setting} is called idle and acts'


# The list of settings that did nothing at all before they were refused

@pytest.mark.parametrize('settings, why', [
    (dict(method='gradient', risk='twolevel(mean, max)', risk_at='network', clustering='kmeans(2)',
          network='convnet(steps=2)'), 'network.life to 2 or more'),
    (dict(method='gradient', risk='twolevel(mean, max)', risk_at='network', network='convnet(life=9)'),
     'network.steps to 1 or more'),
    (dict(method='kernel', objective='kernel(linear)', risk='mean', risk_at='network'), 'does not look at networks'),
    (dict(method='kernel', objective='kernel(rbf)', risk='mean', risk_at='network'), 'does not look at networks'),
    (dict(method='trajectory', base='density'), 'does not look at batches'),
    (dict(method='batch-norm', base='density'), 'does not look at batches'),
    (dict(method='trajectory', batch='representative(8)'), 'does not look at batches'),
    (dict(method='batch-norm', batch='random(8)'), 'does not look at batches'),
    (dict(method='gradient', risk='cvar(0.2)', risk_at='target', clustering='kmeans(2)'),
     'looks at samples, not at clusters'),
    (dict(method='distribution', clustering='kmeans(2)'), 'there is no risk'),
    (dict(method='distribution', network='convnet(steps=2)'), 'replaced before what it learns'),
    (dict(method='kmeans', augment='crop'), 'nothing is trained'),
    (dict(method='kmeans', network='mlp'), 'no network of this plan is used'),
])
def test_settings_that_cannot_act_are_refused(settings, why):
    with pytest.raises(ValueError, match='.*'.join(why.split())) as e: as_method(**settings)
    assert len(str(e.value)) < 300 and '\n' not in str(e.value)


# Cards

def test_every_name_has_a_card():
    assert CARDS.keys() == METHODS.keys() | FULL.keys()
    for name, card in CARDS.items():
        assert card.description.endswith('.') and len(card.description) > 20
        assert card.plain is None or card.plain in CARDS and card.plain != name
        m = METHODS.get(name)
        told = f'{name} and its plain counterpart'
        if m is not None: assert (card.plain is not None) == (m.risk is not None or m.base != 'uniform'), told
        if name.startswith(('rdd', 'fairdd', 'cobra')): assert card.cite


def test_a_name_of_your_own():
    try:
        name_method('mine', as_method('distribution', risk='max', risk_at='distance'), 'The worst cluster alone.',
                    'distribution', 'this test')
        s = distill(TOY, 'mine', 2, steps=2, device='cpu', progress=False, network=dict(width=4))
        assert s.provenance['method'].startswith('mine')
    finally: del METHODS['mine'], CARDS['mine']


# Random combinations

TEXTS = dict(
    objective=[None, 'gradient', 'gradient(l2)', 'gradient(l1)', 'distribution', 'moments', 'moments(diagonal=True)',
               'characteristic(frequencies=8)', 'mmd', 'mmd(linear)', 'mmd(unbiased=True)',
               'kernel', 'kernel(linear)', 'kernel(rbf)', "kernel(criterion='cross-entropy')",
               'unrolled(2)', 'unrolled(2, checkpoint=False)',
               'trajectory(1, 2, 1, 2, epoch_steps=2)', 'trajectory(1, 2, 1, 2, epoch_steps=2, grow=True)',
               'batchnorm(steps=3, width=4)', 'gradient(l7)', 'nothing'],
    clustering=[None, None, 'nearest', 'nearest(moving=False)', 'kmeans', 'kmeans(2)', 'kmeans(2, errors, steps=3)',
                'kmeans(3, features, steps=3)', 'groups', 'sklearn(DBSCAN, eps=3.0)',
                'sklearn(AgglomerativeClustering, n_clusters=2)', 'kmeans(99)', 'given(nowhere.npy)', 'sklearn(Ward)'],
    risk=[None, None, 'mean', 'max', 'cvar(0.3)', '0.5*mean + 0.5*cvar(0.3)', 'twolevel(mean, max)',
          'twolevel(cvar(0.5), mean)', 'entropic(2.0)', 'evar(0.3)', 'groupdro(6)', 'cvar(3)'],
    risk_at=[None, None, 'network', 'target', 'distance', 'pixels'],
    start=['kmeans', 'random', 'herding', 'kcenter', 'stratified', 'groups', 'patches(3)', 'patches(3, 2)', 'noise'],
    base=['uniform', 'density'],
    prior=['pixels', 'multiformation(2)', 'frequencies(0.5)', 'lowrank(3)', 'lowrank(9999)', 'multiformation(99)'],
    labels=['hard', 'hard', 'learned', 'teacher(3)'], steps=[0, 1, 2, 3], lr=[.01, 1., 1e30, 0],
    optimizer=['sgd', 'adam', 'sgd(0)', 'adam(0)'],
    batch=['random(4)', 'random(500)', 'representative(3)'], augment=['', 'crop scale', 'flip'],
    network=['convnet(width=4)', 'convnet(width=4, life=2, steps=1)', 'mlp(width=4)',
             'mlp(width=4, life=3, steps=1, mix=0.5)', 'vit(life=2)', 'convnet(width=4, batch=8)', 'convnet(depth=3)'],
)
DRAWS = int(os.environ.get('RDD_NB_DRAWS', 600))             # more, or with another seed, on demand
SEED = int(os.environ.get('RDD_NB_DRAW_SEED', 0))


@pytest.mark.parametrize('part', range(6))
def test_random_combinations_end_in_a_result_or_in_one_line(part, tmp_path):
    "A few changed fields of a named method, or all at once: never another exception, and a refusal leaves no folder."
    draw, ends = random.Random(f'{SEED} {part}'), dict(result=0, refused=0)
    for k in range(DRAWS // 6):
        base = draw.choice([None, *METHODS])
        fields = draw.sample(list(TEXTS), len(TEXTS) if base is None else draw.randint(1, 4))
        settings, out = {f: draw.choice(TEXTS[f]) for f in fields}, tmp_path/f'{k}'
        try:
            m = Method(**settings) if base is None else as_method(small(METHODS[base]), **settings)
            s = distill(TOY if draw.random() < .8 else TOY.without_groups(), m, draw.choice([1, 2, 5]), device='cpu',
                        progress=False, out=out)
        except ValueError as e:
            ends['refused'] += 1
            assert '\n' not in str(e) and len(str(e)) <= 300, (base, settings, str(e))
            assert not out.exists(), (base, settings)
        except Exception as e: raise AssertionError(f'{base} with {settings}: {type(e).__name__}: {e}') from e
        else:
            ends['result'] += 1
            assert torch.isfinite(s.x).all() and (out/'synthetic.safetensors').exists()
    assert min(ends.values()) >= DRAWS // 60, ends


def test_numbers_of_the_command_line_are_whole():
    "A bool or a float is no whole number, and a huge one is refused before anything is allocated."
    for settings in (dict(network=dict(width=True)), dict(network=dict(width=10**7)), dict(steps=True),
                     dict(batch=dict(size=1.5)), dict(network=dict(life=float('nan')))):
        with pytest.raises(ValueError, match='expected a whole number'): as_method('gradient', **settings)
    assert Network(width=8) == Network.read('convnet(width=8)')


# Batches that draw equally many of each cluster, and the real side in bfloat16

def test_a_balanced_batch_has_as_many_of_each_cluster_and_weighs_them_by_their_share():
    run = Distiller(TOY, as_method('rdd-distance', clustering='groups', batch='balanced(8)',
                                    network=dict(width=4)), 2, device='cpu')
    index, share = run.method.batch.draw(run, torch.Generator().manual_seed(0))
    pairs = torch.stack([TOY.y[index], TOY.group[index]]).unique(dim=1, return_counts=True)[1]
    assert pairs.tolist() == [4] * 6 and (TOY.y[index].diff() >= 0).all()
    of_few = share[TOY.group[index] == 1].sum() / 3
    assert torch.isclose(of_few, (TOY.group == 1).float().mean())


@pytest.mark.parametrize('at, risk', [('distance', '0.5*mean + 0.5*cvar(0.5)'), ('target', 'twolevel(mean, mean)')])
def test_a_balanced_batch_of_all_samples_is_a_random_one(at, risk):
    how = dict(risk=risk, risk_at=at, clustering='kmeans(2)', steps=3, network=dict(width=4))
    one, two = (distill(TOY, 'distribution', 2, device='cpu', progress=False, batch=b, **how)
                for b in ('balanced(1000)', 'random(1000)'))
    assert (one.x - one.initial).abs().max() > .01 and torch.allclose(one.x, two.x, atol=1e-4)


@pytest.mark.parametrize('changes', [dict(clustering='nearest'), dict(risk=None)])
def test_a_balanced_batch_without_fixed_clusters_is_refused(changes):
    with pytest.raises(ValueError, match='needs clusters that stay as they are'):
        as_method('rdd-distance', batch='balanced(8)', **changes)


@pytest.mark.parametrize('method', ['rdd-distance', 'gradient', 'kernel'])
def test_bfloat16_on_the_real_side_changes_little(method):
    how = dict(steps=2, device='cpu', progress=False)
    one, two = (distill(TOY, method, 2, network=dict(width=4, precision=p), **how) for p in ('float32', 'bfloat16'))
    moved = (one.x - one.initial).norm()
    assert 0 < (one.x - two.x).norm() < .1 * moved
    for other in 'trajectory', 'unrolled', 'batch-norm':
        with pytest.raises(ValueError, match='precision.*no effect'):
            as_method(other, network=dict(precision='bfloat16'))


ONCE = dict(steps=6, network=dict(width=4, life=4, once=True), device='cpu', progress=False)


@pytest.mark.parametrize('method, changes', [
    ('rdd-distance', {}), ('cobra', dict(augment='crop')), ('density', {}), ('characteristic', {}), ('mmd', {}),
    ('gradient', dict(network='convnet(width=4, life=4, once=True)'))])
def test_real_statistics_that_serve_a_network_are_those_it_would_compute_again(method, changes, monkeypatch):
    calls, whole = [], distill(TOY, method, 2, **ONCE | changes)
    def again(self, name, make):
        calls.append(name)
        return make()
    monkeypatch.setattr(Batch, 'once', again)
    assert torch.equal(distill(TOY, method, 2, **ONCE | changes).x, whole.x) and calls.count('real') == 6
    monkeypatch.undo()
    steps, plan = 6, as_method(method, **{k: v for k, v in (ONCE | changes).items() if k in ('network', 'augment')})
    real, statistic = [], type(plan.objective).statistic
    def counted(self, net, x, *rest):
        real.append(not x.requires_grad)
        return statistic(self, net, x, *rest)
    monkeypatch.setattr(type(plan.objective), 'statistic', counted)
    run = Distiller(TOY, as_method(plan, steps=steps), 2, 0, 'cpu')
    for _ in range(3): run.step()
    resumed = Distiller(TOY, run.method, 2, 0, 'cpu')
    resumed.load_state_dict(run.state_dict())                  # in the middle of a network's life
    for _ in range(3): resumed.step()
    assert torch.equal(resumed.images, whole.x) and sum(real) == 3 and len(real) == 9


@pytest.mark.parametrize('method, changes, why', [
    ('rdd-distance', dict(network=dict(once=True)), 'with life=1 a network serves one update'),
    ('gradient', dict(network=dict(once=True)), 'with steps=2 a network changes'),
    ('rdd-distance', dict(clustering='nearest', network=dict(life=2, once=True)), 'clusters follow the synthetic'),
    ('kernel', dict(network=dict(once=True)), 'does not match statistics of real samples'),
    ('rdd-distance', dict(network=dict(life=2, once=2)), 'once=2')])
def test_real_statistics_that_cannot_serve_a_network_are_refused(method, changes, why):
    with pytest.raises(ValueError, match=why): as_method(method, **changes)
