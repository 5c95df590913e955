"""Sites: comparison without leaks, metrics and words, memory of patients, the command line."""
import json, os, warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression

from rdd_nb.cli import main
from rdd_nb.learners import default_models
from rdd_nb.merge import MergeTables, union_schema
from rdd_nb.cli import read_line
from rdd_nb.sites import (METHODS, compare_once, describe, paired_sites, per_split, prepare,
                          privacy_report, site_metrics, site_probabilities,
                          split_sites, summarise_sites, verdicts)
from rdd_nb.tables import three_hospitals


@pytest.fixture(scope='module')
def hospitals(): return three_hospitals()


@pytest.fixture(scope='module')
def merged(hospitals): return MergeTables(rows=40, steps=20, choose=2, progress=False).fit(hospitals, 'diagnosis')


# Comparison

def test_every_method_predicts(hospitals):
    models = dict(logistic=LogisticRegression(), boosting=default_models()['boosting'].set_params(max_iter=5))
    rows = compare_once(hospitals, 'diagnosis', methods=METHODS, models=models, complete=three_hospitals(complete=True),
                        rows=20, steps=3, choose=0)
    found = {(r['method'], r['model'], r['site']) for r in rows}
    assert found == {(m, k, s) for m in (*METHODS, 'nothing missing') for k in models for s in hospitals
                     if (m, k) != ('native', 'logistic')}
    out = compare_once(hospitals, 'diagnosis', held_out='east', methods=('mean', 'per site', 'merged, mean',
        'intersection'), models=models, rows=20, steps=3, choose=0)
    assert {r['site'] for r in out} == {'east'} and 'per site' not in {r['method']
        for r in out} and all(r['n'] == len(hospitals['east']) for r in out)
    assert {s['over'] for s in summarise_sites(rows)} == {'mean', 'worst'}
    assert len(per_split(rows)) == 21 and paired_sites(rows, 'mean', 'mean', 'logistic')['difference'] == 0


def test_test_rows_do_not_reach_the_training(hospitals):
    "Other test rows, the same predictions for those that stay."
    train, test = split_sites(hospitals, 'diagnosis', 0)
    schema = union_schema(train, 'diagnosis')
    for method in ('iterative', 'merged, cvar', 'own columns'):
        p = prepare(method, train, schema, rows=20, **({} if method != 'merged, cvar' else dict(steps=3, choose=0)))
        whole, part = (site_probabilities(p, LogisticRegression(), 'east', t, schema, train['east'])
                       for t in (test['east'], test['east'].iloc[:9]))
        np.testing.assert_allclose(whole[:9], part, rtol=1e-9)
    for a, b in zip(train.values(), test.values()): assert not len(a.merge(b))


def test_metrics():
    m = site_metrics([0, 0, 1, 1], [.1, .4, .35, .8])
    assert m['auroc'] == .75 and abs(m['brier'] - np.mean([.01, .16, .4225, .04])) < 1e-12
    assert site_metrics([0, 1] * 50, [.5] * 100)['ece'] < 1e-9 and abs(site_metrics([0, 1] * 50,
        [1.] * 100)['ece'] - .5) < 1e-9


def test_privacy_report_finds_copies(hospitals, merged):
    a, b = split_sites(hospitals, 'diagnosis', 0, test=.5)
    for t, expected in (a, 1.), (b, 0.):
        copy = pd.concat([v.sample(30, random_state=0) for v in t.values()])
        r = privacy_report(copy, merged.codec_, a, b)
        assert r['closer_to_member'] == expected and (r['copies'] > 80, r['copies_of_holdout'] > 80) == (expected == 1,
            expected == 0) and (r['membership_auc'] > .5) == (expected == 1)


# Files and the command

@pytest.fixture
def command(tmp_path, hospitals):
    for k, t in hospitals.items(): t.to_csv(tmp_path/f'{k}.csv', index=False)
    def call(*extra, files=('north', 'east', 'south'), out='out.csv'):
        tables = [str(tmp_path/f'{k}.csv') for k in files]
        merge, asked = read_line(['merge', *tables, '--target', 'diagnosis', '--rows', '12', '--steps', '2', '-o',
                                  str(tmp_path/out), *extra])
        merge(**asked)
    return call


