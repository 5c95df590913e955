"""Merging tables: oracles of the learners, what a site may influence, calibration, types and ranges, bad input."""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.base import clone
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from rdd_nb.core import generator
from rdd_nb.learners import (Shifted, default_models, ensemble_labels, kernel_scores, logistic, rate_offset,
                             site_shift)
from rdd_nb.merge import SOFT, MergeTables, SiteTasks, as_observed, first_rows, fixed_labels, observed, union_schema
from rdd_nb.risk import CVaR, Entropic, Mean
from rdd_nb.tables import TableCodec, read_table, three_hospitals

QUICK = dict(rows=20, steps=4, choose=0, progress=False)


@pytest.fixture(scope='module')
def hospitals(): return three_hospitals()


@pytest.fixture(scope='module')
def merged(hospitals): return MergeTables(rows=40, steps=20, choose=2, progress=False).fit(hospitals, 'diagnosis')


# The learners inside, against scikit-learn and difference quotients

@pytest.mark.parametrize('separable', [False, True])
@pytest.mark.parametrize('scale', [.1, 1., 10.])
def test_logistic_is_that_of_sklearn(separable, scale):
    draw = generator(0, 'test', separable, scale)
    x = scale * torch.randn(3, 50, 4, generator=draw, dtype=torch.float64)
    y = (x[0, :, 0] > 0).double() if separable else torch.randint(2, (50,), generator=draw).double()
    theta = logistic(x, y, steps=20)
    for t in range(3):
        s = LogisticRegression(tol=1e-12, max_iter=5000).fit(x[t].numpy(), y.numpy())
        np.testing.assert_allclose(theta[t], np.append(s.coef_[0], s.intercept_), rtol=1e-3, atol=1e-4)


def test_a_hidden_column_is_an_absent_one():
    x, y = torch.randn(1, 30, 3, generator=generator(1), dtype=torch.float64), torch.arange(30).double() % 2
    hidden = torch.cat([x, x * torch.tensor([1., 0, 1])])
    theta = logistic(hidden, y)
    torch.testing.assert_close(theta[1, [0, 2, 3]], logistic(x[..., [0, 2]], y)[0])
    assert theta[1, 1] == 0


def test_kernel_scores_are_kernel_ridge_regression():
    r = np.random.default_rng(0)
    x, z, y = r.normal(size=(9, 3)), r.normal(size=(20, 3)), np.arange(20) % 2
    sign = 2. * y - 1
    oracle = 3 * (KernelRidge(alpha=1., kernel='rbf', gamma=1 / 12).fit(z, sign - sign.mean()).predict(x) + sign.mean())
    got = kernel_scores(*(torch.as_tensor(a)[None] for a in (x, z)), torch.as_tensor(y).double(), torch.tensor([3.]))
    np.testing.assert_allclose(got[0], oracle, rtol=1e-9)


def tasks_of(seed=0, sites=2, n=15, d=5, m=8, borrow=.5):
    r = np.random.default_rng(seed)
    x, site, y = r.normal(size=(sites * n, d)), np.repeat(np.arange(sites), n), np.tile(np.arange(n) % 2, sites)
    shown = r.uniform(size=(sites, d)) < .7
    shown[:, 0] = True
    x[~shown[site]] = np.nan
    x[r.uniform(size=x.shape) < .1] = np.nan
    return SiteTasks(x, y, site, shown, np.arange(m) % 2, borrow, torch.float64), torch.tensor(r.normal(size=(m, d)),
        requires_grad=True)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('risk', [Mean(), CVaR(.5)])
def test_gradient_of_the_objective(seed, risk):
    tasks, z = tasks_of(seed)
    assert torch.autograd.gradcheck(lambda z: tasks.objective(z, risk)[0], z, eps=1e-6, atol=1e-5)


def test_cvar_of_everything_is_the_mean():
    tasks, z = tasks_of(3)
    torch.testing.assert_close(tasks.objective(z, CVaR(1.))[0], tasks.objective(z, Mean())[0])


