"""Merging tables: oracles of the inner learners, types and ranges, what a site may influence, bad input, the command line."""
import argparse, os, warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.frozen import FrozenEstimator
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from rdd_nb.cli import main
from rdd_nb.core import generator
from rdd_nb.merge import (METHODS, SOFT, MergeTables, SiteTasks, TableCodec, add_command, as_tables, by_group, columns_of, compare_once, default_models, do_merge,
                          first_rows, fixed_labels, kernel_scores, load_diabetes, load_heart, load_hepatitis_ilpd, logistic, paired_sites, per_split, prepare, privacy_report,
                          read_schema, read_table, site_metrics, site_probabilities, split_sites, summarise_sites, three_hospitals)
from rdd_nb.risk import CVaR, Mean

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
    return SiteTasks(x, y, site, shown, np.arange(m) % 2, borrow, torch.float64), torch.tensor(r.normal(size=(m, d)), requires_grad=True)


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
    f = LogisticRegression(tol=1e-12, max_iter=5000).fit(scaler.transform(zs), tasks.labels.numpy()).decision_function(np.nan_to_num(scaler.transform(x)))
    g = kernel_scores(*(torch.as_tensor(np.nan_to_num(scaler.transform(a)))[None] for a in (x, zs)), tasks.labels, torch.tensor([show.sum()])).numpy()[0]
    y = tasks.y.numpy()[mine]
    expected = np.mean([np.logaddexp(0, s) - y * s for s in (f, g)])
    assert abs(tasks.losses(z)[0][0].item() - expected) < 1e-4


def test_realism_is_an_energy_distance():
    tasks, z = tasks_of(2)
    expected = []
    for s in range(2):
        for c in (0, 1):
            mine = ((tasks.site == s) & (tasks.y == c)).numpy()
            zc, show = z.detach().numpy()[tasks.labels.numpy() == c], tasks.shown[s].numpy() > 0
            rms = lambda a, b, w: np.sqrt(((a - b)[w] ** 2).sum() / max(w.sum(), 1) + SOFT)
            cross = [rms(x, v, w & show) for x, w in zip(tasks.x.numpy()[mine], tasks.seen.numpy()[mine] > 0) for v in zc]
            expected.append(2 * np.mean(cross) - np.mean([rms(a, b, show) for a in zc for b in zc]))
    assert abs(tasks.realism(z).item() - np.mean(expected)) < 1e-9


# What a site may and may not influence

@pytest.mark.parametrize('borrow', [0, .5])
def test_a_site_does_not_feel_columns_it_does_not_show(borrow):
    tasks, z = tasks_of(5, sites=3, borrow=borrow)
    for s in range(3):
        pull = torch.autograd.grad(tasks.losses(z)[0][s], z)[0].abs().sum(0)
        assert (pull[tasks.shown[s] == 0] == 0).all() and (pull[tasks.shown[s] > 0] > 0).all()
        before = tasks.losses(z)[0][s].item()
        kept = tasks.x.clone()
        tasks.x += 9 * (1 - tasks.shown[s])                  # anybody's values in columns that s does not show
        assert tasks.losses(z)[0][s].item() == before
        tasks.x = kept


def test_without_borrowing_other_rows_do_not_matter():
    tasks, z = tasks_of(6, borrow=0)
    before = tasks.losses(z)[0]
    tasks.x[tasks.site == 1] *= -3
    after = tasks.losses(z)[0]
    assert after[0] == before[0] and after[1] != before[1]