def test_command(command, tmp_path, capsys):
    with pytest.warns(UserWarning, match='not for clinical use'): command()
    t = pd.read_csv(tmp_path/'out.csv')
    assert t.shape == (12, 14) and set(t.diagnosis) == {'benign',
                                                        'malignant'} and 'malignant' in capsys.readouterr().out
    first = (tmp_path/'out.csv').read_bytes()
    with pytest.raises(ValueError, match='exists already; --force'): command()
    with pytest.warns(UserWarning): command('--force')
    assert (tmp_path/'out.csv').read_bytes() == first
    with pytest.warns(UserWarning): command('--force', '--seed', '1', '--risk', 'mean')
    assert (tmp_path/'out.csv').read_bytes() != first


@pytest.mark.parametrize('extra, keywords, text', [
    ((), dict(out='north.csv'), 'is one of the tables'), ((), dict(out='out.parquet'), 'expected the name of a .csv'),
    (('--risk', 'x'), {}, 'risk'), ((), dict(files=('north', 'north')), 'given twice'),
    (('--categories', 'nope'), {}, "no table has a column 'nope'"), (('--device', 'cuda:99'), {}, 'cuda:99'),
    (('--rows', '0'), {}, 'rows: got 0')])
def test_command_refuses(command, tmp_path, extra, keywords, text):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=text): command(*extra, **keywords)
    assert sorted(tmp_path.iterdir()) == before


WRONG = {
    'no target': (lambda t: t.rename(columns=dict(diagnosis='result')),
                  "table 'south': has no target column 'diagnosis'"),
    'one class': (lambda t: t.assign(diagnosis='benign'), "table 'south', column 'diagnosis': has one class only"),
    'other codes of the target': (lambda t: t.assign(diagnosis=np.arange(len(t)) % 2),
                                  "column 'diagnosis': table 'south' has the values [0, 1]"),
    'type': (lambda t: t.assign(**{'mean texture': 'coarse'}),
             "column 'mean texture': numbers in table 'north' and text such as 'coarse' in table 'south'"),
    'codes': (lambda t: t.assign(**{'worst texture': t['worst texture'].astype(object).where(t.index != 3, 'n.d.')}),
              "table 'south', column 'worst texture': 99% of the entries are numbers, but not 'n.d.'"),
    'nothing there': (lambda t: t.assign(**{c: np.nan for c in t if c != 'diagnosis'}),
                      "table 'south': shares no column"),
    'unit': (lambda t: t.assign(**{'mean smoothness': 1000 * t['mean smoothness']}),
             "column 'mean smoothness': the median is 0.09462 in table 'north' and 98.175 in table 'south': the same "
             "unit?"),
}
SUSPICIOUS = {
    'constant': (lambda t: t.assign(ward=7), "table 'south', column 'ward': is constant (7)"),
    'all missing': (lambda t: t.assign(**{'mean smoothness': np.nan}),
                    "table 'south', column 'mean smoothness': has no value"),
}


@pytest.mark.parametrize('case', [*WRONG, *SUSPICIOUS])
def test_bad_files_get_one_line(tmp_path, hospitals, capsys, monkeypatch, case):
    "What is wrong is refused, with exit code 2 and nothing written; what is odd is said, and merged all the same."
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)              # main sets it
    change, line = {**WRONG, **SUSPICIOUS}[case]
    for k, t in hospitals.items(): (change(t) if k == 'south' else t).to_csv(tmp_path/f'{k}.csv', index=False)
    code = main(['merge', *(str(tmp_path/f'{k}.csv') for k in hospitals), '--target', 'diagnosis', '--rows', '12',
                 '--steps', '1', '-o', str(tmp_path/'out.csv')])
    said = [l for l in capsys.readouterr().err.splitlines() if l.startswith('rdd-nb: ')]
    assert code == (2 if case in WRONG else 0) and (
        tmp_path/'out.csv').exists() == (tmp_path/'out.json').exists() == (case in SUSPICIOUS)
    assert said[-1].startswith(f'rdd-nb: {line}') if case in WRONG else said[0].startswith(f'rdd-nb: note: {line}')
    # the second one is the clinical warning
    assert case == 'nothing there' or len(said) == (1 if case in WRONG else 2)