def test_losses_are_those_of_a_pipeline():
    "The logistic half of a site's loss, recomputed with frames and scikit-learn."
    tasks, z = tasks_of(1, borrow=0)
    show, mine = tasks.shown[0].numpy() > 0, tasks.site.numpy() == 0
    x = np.where(tasks.seen > 0, tasks.x, np.nan)[mine][:, show]
    zs = z.detach().numpy()[:, show]
    scaler = StandardScaler().fit(zs)
    f = LogisticRegression(tol=1e-12, max_iter=5000).fit(scaler.transform(zs),
                                                         tasks.labels.numpy(
                                                             )).decision_function(np.nan_to_num(scaler.transform(x)))
    g = kernel_scores(*(torch.as_tensor(np.nan_to_num(scaler.transform(a)))[None] for a in (x, zs)), tasks.labels,
                      torch.tensor([show.sum()])).numpy()[0]
    y = tasks.y.numpy()[mine]
    def at_best(s):
        s = s + rate_offset(1 / (1 + np.exp(-s)), y.mean())
        return np.mean(np.logaddexp(0, s) - y * s)
    for losses in tasks.losses(z)[:2]: assert abs(losses[0].item() - np.mean([at_best(f), at_best(g)])) < 1e-4


def test_realism_is_an_energy_distance():
    tasks, z = tasks_of(2)
    expected = []
    for s in range(2):
        for c in (0, 1):
            mine = ((tasks.site == s) & (tasks.y == c)).numpy()
            zc, show = z.detach().numpy()[tasks.labels.numpy() == c], tasks.shown[s].numpy() > 0
            rms = lambda a, b, w: np.sqrt(((a - b)[w] ** 2).sum() / max(w.sum(), 1) + SOFT)
            cross = [rms(x, v, w & show) for x, w in zip(tasks.x.numpy()[mine], tasks.seen.numpy()[mine] > 0)
                     for v in zc]
            expected.append(2 * np.mean(cross) - np.mean([rms(a, b, show) for a in zc for b in zc]))
    assert abs(tasks.realism(z).item() - np.mean(expected)) < 1e-9


# What a site may and may not influence

@pytest.mark.parametrize('borrow', [0, .5])
def test_a_site_does_not_feel_columns_it_does_not_show(borrow):
    tasks, z = tasks_of(5, sites=3, borrow=borrow)
    for s in range(3):
        for which in (0, 1):                                 # own rows, and with borrowed ones
            pull = torch.autograd.grad(tasks.losses(z)[which][s], z)[0].abs().sum(0)
            assert (pull[tasks.shown[s] == 0] == 0).all() and (pull[tasks.shown[s] > 0] > 0).all()
        before = tasks.losses(z)[1][s].item()
        kept = tasks.x.clone()
        tasks.x += 9 * (1 - tasks.shown[s])                  # values of all sites in columns that s does not show
        assert tasks.losses(z)[1][s].item() == before
        tasks.x = kept


def test_without_borrowing_other_rows_do_not_matter():
    tasks, z = tasks_of(6, borrow=0)
    before = tasks.losses(z)[1]
    tasks.x[tasks.site == 1] *= -3
    after = tasks.losses(z)[1]
    assert after[0] == before[0] and after[1] != before[1]