def test_borrowed_weights():
    tasks, _ = tasks_of(7, sites=3, borrow=.25)
    torch.testing.assert_close(tasks.weights.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close((tasks.weights[:3] * (tasks.own > 0)).sum(1), torch.full((3,), .75, dtype=torch.float64))
    alone, _ = tasks_of(7, sites=1, borrow=.25)              # nobody to borrow from
    torch.testing.assert_close(alone.weights[0], alone.own[0])


def test_an_empty_column_at_a_site_changes_nothing(hospitals):
    a = MergeTables(**QUICK).fit(hospitals, 'diagnosis').synthetic_
    with pytest.warns(UserWarning, match="table 'north', column 'worst texture': has no value"):
        b = MergeTables(**QUICK).fit(dict(hospitals, north=hospitals['north'].assign(**{'worst texture': np.nan})), 'diagnosis').synthetic_
    pd.testing.assert_frame_equal(a, b[a.columns])


def test_index_labels_and_pandas_types_do_not_matter(hospitals):
    odd = {k: t.set_axis(range(7, 7 + len(t))).astype({'diagnosis': 'category'}) for k, t in hospitals.items()}
    a, b = (MergeTables(**QUICK).fit(t, 'diagnosis').synthetic_ for t in (hospitals, odd))
    pd.testing.assert_frame_equal(a, b, check_dtype=False)


# The typed table

@st.composite
def tables(draw):
    "Two or three tables with random columns of all types, and holes."
    r = np.random.default_rng(draw(st.integers(0, 2**20)))
    kinds = dict(x=lambda n: r.normal(5, 2, n).round(2), count=lambda n: r.integers(0, 40, n), flag=lambda n: r.integers(0, 2, n), yes=lambda n: r.uniform(size=n) < .5,
                 word=lambda n: r.choice(['a', 'b', 'c'], n), nullable=lambda n: pd.array(r.integers(10, 90, n), dtype='Int64'), cat=lambda n: pd.Categorical(r.choice(['u', 'v'], n)))
    found = {}
    for site in range(draw(st.integers(1, 3))):
        columns, n = draw(st.lists(st.sampled_from(list(kinds)), min_size=1, max_size=5, unique=True)), draw(st.integers(12, 25))
        t = pd.DataFrame({c: kinds[c](n) for c in columns})
        for c in columns:
            if draw(st.booleans()) and c not in ('yes',): t[c] = t[c].where(r.uniform(size=n) < .9)
        found[f's{site}'] = t.assign(y=np.arange(n) % 2)
    return found


@settings(max_examples=15)
@given(tables(), st.integers(0, 3))
def test_what_comes_out_is_typed(tables, seed):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        m = MergeTables(rows=12, steps=3, choose=0, seed=seed, progress=False).fit(tables, 'y')
    s = m.synthetic_
    assert list(s) == [*m.schema_.columns, 'y'] and len(s) == 12 and not s.isna().any().any()
    assert set(s.y) == {0, 1} and s.y.dtype == np.int64
    for name, c in m.schema_.columns.items():
        real = pd.concat([t[name].dropna() for t in tables.values() if name in t], ignore_index=True)
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
    m = MergeTables(**QUICK, categories=['kind']).fit(odd, 'diagnosis')
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
    m = MergeTables(rows=30, risk=CVaR(.3), categories=('a',))
    assert clone(m).get_params() == m.get_params() and m.set_params(rows=31).rows == 31
    assert repr(MergeTables(rows=30)) == 'MergeTables(rows=30)'
    assert merged.get_feature_names_out().tolist() == list(merged.schema_.columns) == list(merged.transform(hospitals['east']))
    with pytest.raises(Exception, match='not fitted'): MergeTables().transform(hospitals['east'])


def test_in_a_pipeline_with_a_column_transformer(hospitals, merged):
    "Fitted once, it heads a pipeline as a frozen step, before encodings of one's own."
    numbers = [c.name for c in merged.schema_.columns.values() if c.kind == 'number']
    encode = ColumnTransformer([('n', StandardScaler(), numbers), ('c', OneHotEncoder(handle_unknown='ignore'), ['size'])])
    s = merged.synthetic_
    p = make_pipeline(FrozenEstimator(merged), encode, default_models()['boosting']).fit(s, s.diagnosis)
    for t in hospitals.values(): assert p.predict_proba(t.drop(columns='diagnosis')).shape == (len(t), 2)
    assert roc(p, hospitals['north']) > .8


def roc(p, t): return site_metrics((t.diagnosis == 'malignant').astype(int), p.predict_proba(t)[:, 1])['auroc']


def test_transform_of_what_was_never_seen(merged):
    t = merged.transform(pd.DataFrame({'size': ['huge', 'small', None], 'mean texture': [1, 2, np.nan], 'other': 0}, index=[5, 6, 7]))
    assert t.index.tolist() == [5, 6, 7] and t['size'].isna().tolist() == [True, False, True] and 'other' not in t and t['worst texture'].isna().all()
    with pytest.raises(ValueError, match="'mean texture': got text such as 'high'"): merged.transform(pd.DataFrame({'mean texture': ['high']}))


def test_sample(merged):
    assert merged.sample().equals(merged.synthetic_) and len(merged.sample(7)) == 7 and not merged.sample(7).duplicated().any()
    assert merged.sample(7, seed=1).equals(merged.sample(7, seed=1)) and not merged.sample(7, seed=1).equals(merged.sample(7))
    mine = merged.sample()
    mine.loc[0, 'mean texture'] = 99.
    assert merged.synthetic_['mean texture'].max() < 99
    for n in (0, 41):
        with pytest.raises(ValueError, match='expected 1 to 40'): merged.sample(n)


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
    'no target': (lambda t: dict(t, south=t['south'].drop(columns='diagnosis')), "table 'south': has no target column 'diagnosis'"),
    'one class': (lambda t: change(t, diagnosis='benign'), "table 'south', column 'diagnosis': has one class only"),
    'no class': (lambda t: change(t, diagnosis=None), "table 'south', column 'diagnosis': has one class only .all missing"),
    'three classes': (lambda t: {k: v.assign(diagnosis=np.arange(len(v)) % 3) for k, v in t.items()}, 'has 3 different values, expected two'),
    'other target values': (lambda t: change(t, diagnosis=lambda v: v.diagnosis.str.upper()), "table 'south' has the values"),
    'text for numbers': (lambda t: change(t, **{'mean texture': 'x'}), "'mean texture': numbers in table 'north' and text such as 'x' in table 'south'"),
    'truth values for text': (lambda t: change(t, size=True), "'size': truth values in table 'south' and text such as '.*' in table 'north'"),
    'codes': (lambda t: change(t, **{'worst texture': lambda v: v['worst texture'].astype(object).where(v.index != 2, 'n/a')}), "table 'south', column 'worst texture': .* but not 'n/a'"),
    'identifier': (lambda t: change(t, who=lambda v: [f'p{i}' for i in v.index]), "table 'south', column 'who': .* identifier"),
    'infinite': (lambda t: change(t, **{'mean texture': lambda v: v['mean texture'].replace(v['mean texture'].max(), np.inf)}), "table 'south', column 'mean texture': has infinite values"),
    'empty': (lambda t: dict(t, south=t['south'].iloc[:0]), "table 'south': has no rows"),
    'twice': (lambda t: dict(t, south=pd.concat([t['south'], t['south'][['size']]], axis=1)), "table 'south': column 'size' occurs twice"),
    'unnamed': (lambda t: dict(t, south=t['south'].rename(columns={'size': 'Unnamed: 3'})), "table 'south': a column is called 'Unnamed: 3'"),
    'number as name': (lambda t: dict(t, south=t['south'].rename(columns={'size': 63})), "table 'south': a column is called 63"),
    'no table': (lambda t: dict(t, south=3), "table 'south': got int"),
    'none': (lambda t: {}, 'tables: got none'),
    'a frame': (lambda t: t['south'], 'tables: got DataFrame'),
    'only the target': (lambda t: {'a': t['south'][['diagnosis']]}, 'no column beside the target'),
    'mostly holes': (lambda t: {'a': t['south'][['diagnosis']].assign(x=lambda v: np.where(v.index < 20, v.index, np.nan))}, "table 'a': no column is filled"),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_tables(hospitals, case):
    make, text = BAD[case]
    with pytest.raises(ValueError, match=text) as e: MergeTables(**QUICK).fit(make(hospitals), 'diagnosis')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name, value', dict(rows=1, steps=-1, borrow=1, realism=-1., lr=0, harden=2, batch=1, present=0, drop=1., choose=-1).items())
def test_bad_settings(hospitals, name, value):
    with pytest.raises(ValueError, match=f'^{name}: got {value}'): MergeTables(**{**QUICK, name: value}).fit(hospitals, 'diagnosis')


def test_bad_risk_and_categories(hospitals):
    for risk in ('nonsense', 'cvar(2)', 'groupdro'):
        with pytest.raises(ValueError): MergeTables(**QUICK, risk=risk).fit(hospitals, 'diagnosis')
    with pytest.raises(ValueError, match="categories: no table has a column 'x'"): MergeTables(**QUICK, categories=['x']).fit(hospitals, 'diagnosis')


def test_what_only_warns(hospitals):
    with pytest.warns(UserWarning, match="'mean smoothness': the median is .* are the units the same"): read_schema(change(hospitals, **{'mean smoothness': lambda v: v['mean smoothness'] * 1000}), 'diagnosis')
    with pytest.warns(UserWarning, match="^column 'size': 'L.* in table 'south' and .* in table 'north'; are the codes the same"): read_schema(change(hospitals, size=lambda v: v['size'].str.upper()), 'diagnosis')
    with pytest.warns(UserWarning, match="^table 'south', column 'mean symmetry': is constant .0.2. and can teach nothing there$"): read_schema(change(hospitals, **{'mean symmetry': .2}), 'diagnosis')
    with pytest.warns(UserWarning, match='3 rows without a target'): MergeTables(**QUICK).fit(change(hospitals, diagnosis=lambda v: v.diagnosis.where(v.index > 2)), 'diagnosis')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read_schema(hospitals, 'diagnosis')


# Comparison

def test_every_method_predicts(hospitals):
    models = dict(logistic=LogisticRegression(), boosting=default_models()['boosting'].set_params(max_iter=5))
    rows = compare_once(hospitals, 'diagnosis', methods=METHODS, models=models, complete=three_hospitals(complete=True), rows=20, steps=3, choose=0)
    found = {(r['method'], r['model'], r['site']) for r in rows}
    assert found == {(m, k, s) for m in (*METHODS, 'nothing missing') for k in models for s in hospitals if (m, k) != ('native', 'logistic')}
    out = compare_once(hospitals, 'diagnosis', held_out='east', methods=('mean', 'per site', 'merged, mean', 'intersection'), models=models, rows=20, steps=3, choose=0)
    assert {r['site'] for r in out} == {'east'} and 'per site' not in {r['method'] for r in out} and all(r['n'] == len(hospitals['east']) for r in out)
    assert {s['over'] for s in summarise_sites(rows)} == {'mean', 'worst'}
    assert len(per_split(rows)) == 23 and paired_sites(rows, 'mean', 'mean', 'logistic')['difference'] == 0


def test_test_rows_do_not_reach_the_training(hospitals):
    "Other test rows, the same predictions for those that stay."
    train, test = split_sites(hospitals, 'diagnosis', 0)
    schema = read_schema(train, 'diagnosis')
    for method in ('iterative', 'merged, cvar', 'own columns'):
        p = prepare(method, train, schema, rows=20, **({} if method != 'merged, cvar' else dict(steps=3, choose=0)))
        whole, part = (site_probabilities(p, LogisticRegression(), 'east', t, schema, train['east']) for t in (test['east'], test['east'].iloc[:9]))
        np.testing.assert_allclose(whole[:9], part, rtol=1e-9)
    for a, b in zip(train.values(), test.values()): assert not len(a.merge(b))


def test_metrics():
    m = site_metrics([0, 0, 1, 1], [.1, .4, .35, .8])
    assert m['auroc'] == .75 and abs(m['brier'] - np.mean([.01, .16, .4225, .04])) < 1e-12
    assert site_metrics([0, 1] * 50, [.5] * 100)['ece'] < 1e-9 and abs(site_metrics([0, 1] * 50, [1.] * 100)['ece'] - .5) < 1e-9
    g = by_group([1, 0, 1, 1], [.9, .1, .2, .8], ['a', 'a', 'b', None])
    assert g == {'a': dict(n=2, n_positive=1, auroc=1., tpr=1., fpr=0.), 'b': dict(n=1, n_positive=1, auroc=None, tpr=0., fpr=None)}


def test_privacy_report_finds_copies(hospitals, merged):
    a, b = split_sites(hospitals, 'diagnosis', 0, test=.5)
    for t, expected in (a, 1.), (b, 0.):
        copy = pd.concat([v.sample(30, random_state=0) for v in t.values()])
        r = privacy_report(copy, merged.codec_, a, b)
        assert r['closer_to_member'] == expected and (r['copies'] > 80, r['copies_of_holdout'] > 80) == (expected == 1, expected == 0) and (r['membership_auc'] > .5) == (expected == 1)


# Files and the command

@pytest.fixture
def command(tmp_path, hospitals):
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    for k, t in hospitals.items(): t.to_csv(tmp_path/f'{k}.csv', index=False)
    def call(*extra, files=('north', 'east', 'south'), out='out.csv'):
        a = parser.parse_args(['merge', *[str(tmp_path/f'{k}.csv') for k in files], '--target', 'diagnosis', '--rows', '12', '--steps', '2', '-o', str(tmp_path/out), *extra])
        assert a.do is do_merge
        a.do(a)
    return call


def test_command(command, tmp_path, capsys):
    with pytest.warns(UserWarning, match='not for clinical use'): command()
    t = pd.read_csv(tmp_path/'out.csv')
    assert t.shape == (12, 14) and set(t.diagnosis) == {'benign', 'malignant'} and 'malignant' in capsys.readouterr().out
    first = (tmp_path/'out.csv').read_bytes()
    with pytest.raises(ValueError, match='exists already; --force'): command()
    with pytest.warns(UserWarning): command('--force')
    assert (tmp_path/'out.csv').read_bytes() == first
    with pytest.warns(UserWarning): command('--force', '--seed', '1', '--risk', 'mean')
    assert (tmp_path/'out.csv').read_bytes() != first


@pytest.mark.parametrize('extra, keywords, text', [
    ((), dict(out='north.csv'), 'is one of the tables'), ((), dict(out='out.parquet'), 'expected the name of a .csv'), (('--risk', 'x'), {}, 'risk'), ((), dict(files=('north', 'north')), 'given twice'),
    (('--categories', 'nope'), {}, "no table has a column 'nope'"), (('--device', 'cuda:99'), {}, 'cuda:99'), (('--rows', '0'), {}, 'rows: got 0')])
def test_command_refuses(command, tmp_path, extra, keywords, text):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=text): command(*extra, **keywords)
    assert sorted(tmp_path.iterdir()) == before


