"Tables as data: from a CSV file to typed rows, their evaluation and a report; what is refused; who sees groups."
import json
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LogisticRegression, Ridge

import rdd_nb
from rdd_nb.cli import main
from rdd_nb.distill import Distiller, distill
from rdd_nb.training import Training
from rdd_nb.evaluation import evaluate
from rdd_nb.methods import METHODS, as_method
from rdd_nb.priors import Quantiles
from rdd_nb.sources import load_data
from rdd_nb.synthetic import load
from rdd_nb.tabular import frame_of, split_table

FEATURES = ['age', 'dose', 'gain', 'pain', 'smokes']


def ward(n=240, seed=0):
    "Rows of three classes with numbers, a spike at zero, a category, truth values, holes and two group columns."
    r = np.random.default_rng(seed)
    t = pd.DataFrame(dict(age=r.integers(20, 90, n), dose=r.gamma(2, 3, n).round(1),
                          gain=np.where(r.random(n) < .8, 0, r.integers(1, 40, n) * 50),
                          pain=r.choice(['none', 'mild', 'strong'], n), smokes=r.random(n) < .3,
                          wing=r.choice(['north', 'south'], n, p=[.8, .2]), sex=r.choice(['f', 'm'], n)))
    risk = (t.age - 55) / 20 + (t.pain == 'strong') + .3 * r.normal(size=n)
    t['ill'] = np.select([risk < -.5, risk < .7], ['no', 'perhaps'], 'yes')
    return t.assign(age=t.age.astype('Int64').mask(r.random(n) < .1), pain=t.pain.mask(r.random(n) < .1))


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    "Runs a command inside a folder with `ward.csv`: exit code, standard output, standard error."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, 'showwarning', warnings.showwarning)      # `main` replaces it
    ward().to_csv('ward.csv', index=False)
    def run(line):
        capsys.readouterr()
        cpu = ['--device', 'cpu'] if line.split()[0] in ('distill', 'evaluate', 'sweep') else []
        return main([*line.split(), *cpu]), *capsys.readouterr()
    return run


MADE = 'distill ward.csv --target ill --groups wing,sex --ipc 4 --steps 4 --out run'


# From the file to the report

def test_from_a_file_to_a_report(call, tmp_path):
    code, out, err = call(MADE)
    assert code == 0 and '12 synthetic rows in run/synthetic.csv' in out, err
    assert {p.name for p in (tmp_path/'run').iterdir()} == {'synthetic.safetensors', 'synthetic.csv', 'config.json',
                                                            'metrics.jsonl'}
    rows, s = pd.read_csv('run/synthetic.csv'), load('run/synthetic.safetensors')
    pd.testing.assert_frame_equal(rows, frame_of(s), check_dtype=False)      # the table is the record
    assert list(rows) == [*FEATURES, 'ill'] and rows.ill.value_counts().to_dict() == dict(no=4, perhaps=4, yes=4)
    assert s.provenance['source'] | dict(share=0) == dict(name='ward.csv', shift='none', share=0, data_seed=0,
                                                          target='ill', groups='wing,sex')
    assert call('evaluate run --epochs 3')[0] == 0
    found = json.loads((tmp_path/'run'/'report.json').read_text())
    assert [r['method'].rsplit(' @ ')[1] for r in found['rows']] == ['logistic', 'boosting', 'mlp']
    assert set(found['rows'][0]['group_accuracy']) == {'north & f', 'north & m', 'south & f', 'south & m'}
    assert call('report run')[0] == 0 and 'boosting' in (tmp_path/'run'/'report.html').read_text()
    assert call('evaluate run --model logistic')[1].startswith('run: accuracy')
    assert len(json.loads((tmp_path/'run'/'report.json').read_text())['rows']) == 1