def test_borrowed_weights():
    tasks, _ = tasks_of(7, sites=3, borrow=.25)
    torch.testing.assert_close(tasks.weights.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close((tasks.weights[:3] * tasks.member).sum(1), torch.full((3,), .75, dtype=torch.float64))
    alone, _ = tasks_of(7, sites=1, borrow=.25)              # no other site to borrow from
    torch.testing.assert_close(alone.weights[0], alone.own[0])


def test_an_empty_column_at_a_site_changes_nothing(hospitals):
    a = MergeTables(**QUICK).fit(hospitals, 'diagnosis').synthetic_
    with pytest.warns(UserWarning, match="table 'north', column 'worst texture': has no value"):
        b = MergeTables(**QUICK).fit(dict(hospitals, north=hospitals['north'].assign(**{'worst texture': np.nan})),
                                     'diagnosis').synthetic_
    pd.testing.assert_frame_equal(a, b[a.columns])


def test_index_labels_and_pandas_types_do_not_matter(hospitals):
    odd = {k: t.set_axis(range(7, 7 + len(t))).astype({'diagnosis': 'category'}) for k, t in hospitals.items()}
    a, b = (MergeTables(**QUICK).fit(t, 'diagnosis').synthetic_ for t in (hospitals, odd))
    pd.testing.assert_frame_equal(a, b, check_dtype=False)


# The risk, the intercept and what is said of a site

def two_sites(seed=0):
    "A site that is served well on its own rows and borrows from one that is not, and the other way round."
    r = np.random.default_rng(seed)
    x, y, site = r.normal(size=(80, 2)), np.tile([0, 1], 40), np.repeat([0, 1], 40)
    x[:40, 0] += 4 * y[:40] - 2                              # site 0 is easy: column 0 tells the class
    return SiteTasks(x, y, site, np.ones((2, 2), bool), np.arange(8) % 2, .9, torch.float64)


def test_the_risk_compares_sites_on_their_own_rows():
    tasks = two_sites()
    z = torch.tensor(np.random.default_rng(1).normal(size=(8, 2)) + np.outer(np.arange(8) % 2, [4, 0]),
                     requires_grad=True)
    own, mixed, _ = tasks.losses(z)
    assert own[1] > own[0] and mixed[1] < mixed[0]           # mixed rows would name the wrong site
    worst = torch.autograd.grad(tasks.objective(z, CVaR(.5), realism=0)[0] - mixed[-1], z)[0]
    mixed = tasks.losses(z)[1]
    torch.testing.assert_close(worst, torch.autograd.grad(mixed[1], z)[0], atol=1e-9, rtol=1e-6)


def test_weights_are_those_of_own_rows(hospitals):
    m = MergeTables(**QUICK).fit(hospitals, 'diagnosis')
    gained = torch.tensor([m.site_losses_[k] - m.base_losses_[k] for k in hospitals])
    np.testing.assert_allclose(list(m.site_weights_.values()), CVaR(.5).weights(gained), atol=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_shift_is_the_best_constant(seed):
    r = np.random.default_rng(seed)
    f, y, member = torch.tensor(4 * r.normal(size=(2,
                                                   60))), torch.tensor(
                                                       (
                                                           r.uniform(size=60) < .2) * 1.), torch.eye(
                                                               2).repeat_interleave(30, 1).double()
    y[0] = y[30] = 1; y[1] = y[31] = 0
    b, w = site_shift(f, y, member), torch.tensor(r.uniform(size=(2, 60)))
    for s in range(2):
        for t in range(2):
            assert abs(rate_offset(torch.sigmoid(f[s, 30 * t:30 * t + 30]), y[30 * t:30 * t + 30].mean().item()) - b[s,
                t]) < 1e-6
    v = site_shift(f, y, member, w)
    assert ((w * (torch.sigmoid(f + v @ member) - y)) @ member.T).abs().max() < 1e-9


def rare_and_common(seed=0):
    r = np.random.default_rng(seed)
    def site(n, rate, own):
        y = np.arange(n) < round(n * rate)
        return pd.DataFrame(dict(a=r.normal(y, 1).round(2), b=r.normal(.5 * y, 1).round(2), y=np.where(y, 'yes',
            'no')) | {own: r.normal(.5 * y, 1).round(2)})
    return dict(rare=site(600, 1 / 60, 'c'), common=site(300, .6, 'd'))


@pytest.mark.parametrize('model', ['logistic', 'boosting'])
def test_every_site_is_calibrated(model):
    "Without the intercept a site with 1.7 % positives is predicted 24 %."
    tables, fresh = rare_and_common(), rare_and_common(1)
    m = MergeTables(rows=60, steps=30, choose=0, progress=False).fit(tables, 'y')
    for k, t in tables.items():
        rate, f = (t.y == 'yes').mean(), m.model(default_models()[model], t)
        assert abs(f.predict_proba(t)[:, 1].mean() - rate) < 1e-6 and abs(f.predict_proba(fresh[k])[:,
            1].mean() - rate) < .4 * rate
        assert abs(m.model(default_models()[model], t.drop(columns='y'), rate=rate).offset - f.offset) < 1e-9
        assert m.model(default_models()[model], t.drop(columns='y')).offset == 0
        if model == 'logistic': assert abs(m.offsets_[k] - f.offset) < .05 and m.rates_[k] == rate


def test_the_positive_class_can_be_named(hospitals):
    a, b = (MergeTables(**QUICK, positive=p).fit(hospitals, 'diagnosis') for p in (None, 'benign'))
    assert a.schema_.classes == ['benign', 'malignant'] and b.schema_.classes == ['malignant', 'benign']
    assert abs(a.rates_['north'] + b.rates_['north'] - 1) < 1e-12
    f = b.model(LogisticRegression(), hospitals['north'])
    p = f.predict_proba(hospitals['north'])
    assert list(f.classes_) == ['benign', 'malignant'] and abs(p[:,
        0].mean() - b.rates_['north']) < 1e-6 and isinstance(f, Shifted)
    with pytest.raises(ValueError, match="has no class 'ill'"):
        MergeTables(**QUICK, positive='ill').fit(hospitals, 'diagnosis')


def test_a_site_that_is_harmed_is_named():
    r = np.random.default_rng(0)
    def site(n, sign):
        y = np.arange(n) % 2
        return pd.DataFrame(dict(a=(sign * 3 * y + r.normal(size=n)).round(2), y=y))
    with pytest.warns(UserWarning, match="^table 'odd': models learned from the merged table do worse there .* than "
                                         "its base rate"):
        MergeTables(rows=20, steps=20, risk='mean', borrow=0, choose=0, progress=False,
                    accept=['a']).fit(dict(one=site(200, 1), two=site(200, 1), odd=site(20, -1)), 'y')


# Labels of an ensemble

def test_labels_of_the_ensemble_follow_the_data():
    r = np.random.default_rng(0)
    x, site = r.normal(size=(600, 3)), np.repeat([0, 1], 300)
    y = (x[:, 0] * x[:, 1] > 0).astype(float)                # no line separates the classes
    x[site == 1, 2] = np.nan
    z = r.normal(size=(1000, 3))
    labels = ensemble_labels(x, y, site, np.array([[1, 1, 1], [1, 1, 0]], bool), z, .5, 0)
    assert ((z[:, 0] * z[:, 1] > 0) == labels).mean() > .75 and abs(labels.mean() - .5) < .05
    assert (labels == ensemble_labels(x, y, site, np.array([[1, 1, 1], [1, 1, 0]], bool), z, .5, 0)).all()


# Constraints and sizes

def test_orders_hold(hospitals):
    ok = {k: t.assign(low=t['mean smoothness'] / 2,
                      high=t['mean smoothness'] / 2 + .001 * (np.arange(len(t)) % 5)).round(3) for k,
                      t in hospitals.items()}
    free, held = (MergeTables(**QUICK, order=o).fit(ok, 'diagnosis').synthetic_ for o in ((), ['low <= high']))
    assert (free.low > free.high).any() and (held.low <= held.high).all()
    with pytest.raises(ValueError, match="order 'high <= low': table 'north' breaks it in"):
        MergeTables(**QUICK, order=['high <= low']).fit(ok, 'diagnosis')


@pytest.mark.parametrize('rows', [40, 300])
def test_spikes_stay(rows):
    r = np.random.default_rng(0)
    def site(n, own):
        return pd.DataFrame({'gain': np.where(r.uniform(size=n) < .87, 0, r.integers(100, 9000, n)),
                             own: r.normal(size=n).round(2), 'y': np.arange(n) % 2})
    t = dict(one=site(200, 'c'), two=site(300, 'd'))
    m = MergeTables(rows=rows, steps=5, choose=0, progress=False).fit(t, 'y')
    assert abs((m.synthetic_.gain == 0).mean() - pd.concat(t.values()).gain.eq(0).mean()) <= 1.5 / rows + .01


def test_observed_values_by_class_and_rank():
    x, y = np.array([[1.], [1], [2], [9], [np.nan]]), np.array([0, 0, 0, 1, 1])
    assert observed(x, y, 1, .6) == {} and list(observed(x, y, 1, .5)) == [0]
    z = as_observed([[5.], [7], [6], [0]], np.array([0, 0, 0, 1]), observed(x, y, 1, 0))
    assert z[:, 0].tolist() == [1, 2, 1, 9]


def test_more_rows_than_there_are(hospitals):
    few = {k: t.groupby('diagnosis').head(15) for k, t in hospitals.items()}
    s = MergeTables(rows=600, steps=3, choose=0, progress=False).fit(few, 'diagnosis').synthetic_
    assert len(s) == 600 > sum(map(len, few.values())) and s.duplicated().mean() < .05 and not s.isna().any().any()


# The typed table

@st.composite
def tables(draw):
    "Two or three tables with random columns of all types, and holes."
    r = np.random.default_rng(draw(st.integers(0, 2**20)))
    kinds = dict(x=lambda n: r.normal(5, 2, n).round(2), count=lambda n: r.integers(0, 40, n),
                 flag=lambda n: r.integers(0, 2, n), yes=lambda n: r.uniform(size=n) < .5,
                 word=lambda n: r.choice(['a', 'b', 'c'], n), nullable=lambda n: pd.array(r.integers(10, 90, n),
                     dtype='Int64'), cat=lambda n: pd.Categorical(r.choice(['u', 'v'], n)))
    found = {}
    for site in range(draw(st.integers(0, 2))):
        columns, n = draw(st.lists(st.sampled_from(list(kinds)), min_size=1, max_size=5,
                                   unique=True)), draw(st.integers(12, 25))
        t = pd.DataFrame({c: kinds[c](n) for c in columns})
        for c in columns:
            if draw(st.booleans()) and c not in ('yes',): t[c] = t[c].where(r.uniform(size=n) < .9)
        found[f's{site}'] = t.assign(y=np.arange(n) % 2)
    return found


NAMES = ['x', 'count', 'flag', 'yes', 'word', 'nullable', 'cat']
ALL = pd.DataFrame(dict(x=np.arange(12) / 4, count=np.arange(12) % 7, flag=np.arange(12) % 2,
                        yes=np.arange(12) % 3 == 0, word=list('abcabcabcabc'),
                        nullable=np.arange(12) + 30, cat=list('uvuvuvuvuvuv'), y=np.arange(12) % 2))


@settings(max_examples=15, deadline=None)
@given(tables(), st.integers(0, 3))
def test_what_comes_out_is_typed(tables, seed):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = MergeTables(rows=12, steps=3, choose=0, seed=seed, accept=NAMES, progress=False).fit(dict({'all': ALL},
            **tables), 'y')
    s = m.synthetic_
    assert list(s) == [*m.schema_.columns, 'y'] and len(s) == 12 and not s.isna().any().any()
    assert set(s.y) == {0, 1} and s.y.dtype == np.int64
    for name, c in m.schema_.columns.items():
        real = pd.concat([t[name].dropna() for t in [ALL, *tables.values()] if name in t], ignore_index=True)
        if c.kind == 'number':
            assert s[name].between(float(real.min()), float(real.max())).all()
            np.testing.assert_allclose(s[name].astype(float), s[name].astype(float).round(c.decimals), atol=1e-9)
            assert (s[name].dtype == np.int64) == (c.decimals == 0)
        else: assert set(s[name]) <= set(real.tolist())
    again = TableCodec(m.schema_).fit(s).transform(s)
    assert not np.isnan(again).any()


def test_constant_and_binary_columns(hospitals):
    odd = {k: t.assign(ward=7, room='x', sex=np.arange(len(t)) % 2) for k, t in hospitals.items()}
    with pytest.warns(UserWarning, match='is constant'): s = MergeTables(**QUICK).fit(odd, 'diagnosis').synthetic_
    assert set(s.ward) == {7} and set(s.room) == {'x'} and set(s.sex) <= {0, 1} and s.sex.dtype == np.int64


def test_codes_that_are_numbers(hospitals):
    odd = {k: t.assign(kind=np.arange(len(t)) % 4 * 3) for k, t in hospitals.items()}
    m = MergeTables(**QUICK, kinds=dict(kind='category')).fit(odd, 'diagnosis')
    assert m.schema_.columns['kind'].levels == [0, 3, 6, 9] and set(m.synthetic_.kind) <= {0, 3, 6, 9}


def test_labels_and_first_rows():
    assert fixed_labels([.5], 9).sum() in (4, 5)
    r = np.random.default_rng(0)
    x = r.normal(size=(4000, 3)) @ np.array([[1, .8, 0], [0, .6, 0], [0, 0, 2]]) + [1, 2, 3]
    x[r.uniform(size=x.shape) < .2] = np.nan
    z = first_rows(x, np.zeros(4000), np.zeros(5000), 0).numpy()
    np.testing.assert_allclose(z.mean(0), [1, 2, 3], atol=.12)
    np.testing.assert_allclose(np.cov(z.T), pd.DataFrame(x).cov(), atol=.2)
    assert not np.isnan(first_rows(np.full((3, 2), np.nan), np.zeros(3), np.zeros(2)).numpy()).any()


# Conventions

def test_determinism_and_global_state(hospitals, merged):
    torch.manual_seed(5); np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = MergeTables(rows=40, steps=20, choose=2, progress=False).fit(hospitals, 'diagnosis').synthetic_
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    pd.testing.assert_frame_equal(again, merged.synthetic_)
    other = MergeTables(rows=40, steps=20, choose=2, seed=1, progress=False).fit(hospitals, 'diagnosis').synthetic_
    assert not other.equals(merged.synthetic_)


def test_inputs_are_left_alone(hospitals):
    copies = {k: t.copy() for k, t in hospitals.items()}
    MergeTables(**QUICK).fit(hospitals, 'diagnosis')
    for k, t in copies.items(): pd.testing.assert_frame_equal(t, hospitals[k])


def test_sklearn_conventions(hospitals, merged):
    m = MergeTables(rows=30, risk=CVaR(.3), accept=('a',))
    assert clone(m).get_params() == m.get_params() and m.set_params(rows=31).rows == 31
    assert repr(MergeTables(rows=30)) == 'MergeTables(rows=30)'
    with pytest.raises(Exception, match='not fitted'): MergeTables().model(LogisticRegression(), hospitals['east'])


def test_a_list_of_tables_and_a_single_one(hospitals):
    m = MergeTables(**QUICK).fit(list(hospitals.values()), 'diagnosis')
    assert list(m.sites_) == ['table 1', 'table 2', 'table 3']
    assert MergeTables(**QUICK).fit({'only': hospitals['south']}, 'diagnosis').synthetic_.shape == (20, 8)


def test_minibatches(hospitals):
    assert MergeTables(**QUICK, batch=32).fit(hospitals, 'diagnosis').synthetic_.shape == (20, 14)


def test_it_learns(hospitals):
    "Better than where it started, at every site, on the rows it was made for."
    start, end = (MergeTables(rows=40, steps=n, choose=0, progress=False).fit(hospitals, 'diagnosis') for n in (0, 60))
    assert all(end.site_losses_[k] < start.site_losses_[k] for k in hospitals)
    assert all(end.site_losses_[k] < end.base_losses_[k] for k in hospitals)


# Bad input: one line that names table and column

def change(t, **columns): return dict(t, south=t['south'].assign(**columns))

BAD = {
    'no target': (lambda t: dict(t, south=t['south'].drop(columns='diagnosis')),
                  "table 'south': has no target column 'diagnosis'"),
    'one class': (lambda t: change(t, diagnosis='benign'), "table 'south', column 'diagnosis': has one class only"),
    'no class': (lambda t: change(t, diagnosis=None),
                 "table 'south', column 'diagnosis': has one class only .all missing"),
    'three classes': (lambda t: {k: v.assign(diagnosis=np.arange(len(v)) % 3) for k, v in t.items()},
                      'has 3 different values, expected two'),
    'regression': (lambda t: {k: v.assign(diagnosis=np.arange(len(v)) / 7) for k, v in t.items()},
                   'different numbers are a regression target; merge needs two classes'),
    'other target values': (lambda t: change(t, diagnosis=lambda v: v.diagnosis.str.upper()),
                            "table 'south' has the values"),
    'text for numbers': (lambda t: change(t, **{'mean texture': 'x'}),
                         "'mean texture': numbers in table 'north' and text such as 'x' in table 'south'"),
    'truth values for text': (lambda t: change(t, size=True),
                              "'size': truth values in table 'south' and text such as '.*' in table 'north'"),
    'codes': (lambda t: change(t, **{'worst texture': lambda v: v['worst texture'].astype(object).where(v.index != 2,
        'n/a')}), "table 'south', column 'worst texture': .* but not 'n/a'"),
    'identifier': (lambda t: change(t, who=lambda v: [f'p{i}' for i in v.index]),
                   "table 'south', column 'who': .* identifier"),
    'infinite': (lambda t: change(t, **{'mean texture': lambda v: v['mean texture'].replace(v['mean texture'].max(),
        np.inf)}), "table 'south', column 'mean texture': has infinite values"),
    'empty': (lambda t: dict(t, south=t['south'].iloc[:0]), "table 'south': has no rows"),
    'twice': (lambda t: dict(t, south=pd.concat([t['south'], t['south'][['size']]], axis=1)),
              "table 'south': column 'size' occurs twice"),
    'unnamed': (lambda t: dict(t, south=t['south'].rename(columns={'size': 'Unnamed: 3'})),
                "table 'south': a column is called 'Unnamed: 3'"),
    'number as name': (lambda t: dict(t, south=t['south'].rename(columns={'size': 63})),
                       "table 'south': a column is called 63"),
    'no table': (lambda t: dict(t, south=3), "table 'south': got int"),
    'none': (lambda t: {}, 'tables: got none'),
    'a frame': (lambda t: t['south'], 'tables: got DataFrame'),
    'only the target': (lambda t: {'a': t['south'][['diagnosis']]}, 'no column beside the target'),
    'mostly holes': (lambda t: {'a': t['south'][['diagnosis']].assign(x=lambda v: np.where(v.index < 20, v.index / 7,
        np.nan))}, "table 'a': no column is filled"),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_tables(hospitals, case):
    make, text = BAD[case]
    with pytest.raises(ValueError, match=text) as e: MergeTables(**QUICK).fit(make(hospitals), 'diagnosis')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name, value', dict(rows=1, steps=-1, borrow=1, realism=-1., lr=0, harden=2, batch=1,
                                             present=0, hide=1., choose=-1).items())
def test_bad_settings(hospitals, name, value):
    with pytest.raises(ValueError, match=f'^{name}: got {value}'):
        MergeTables(**{**QUICK, name: value}).fit(hospitals, 'diagnosis')


def test_bad_risk_and_names(hospitals):
    for risk in ('nonsense', 'cvar(2)', 'groupdro'):
        with pytest.raises(ValueError): MergeTables(**QUICK, risk=risk).fit(hospitals, 'diagnosis')
    with pytest.raises(ValueError, match="no table has a column 'x'"):
        MergeTables(**QUICK, kinds=dict(x='category')).fit(hospitals, 'diagnosis')


# Questions: refused, and taken with `accept`

def south(t, **columns): return dict(t, south=t['south'].assign(**columns))
def order_of(v): return np.arange(len(v))

QUESTIONS = {  # change, column or table to accept, what is said
    'kPa beside mmHg': (lambda t: south({k: v.assign(bp=np.random.default_rng(0).normal(125, 9, len(v)).round()) for k,
                                         v in t.items()}, bp=lambda v: np.random.default_rng(1).normal(125, 9,
                                             len(v)).round() / 7.5), 'bp', 'the same unit'),
    'another unit': (lambda t: south(t, **{'mean smoothness': lambda v: v['mean smoothness'] * 1000}),
                     'mean smoothness', "the median is .* in table 'north' and .* in table 'south': the same unit"),
    '-999': (lambda t: south(t, **{'mean texture': lambda v: v['mean texture'].fillna(-999)}), 'mean texture',
             r'-999 in \d+ of \d+ rows .* --missing mean texture=-999'),
    'zero as missing': (lambda t: south(t, weight=lambda v: np.where(order_of(v) % 9, 60. + order_of(v) % 37, 0)),
                        'weight', 'missing'),
    'patient numbers': (lambda t: south(t, nr=lambda v: 4711 + order_of(v)), 'nr', 'an identifier'),
    'zip codes': (lambda t: south(t, zip=lambda v: 10000 + order_of(v) * 7919 % 80000 // 3), 'zip', 'postal code'),
    'dates': (lambda t: south(t, visit=lambda v: [f'2024-0{1 + i % 9}-11' for i in order_of(v)]), 'visit',
              "dates such as 2024-01-11"),
    'time to event': (lambda t: south(t, time=lambda v: 3 * (order_of(v) % 50)), 'time',
                      'known only after the outcome'),
    'two spellings': (lambda t: dict(t, south=t['south'].rename(columns={'mean texture': 'Mean Texture '})),
                      'Mean Texture ',
                      "'mean texture' of table 'north' and 'Mean Texture ' of table 'south': the same"),
    'no shared column': (lambda t: dict(t, south=t['south'][['worst texture', 'worst compactness', 'diagnosis']]),
                         'south', 'shares no column'),
    'four rows': (lambda t: dict(t, south=t['south'].groupby('diagnosis').head(2)), 'south',
                  '4 rows, 2 of the rarer class, are too few'),
    'two ill': (lambda t: dict(t, south=pd.concat([v.head(n) for n, (_, v)
                                                   in zip((40, 2), t['south'].groupby('diagnosis'))])),
                'south', '2 of the rarer class'),
}


@pytest.mark.parametrize('case', QUESTIONS)
def test_questions(hospitals, case):
    change, name, text = QUESTIONS[case]
    with pytest.raises(ValueError, match=text) as e: union_schema(change(hospitals), 'diagnosis')
    assert f"--accept '{name}'" in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) <= 300
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert len(union_schema(change(hospitals), 'diagnosis', accept=[name]).columns)


def test_too_many_columns(hospitals):
    wide = {k: pd.concat([t, pd.DataFrame(np.zeros((len(t), 5000)), columns=[f'c{i}' for i in range(5000)])], axis=1)
            for k, t in hospitals.items()}
    with pytest.raises(ValueError, match='have 5013 columns, expected at most 1000'):
        MergeTables(**QUICK).fit(wide, 'diagnosis')


def test_what_only_warns(hospitals):
    with pytest.warns(UserWarning, match="^column 'size': 'L.* in table 'south' and .* in table 'north'; are the "
                                         "codes the same"):
        union_schema(change(hospitals, size=lambda v: v['size'].str.upper()), 'diagnosis')
    with pytest.warns(UserWarning, match="^table 'south', column 'mean symmetry': is constant .0.2. and can teach "
                                         "nothing there$"):
        union_schema(change(hospitals, **{'mean symmetry': .2}), 'diagnosis')
    with pytest.warns(UserWarning, match='3 rows without a target'):
        MergeTables(**QUICK).fit(change(hospitals, diagnosis=lambda v: v.diagnosis.where(v.index > 2)), 'diagnosis')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        union_schema(hospitals, 'diagnosis')