WRONG = {
    'no target': (lambda t: t.rename(columns=dict(diagnosis='result')), "table 'south': has no target column 'diagnosis'"),
    'one class': (lambda t: t.assign(diagnosis='benign'), "table 'south', column 'diagnosis': has one class only"),
    'other codes of the target': (lambda t: t.assign(diagnosis=np.arange(len(t)) % 2), "column 'diagnosis': table 'south' has the values [0, 1]"),
    'type': (lambda t: t.assign(**{'mean texture': 'coarse'}), "column 'mean texture': numbers in table 'north' and text such as 'coarse' in table 'south'"),
    'codes': (lambda t: t.assign(**{'worst texture': t['worst texture'].astype(object).where(t.index != 3, 'n.d.')}), "table 'south', column 'worst texture': 99% of the entries are numbers, but not 'n.d.'"),
    'nothing there': (lambda t: t.assign(**{c: np.nan for c in t if c != 'diagnosis'}), "table 'south': no column is filled"),
}
SUSPICIOUS = {
    'unit': (lambda t: t.assign(**{'mean smoothness': 1000 * t['mean smoothness']}), "column 'mean smoothness': the median is 0.09462 in table 'north' and 98.175 in table 'south'; are the units the same?"),
    'constant': (lambda t: t.assign(ward=7), "table 'south', column 'ward': is constant (7)"),
    'all missing': (lambda t: t.assign(**{'mean smoothness': np.nan}), "table 'south', column 'mean smoothness': has no value"),
}