def test_the_numbers_are_those_of_scikit_learn(call):
    call(MADE)
    call('evaluate run --model logistic')
    row, = json.load(open('run/report.json'))['rows']
    test = load_data('ward.csv', target='ill', groups=['wing', 'sex']).test
    s = load('run/synthetic.safetensors')
    model = LogisticRegression(max_iter=2000).fit(test.table.transform(pd.read_csv('run/synthetic.csv')), s.y.numpy())
    hit = model.predict(test.table.transform(frame_of(test))) == test.y.numpy()
    assert row['accuracy'] == pytest.approx(hit.mean())
    by = {g: hit[test.group.numpy() == i].mean() for i, g in enumerate(test.groups)}
    assert row['group_accuracy'] == pytest.approx(by)


def test_a_stopped_run_goes_on(call, monkeypatch, tmp_path):
    line = MADE.replace('--steps 4', '--steps 60')
    assert call(line.replace('--out run', '--out whole'))[0] == 0
    step = Distiller.step
    def stop(self):
        if self.step_number == 55: raise KeyboardInterrupt
        return step(self)
    monkeypatch.setattr(Distiller, 'step', stop)
    assert call(line)[0] == 130 and not (tmp_path/'run'/'synthetic.csv').exists()
    monkeypatch.setattr(Distiller, 'step', step)
    assert 'already holds this run' in call(line)[2]
    assert call(line + ' --resume')[0] == 0
    assert (tmp_path/'run'/'synthetic.csv').read_text() == (tmp_path/'whole'/'synthetic.csv').read_text()


def test_a_sweep_over_a_table(call, tmp_path):
    (tmp_path/'grid.toml').write_text('seeds = 1\nipc = 3\nalso = ["random", "full"]\n[data]\nname = "ward.csv"\n'
        'target = "ill"\ngroups = "wing"\ndrop = ["dose"]\n[training]\nmodel = "logistic"\n'
        '[grid]\nmethod = ["rows"]\nsteps = 2\n')
    code, out, err = call('sweep grid.toml --jobs 1')
    assert code == 0, err
    rows = {r['method']: r for r in json.loads((tmp_path/'grid-sweep'/'report.json').read_text())['rows']}
    assert list(rows) == ['random', 'full', 'rows steps=2']
    assert set(rows['full']['group_accuracy']) == {'north', 'south'}
    assert 'LogisticRegression' in rows['full']['training']['estimator'] and rows['full']['images'] == 156
    assert list(pd.read_csv(next(tmp_path.glob('grid-sweep/runs/rows*/synthetic.csv')))) == ['age', 'gain', 'pain',
                                                                                            'smokes', 'sex', 'ill']


def test_a_choice_without_labels(call, monkeypatch):
    from rdd_nb import auto
    monkeypatch.setattr(auto, 'ROWS', {k: METHODS[k] for k in ('random', 'kmeans')})
    code, out, err = call('distill ward.csv --target ill --groups wing --method auto --ipc 3 --out chosen')
    assert code == 0 and 'chosen:' in out, err
    assert set(json.load(open('chosen/auto.json'))['scores']) == {'random', 'kmeans'}


# A target that is a number

@pytest.fixture
def patients(call):
    raw = load_diabetes(as_frame=True, scaled=False).frame.rename(columns=dict(target='progress'))
    raw.assign(sex=np.where(raw.sex == 1, 'f', 'm')).to_csv('patients.csv', index=False)
    return 'distill patients.csv --target progress --groups sex --ipc 20 --steps 4 --seed {0} --out run{0}'