def test_missing_file(command):
    with pytest.raises(FileNotFoundError, match='nowhere.csv: there is no such file'):
        command(files=('nowhere', 'north'))


@pytest.mark.parametrize('extra', [['--missing', 'mean texture=-999'], ['--accept', 'mean texture'],
                                   ['--drop', 'mean texture']])
def test_options_that_answer_a_question(tmp_path, hospitals, monkeypatch, capsys, extra):
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)
    for k, t in hospitals.items():
        (t.assign(**{'mean texture': t['mean texture'].fillna(-999)}) if k == 'south'
         else t).to_csv(tmp_path/f'{k}.csv', index=False)
    line = ['merge', *(str(tmp_path/f'{k}.csv') for k in hospitals), '--target', 'diagnosis', '--rows', '12', '--steps',
            '1', '-o', str(tmp_path/'out.csv')]
    assert main(line) == 2 and extra[0] in capsys.readouterr().err
    assert main([*line, *extra]) == 0
    t = pd.read_csv(tmp_path/'out.csv')
    assert ('mean texture' in t) == (extra[0] != '--drop') and (extra[0] != '--missing' or t['mean texture'].min() > 0)


def test_one_field_too_many_is_refused(tmp_path, hospitals, capsys, monkeypatch):
    "A separator at the end of each row moved every column by one, with exit code 0."
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)
    for k, t in hospitals.items():
        head, *rows = t.to_csv(index=False).splitlines()
        (tmp_path/f'{k}.csv').write_text('\n'.join([head, *(r + ',' * (k == 'east') for r in rows)]) + '\n')
    assert main(['merge', *(str(tmp_path/f'{k}.csv') for k in hospitals), '--target', 'diagnosis', '--rows', '12',
                 '--steps', '1', '-o', str(tmp_path/'out.csv')]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path/'east.csv'}: line 2: 9 fields, the first line has 8 (a separator at the end of the row" in said
    assert not (tmp_path/'out.csv').exists()


def test_what_stands_beside_the_table(command, tmp_path, hospitals):
    with pytest.warns(UserWarning): command('--order', 'mean symmetry <= worst symmetry', '--positive', 'benign')
    card, t = json.loads((tmp_path/'out.json').read_text()), pd.read_csv(tmp_path/'out.csv')
    assert card['positive'] == 'benign' and card[
        'prevalence'] == (t.diagnosis == 'benign').mean() and (t['mean symmetry'] <= t['worst symmetry']).all()
    assert {k: s['prevalence'] for k, s in card[
        'sites'].items()} == {k: pytest.approx((v.diagnosis == 'benign').mean()) for k, v in hospitals.items()}
    seen = lambda a, b: any({a, b} <= {*v} for v in hospitals.values())
    names = [c['name'] for c in card['columns']]
    assert {tuple(p) for p in card['never_together']} == {(a, b) for i, a in enumerate(names) for b in names[i + 1:]
                                                          if not seen(a, b)} != set()
    assert len(card['files']) == 3 and all(len(h) == 64
                                           for h in card[
                                               'files'].values(
                                                   )) and card[
                                                       'settings']['rows'] == 12 and card['order'] == [['mean symmetry',
                                                           'worst symmetry']]


def test_distilled_tables_are_merged_without_raw_rows(tmp_path, hospitals, monkeypatch, capsys):
    "Each site hands out a distilled file. Its columns were looked at there, and are not asked about again."
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)
    def merge(*files, out, extra=()):
        line = ['--target', 'diagnosis', '--rows', '12', '--steps', '2', '-o', str(tmp_path/out), *extra]
        return main(['merge', *(str(tmp_path/f) for f in files), *line])
    tables = {k: t.assign(case=np.arange(len(t)) * 3) for k, t in hospitals.items()}       # looks like an identifier
    for k, t in tables.items():
        t.to_csv(tmp_path/f'{k}.csv', index=False)
        assert merge(f'{k}.csv', out=f'{k}-out.csv') == 2 and '--accept' in capsys.readouterr().err
        assert merge(f'{k}.csv', out=f'{k}-out.csv', extra=['--accept', 'case']) == 0
        made = pd.read_csv(tmp_path/f'{k}-out.csv')
        assert not len(made.merge(t)) and set(made) == set(t)                              # made rows, no patient
        assert len(json.loads((tmp_path/f'{k}-out.json').read_text())['sites']) == 1
        (tmp_path/f'{k}.csv').unlink()                                                     # raw rows are gone
    assert merge(*(f'{k}-out.csv' for k in tables), out='all.csv') == 0, capsys.readouterr().err
    card = json.loads((tmp_path/'all.json').read_text())
    assert {k: s['distilled_from'] for k, s in card['sites'].items()} == {f'{k}-out': len(t) for k, t in tables.items()}
    words = (tmp_path/'all.md').read_text()
    assert 'no differential privacy' in words and f"itself distilled from {len(tables['east'])} rows" in words
    changed = (tmp_path/'east-out.csv').read_text().splitlines()                  # no longer what was handed out
    (tmp_path/'east-out.csv').write_text('\n'.join(changed[:-1]) + '\n')
    accepted = ['--accept', 'case', '--accept', 'east-out']
    assert merge(*(f'{k}-out.csv' for k in tables), out='again.csv', extra=accepted) == 0
    sites = json.loads((tmp_path/'again.json').read_text())['sites']
    assert [k for k, s in sites.items() if 'distilled_from' in s] == ['north-out', 'south-out']