@pytest.mark.parametrize('case', [*WRONG, *SUSPICIOUS])
def test_bad_files_get_one_line(tmp_path, hospitals, capsys, monkeypatch, case):
    "What is wrong is refused, with exit code 2 and nothing written; what is suspicious is said, and merged all the same."
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)              # main sets it
    change, line = {**WRONG, **SUSPICIOUS}[case]
    for k, t in hospitals.items(): (change(t) if k == 'south' else t).to_csv(tmp_path/f'{k}.csv', index=False)
    code = main(['merge', *(str(tmp_path/f'{k}.csv') for k in hospitals), '--target', 'diagnosis', '--rows', '12', '--steps', '1', '-o', str(tmp_path/'out.csv')])
    said = [l for l in capsys.readouterr().err.splitlines() if l.startswith('rdd-nb: ')]
    assert code == (2 if case in WRONG else 0) and (tmp_path/'out.csv').exists() == (case in SUSPICIOUS)
    assert said[-1].startswith(f'rdd-nb: {line}') if case in WRONG else said[0].startswith(f'rdd-nb: note: {line}')
    assert case == 'nothing there' or len(said) == (1 if case in WRONG else 2)     # the second one is the clinical warning


def test_missing_file(command):
    with pytest.raises(FileNotFoundError, match='nowhere.csv: there is no such file'): command(files=('nowhere', 'north'))