def test_a_number_from_a_file_to_a_report(call, patients, tmp_path):
    code, out, err = call(patients.format(0))
    assert code == 0 and 'so a number is predicted' in out and '20 synthetic rows' in out, err
    rows, raw = pd.read_csv('run0/synthetic.csv'), pd.read_csv('patients.csv')
    assert list(rows) == [c for c in raw if c != 'sex']
    assert rows.progress.dtype == 'int64' and rows.progress.nunique() > 10
    assert rows.progress.between(raw.progress.min(), raw.progress.max()).all()
    assert call(patients.format(1) + ' --task regression')[1].startswith('20 synthetic rows')     # asked for: no note
    code, out, err = call('evaluate run0 run1')
    assert code == 0 and 'run0 @ ridge: R2 0.' in out and 'worst group' in out, err
    found = json.load(open('run0/report.json'))['rows']
    assert [r['method'].rsplit(' @ ')[1] for r in found] == ['ridge', 'boosting', 'mlp']
    test = load_data('patients.csv', target='progress', groups='sex').test
    codec, encoded = test.table, test.x.double().numpy()
    at = [c.name for c in codec.numbers_].index('progress')
    truth = encoded[:, at] * codec.scale_[at] + codec.mean_[at]     # not clipped to the training rows
    assert set(truth.round()) <= set(raw.progress) and truth.max() > rows.progress.max()
    x, tx = (np.delete(t, at, 1) for t in (codec.transform(rows), encoded))
    error = (Ridge().fit(x, rows.progress).predict(tx) - truth)**2
    assert found[0]['rmse'] == pytest.approx(error.mean()**.5, rel=1e-3)
    by = {g: error[test.group.numpy() == i].mean()**.5 for i, g in enumerate(test.groups)}
    assert found[0]['group_rmse'] == pytest.approx(by, rel=1e-3)
    assert found[0]['worst_group'] == max(by, key=by.get)
    assert call('report run0 run1 --out both')[0] == 0
    page = (tmp_path/'both'/'report.md').read_text()
    assert '| rows, steps=4 @ ridge | 2 |' in page and 'RMSE, f (n = ' in page and 'Errors by group' in page
    assert call('evaluate run0 --model boosting')[1].startswith('run0: R2')


def test_what_a_number_refuses(call, patients, tmp_path):
    call(patients.format(0))
    assert 'expected ridge, boosting, mlp' in call('evaluate run0 --model logistic')[2]
    assert 'cannot act' in call('evaluate run0 --protocol dm')[2]
    assert 'corruptions' in call('evaluate run0 --corruptions common')[2]
    call('distill patients.csv --target sex --ipc 4 --steps 2 --out classes')
    call('evaluate run0 --model ridge'), call('evaluate classes --model logistic')
    code, _, err = call('report run0 classes --out both')
    assert code == 2 and err.count('\n') == 1 and not (tmp_path/'both').exists()
    (tmp_path/'grid.toml').write_text('[data]\nname = "patients.csv"\ntarget = "progress"\n[grid]\nmethod = ["rows"]\n')
    code, _, err = call('sweep grid.toml --jobs 1')
    assert code == 2 and err.count('\n') == 1 and 'a comparison is of accuracies' in err


def test_a_stopped_run_of_a_number_goes_on(call, patients, monkeypatch, tmp_path):
    line = patients.format(0).replace('--steps 4', '--steps 60')
    assert call(line.replace('--out run0', '--out whole'))[0] == 0
    step = Distiller.step
    def stop(self):
        if self.step_number == 55: raise KeyboardInterrupt
        return step(self)
    monkeypatch.setattr(Distiller, 'step', stop)
    assert call(line)[0] == 130
    monkeypatch.setattr(Distiller, 'step', step)
    assert call(line + ' --resume')[0] == 0
    assert (tmp_path/'run0'/'synthetic.csv').read_text() == (tmp_path/'whole'/'synthetic.csv').read_text()


@pytest.mark.parametrize('method', ['random', 'stratified', 'kmeans', 'rows', 'rdd-distance'])
def test_a_number_is_distilled_without_groups(method):
    train = split_table(ward().drop(columns='ill'), 'dose', ['wing']).train
    changes = dict(steps=3) if METHODS[method].objective else {}
    make = lambda data: distill(data, method, 12, device='cpu', progress=False, **changes)
    s = make(train)
    assert s.x.equal(make(train._with(group=train.group.roll(1))).x) and len(s) == 12
    assert set(frame_of(s).dose) - set(frame_of(train).dose) == set() or method == 'rdd-distance'