# Words for differences

def test_verdicts_are_symmetric_and_corrected():
    r = np.random.default_rng(0)
    pairs = [dict(metric=m, difference=d, p=p) for m in ('auroc', 'brier') for d in (.1, -.1) for p in (1e-4, .012, .5)]
    v = verdicts(pairs)
    assert v[v.p == 1e-4].verdict.tolist() == ['better', 'worse', 'worse',
                                               'better'] and set(v[v.p > .01].verdict) == {'no difference shown'}
    assert verdicts([dict(p, difference=-p['difference']) for p in pairs]).verdict.map({'better': 'worse',
        'worse': 'better'}).fillna('no difference shown').tolist() == v.verdict.tolist()
    p = r.uniform(size=40) ** 3
    np.testing.assert_allclose(verdicts([dict(metric='auroc', difference=1, p=x) for x in p]).holm[p.argmin()],
                               40 * p.min())


def test_overlapping_splits_get_wider_intervals():
    rows = [dict(method=m, model='x', seed=s, site='a', auroc=.7 + .01 * s * (m == 'new')) for m in ('old', 'new')
            for s in range(5)]
    d, pair = np.arange(5) * .01, paired_sites(rows, 'new', 'old', 'x')
    error = np.sqrt((1 / 5 + 3 / 7) * d.var(ddof=1))
    assert pair['p'] == pytest.approx(2 * stats.t.sf(d.mean() / error,
                                                     4)) and pair[
                                                         'high'] - pair['low'] == pytest.approx(2 * stats.t.ppf(.975,
                                                             4) * error)
    alone = paired_sites(rows[::5], 'new', 'old', 'x')
    assert alone['low'] is None and alone['p'] == 1


# The tables of the benchmark

def benchmark():
    spec = spec_from_file_location('merge_benchmark', Path(__file__).resolve().parents[1]/'benchmarks'/'merge.py')
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif('RDD_NB_DATA' not in os.environ, reason='RDD_NB_DATA does not name a folder with data')
def test_real_tables():
    parts = benchmark().PARTS
    heart = parts['heart'].load(0)
    assert {k: (t.disease == 'yes').sum() for k, t in heart.items()} == dict(cleveland=139, hungarian=106,
        switzerland=115, va=149)
    assert heart['switzerland'].chol.isna().all() and (heart['va'].chol.dropna() > 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name, part in parts.items():
            s = MergeTables(rows=20, steps=4, choose=0, progress=False, accept=part.accept).fit(part.load(0),
                part.target).synthetic_
            assert not s.isna().any().any() and s[part.target].nunique() == 2, name


def test_loaders_say_what_they_lack(monkeypatch):
    monkeypatch.delenv('RDD_NB_DATA', raising=False)
    with pytest.raises(FileNotFoundError, match='RDD_NB_DATA'): benchmark().PARTS['heart'].load(0)