@pytest.mark.parametrize('content, text', [(b'', 'not a table'), (b'a,a\n1,2\n', "'a' occurs twice"), (b'a,b\n', 'has no rows'), (b'a,b\n1,2,3\n4,5,6,7\n', 'not a table'), (b'\xff\xfe\x00', 'not a table'), (b'1,2\n3,4\n', "a column is called '1'")])
def test_files_that_are_no_tables(tmp_path, content, text):
    (tmp_path/'t.csv').write_bytes(content)
    with pytest.raises(ValueError, match=text) as e: read_table(tmp_path/'t.csv')
    assert str(e.value).startswith(str(tmp_path/'t.csv')) and '\n' not in str(e.value)


def test_read_table(tmp_path):
    (tmp_path/'t.csv').write_bytes('\ufeffage, sex\n?,f\n3,\n'.encode())
    t = read_table(tmp_path/'t.csv')
    assert list(t) == ['age', 'sex'] and t.isna().sum().tolist() == [1, 1] and t.age.dtype == float


def test_hospitals():
    a, b = three_hospitals(1), three_hospitals(2)
    assert not a['north'].equals(b['north']) and sum(map(len, b.values())) == 569
    for k, t in three_hospitals(1, complete=True).items():
        pd.testing.assert_frame_equal(t[a[k].columns].where(a[k].notna()), a[k], check_dtype=False)
    assert as_tables(a) == a and columns_of(a['south'], read_schema(a, 'diagnosis')) == ['mean texture', 'mean smoothness', 'mean symmetry', 'size', 'worst symmetry', 'worst texture', 'worst compactness']