def test_few_numbers_are_classes_unless_asked(call):
    line = 'distill ward.csv --target score --method random --ipc 3 --out {}'
    pd.read_csv('ward.csv').assign(score=lambda t: t.index % 8).to_csv('ward.csv', index=False)
    assert '24 synthetic rows' in call(line.format('a'))[1]
    assert '3 synthetic rows' in call(line.format('b') + ' --task regression')[1]


# What rows are

@pytest.mark.parametrize('method', ['random', 'distribution', 'rdd-distance', 'rows', 'rdd-rows', 'kernel'])
def test_types_and_ranges_are_kept(method):
    train = split_table(ward(), 'ill', ['wing']).train
    changes = dict(steps=5) if METHODS[method].objective else {}
    t, real = frame_of(distill(train, method, 4, device='cpu', progress=False, **changes)), frame_of(train)
    assert t.age.dropna().isin(range(20, 90)).all() and t.gain.dtype == 'int64' and t.smokes.dtype == bool
    for c in ('age', 'dose', 'gain'): assert t[c].dropna().between(real[c].min(), real[c].max()).all()
    assert np.allclose(t.dose.round(1), t.dose) and set(t.pain.dropna()) <= {'none', 'mild', 'strong'}
    assert set(t.ill) == {'no', 'perhaps', 'yes'}


def test_holes_and_spikes_survive():
    train = split_table(ward(), 'ill', ['wing']).train
    s = distill(train, 'rows', 20, device='cpu', progress=False, steps=30)
    t, real = frame_of(s), frame_of(train)
    assert not s.x.equal(s.initial)
    assert t.age.isna().any() and t.age.isna().mean() < .4
    assert set(t.gain) <= set(real.gain) and .6 < (t.gain == 0).mean()
    moved = frame_of(distill(train, 'rows', 20, device='cpu', progress=False, steps=30, prior='pixels'))
    assert (moved.gain == 0).mean() < (t.gain == 0).mean()          # what moving the numbers themselves does


def test_ranks_move_only_to_values_that_occur():
    x = torch.tensor([[0., 5], [0, 1], [0, 3], [2, 9]])
    p = Quantiles().begin(x[:2], x)
    assert p.decode().equal(x[:2])
    for step in (-9., -.4, .4, 9.):
        z = p._decode(p.parameters[0].detach() + step)
        assert all(set(z[:, j].tolist()) <= set(x[:, j].tolist()) for j in (0, 1))
    assert p._decode(p.parameters[0].detach() + 99).tolist() == [[2, 9], [2, 9]]
    p.decode().sum().backward()
    assert p.parameters[0].grad.equal(torch.ones(2, 2))
    constant = Quantiles().begin(torch.ones(3, 1), torch.ones(5, 1))
    assert constant._decode(constant.parameters[0] + 1).equal(torch.ones(3, 1))


def test_the_codec_knows_training_rows_only():
    t = ward()
    parts = split_table(t, 'ill', ['wing'])
    column = parts.train.table.schema.columns['dose']
    assert (column.low, column.high) == (frame_of(parts.train).dose.min(), frame_of(parts.train).dose.max())
    spread = parts.train.x[:, list(parts.train.table.get_feature_names_out()).index('dose')]
    assert abs(spread.mean()) < 1e-6 and abs(spread.std(correction=0) - 1) < 1e-6
    assert {len(p) for p in parts} == {156, 24, 60}
    assert split_table(t, 'ill', ['wing'], seed=1).test.y.equal(parts.test.y)          # the test rows stay


def test_copies_of_a_row_stay_together_unless_the_table_is_coarse():
    t = ward().drop(columns=['wing', 'sex'])
    few = pd.concat([t, t[:12]], ignore_index=True)
    parts = split_table(few, 'ill')
    assert rdd_nb.data.overlap(parts.test, parts.train) == 0
    coarse = pd.DataFrame(dict(a=list('xy') * 60, b=list('uuvv') * 30, ill=list('nyyn') * 15 + list('nyyy') * 15))
    assert {len(p) for p in split_table(coarse, 'ill')} == {78, 12, 30}
    assert len(frame_of(split_table(coarse, 'ill').train).drop_duplicates(['a', 'b'])) == 4


def test_data_frames_and_the_face():
    parts = rdd_nb.load_data(ward(), target='ill', groups='wing', limit=120)
    assert sum(map(len, parts)) == 120 and parts.train.groups == ['north', 'south'] and parts.source is None
    assert rdd_nb.load_data is load_data
    row = evaluate(parts.train, parts.test, Training('boosting'), device='cpu')
    assert 'HistGradient' in row['training']['estimator'] and row['networks'] == 1


def test_a_parquet_file(tmp_path):
    pytest.importorskip('pyarrow')
    ward().to_parquet(tmp_path/'ward.parquet')
    ward().to_csv(tmp_path/'ward.csv', index=False)
    a, b = (load_data(tmp_path/f'ward.{end}', target='ill', groups='sex').train for end in ('parquet', 'csv'))
    assert a.x.equal(b.x) and a.y.equal(b.y)


# Who sees groups

@pytest.mark.parametrize('method', ['random', 'kmeans', 'density', 'rdd-distance', 'rows', 'rdd-rows'])
def test_groups_do_not_influence_an_honest_method(method):
    train = split_table(ward(), 'ill', ['wing']).train
    assert not any('wing' in f for f in train.table.get_feature_names_out())
    changes = dict(steps=3) if METHODS[method].objective else {}
    make = lambda data, m: distill(data, m, 4, device='cpu', progress=False, **changes).x
    other = train._with(group=train.group.roll(1))
    assert make(train, method).equal(make(other, method))
    assert make(train, method).equal(make(train.without_groups(), method))
    told = as_method('rows', risk='mean', risk_at='distance', clustering='groups') if changes else 'group-balanced'
    assert not make(train, told).equal(make(other, told))            # so the labels would matter


# What is refused, and what is only said

def write(name, text): open(name, 'wb').write(text if isinstance(text, bytes) else text.encode())


GOOD = 'a,b,ill\n' + ''.join(f'{i % 17},{i * 7 % 23},{"yes" if i % 3 else "no"}\n' for i in range(60))
REFUSED = [  # file, flags, what is said
    (GOOD, '', "needs the column to predict .--target.; there are 'a', 'b', 'ill'"),
    (GOOD, '--target sick', "target: there is no column 'sick'; there are 'a'"),
    (GOOD, '--target ill --groups c', "groups: there is no column 'c'"),
    (GOOD, '--target ill --groups ill', "groups: 'ill' is the target"),
    (GOOD, '--target ill --groups b,b', "groups: 'b' occurs twice"),
    (GOOD, '--target ill --drop c', "drop: there is no column 'c'"),
    (GOOD, '--target ill --drop ill', "drop: 'ill' is needed"),
    (GOOD, '--target ill --categories c', "categories: there is no column 'c'"),
    (GOOD, '--target ill --accept c', "accept: there is no column 'c'"),
    (GOOD, '--target ill --drop a --drop b', 'no column beside target'),
    (GOOD, '--target b --method gradient', 'objective=GradientMatching.*the target is a number'),
    (GOOD, '--target b --method rdd-rows', "clustering=KMeansClustering.k=4, space='errors'.*the target is a number"),
    (GOOD, '--target b --method auto', 'method auto: chooses by errors of classes'),
    (GOOD, '--target b --set labels=teacher', 'labels=.*the target is a number'),
    (GOOD, '--target b --set network.steps=2', 'network.steps=2'),
    (GOOD, '--target b --ipc 50', 'ipc=50 is more than the 3'),
    (GOOD, '--target ill --task regression', "got text such as"),
    (GOOD.replace('b,', 'follow_up,', 1), '--target follow_up', 'survival models are not supported'),
    (GOOD, '--target ill --shift blur', 'a table has its own groups'),
    (GOOD, '--target ill --ipc 40', 'ipc=40 is more than'),
    (GOOD, '--target ill --method idc', 'made for images, not for rows'),
    (GOOD, '--target ill --method patches', 'packs patches of images'),
    (GOOD, '--target ill --method group-balanced', 'needs a data set with group ids'),
    (GOOD, '--target ill --set prior=frequencies(0.5)', 'needs images'),
    ('a,ill\n' + ''.join(f'{i % 9},c{i}\n' for i in range(10_000)), '--target ill', '10000 different texts'),
    ('a,ill\n' + ''.join(f'{i % 9},c{i % 1500}\n' for i in range(6000)), '--target ill', 'expected 2 to 1000 classes'),
    ('a,ill\n' + ''.join(f'{i % 9},{"x" if i else "y"}\n' for i in range(60)), '--target ill', "class 'y' has 1 of 60"),
    ('a,ill\n' + ''.join(f'{i % 9},same\n' for i in range(60)), '--target ill', '1 different values'),
    ('a,ill\n' + ''.join(f'{i % 9},\n' for i in range(60)), '--target ill', 'has no value in any row'),
    (GOOD + '1,2,3,yes\n', '--target ill', 'line 62: 4 fields, the first line has 3'),
    (GOOD.replace('\n3,', '\n-999,'), '--target ill', '--missing a=-999'),
    ('a,zip,ill\n' + ''.join(f'{i % 9},{10000 + i % 7},{i % 2}\n' for i in range(60)), '--target ill', 'a postal code'),
    ('a,ill\n1,0\n2,1\n', '--target ill', 'expected at least 3'),
]