@pytest.mark.skipif('RDD_NB_DATA' not in os.environ, reason='RDD_NB_DATA does not name a folder with data')
def test_real_tables():
    heart = load_heart()
    assert {k: (t.disease == 'yes').sum() for k, t in heart.items()} == dict(cleveland=139, hungarian=106, switzerland=115, va=149)
    assert heart['switzerland'].chol.isna().all() and (heart['va'].chol.dropna() > 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for tables, target in (heart, 'disease'), (load_hepatitis_ilpd(), 'severe'), (load_diabetes(), 'diabetes'):
            s = MergeTables(**QUICK).fit(tables, target).synthetic_
            assert not s.isna().any().any() and set(s[target]) == {'no', 'yes'}
    assert set(load_hepatitis_ilpd()['hepatitis']) & set(load_hepatitis_ilpd()['ilpd']) == {'age', 'sex', 'bilirubin', 'alk_phosphate', 'sgot', 'albumin', 'severe'}


def test_loaders_say_what_they_lack(tmp_path, monkeypatch):
    monkeypatch.delenv('RDD_NB_DATA', raising=False)
    for load in (load_heart, load_hepatitis_ilpd, load_diabetes):
        with pytest.raises(FileNotFoundError, match='RDD_NB_DATA'): load()
        with pytest.raises(FileNotFoundError, match='nor in its folder'): load(tmp_path)