@pytest.mark.parametrize('text, flags, says', REFUSED, ids=[f'{f} {s}'[:60] for _, f, s in REFUSED])
def test_one_line_for_what_does_not_fit(call, tmp_path, text, flags, says):
    write('t.csv', text)
    before = sorted(p.name for p in tmp_path.iterdir())
    code, _, err = call(f'distill t.csv {flags} --out run'.replace('  ', ' '))
    assert code == 2 and err.count('\n') == 1 and len(err) <= 300 and re.search(says, err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_table_is_told_from_other_data(call):
    assert 'digits is no table' in call('distill digits --target y')[2]
    assert 'there is no such file' in call('distill lost.csv --target y')[2]
    with pytest.raises(ValueError, match='is a table'): load_data('ward.csv', size=8, target='ill')


def test_other_ways_to_write_the_same_table(call):
    first = load_data('ward.csv', target='ill').train
    write('semi.csv', ward().to_csv(index=False, sep=';'))
    assert load_data('semi.csv', target='ill').train.x.equal(first.x)
    write('latin.csv', ward().assign(pain=ward().pain.replace('mild', 'mäßig')).to_csv(index=False).encode('latin-1'))
    code, _, err = call('distill latin.csv --target ill --method random --ipc 3 --out latin')
    assert code == 0 and 'read as Latin-1' in err and 'mäßig' in open('latin/synthetic.csv', encoding='utf-8').read()
    write('codes.csv', ward().assign(age=ward().age.fillna(-999)).to_csv(index=False))
    assert load_data('codes.csv', target='ill', missing='age=-999').train.x.equal(first.x)
    write('lost.csv', ward().assign(ill=ward().ill.mask(ward().index < 20)).to_csv(index=False))
    with pytest.warns(UserWarning, match="20 of 240 rows have no 'ill'"): load_data('lost.csv', target='ill')


def test_sets_are_not_tested_on_other_columns(call):
    call(MADE)
    assert 'columns or units of another table' in call('evaluate run --data-seed 1')[2]
    s = load('run/synthetic.safetensors')
    test = load_data('ward.csv', target='ill', groups='wing,sex').test
    with pytest.raises(ValueError, match='is no network'): evaluate(s, test, Training('boosting', risk='cvar(0.2)'))
    with pytest.raises(ValueError, match="choose from convnet"): evaluate(s, test, Training('lgistic'), device='cpu')
