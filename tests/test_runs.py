"""Reading reports: edited, foreign and broken files end in a result or in one line that names the place."""
import copy, itertools, json, math

import numpy as np
import pytest

from rdd_nb.core import write_json
from rdd_nb.report import to_html, to_markdown
from rdd_nb.runs import Comparison, read_comparison, read_report, visible
from test_report import comparison, on_damaged


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A report with every kind of entry. Not to be changed."
    report = json.loads((comparison(tmp_path_factory.mktemp('whole')/'c')/'report.json').read_text())
    report['rows'] = [on_damaged(r, ['noise-1', 'noise-2', 'fog'], .1) | dict(
        confusion=[[9, 1, 0], [2, 8, 0], [0, 0, 10]], ece=.1, group_ece={'majority': .1},
        metrics={'gap': .2, 'by': {'x': 1}},
        training=dict(epochs=3, model='convnet'), small={'class_group': ['0|minority']}, minimum=10, networks=2,
        labels='hard', test_hash='ab' * 32) for r in report['rows']]
    report['failed'] = [dict(method='random', seed=7, error='MemoryError: none', file='runs/random-seed7/error.txt')]
    methods = {'random': dict(steps=0), 'gradient': dict(steps=40, risk=None), 'rdd-target': 'rdd-target'}
    report['config'] |= dict(methods=methods, versions=dict(torch='2.6'))
    return report


def places(value, path=()):
    "Every place in a report, as a path of keys; of long lists and of rows only the first two."
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for k, v in items: yield from places(v, (*path, k))


NESTED = {'a': [{'b': [[]]}]}
CHANGES = {'deleted': None, 'null': None, 'text': 'abc', 'empty text': '', 'number': -7.5, 'huge': 10**40,
           'NaN': math.nan, 'infinite': math.inf, 'true': True, 'empty list': [], 'empty object': {}, 'nested': NESTED,
           'long': 'x' * 2000}


def changed(report, path, name):
    "The report with something else at one place."
    report = copy.deepcopy(report)
    *inside, last = path
    at = report
    for k in inside: at = at[k]
    if name == 'deleted': del at[last]
    else: at[last] = CHANGES[name]
    return report


def outcome(folder, report):
    "'page', or the line of the error; any other exception passes through."
    (folder/'report.json').write_text(json.dumps(report))
    try: c = read_comparison(folder)
    except ValueError as e:
        line = str(e)
        assert '\n' not in line and str(folder/'report.json') in line and len(line) < 300 + len(str(folder))
        return line
    assert '<html' in to_html(c) and to_markdown(c).startswith('# Distilled')
    return 'page'


def test_every_place_and_every_change(whole, tmp_path, monkeypatch):
    "All places of a report times all changes: a page or a line. Drawing is left to the other tests."
    monkeypatch.setattr('rdd_nb.blocks.svg', lambda fig, key: dict(body='', box='0 0 1 1', width=1))
    monkeypatch.setattr('rdd_nb.blocks.drawn', lambda draw: None)
    table = list(itertools.product(dict.fromkeys(p for p in places(whole) if p), CHANGES))
    rng = np.random.default_rng(0)
    chosen = [table[i] for i in rng.choice(len(table), 80, replace=False)]
    found = [outcome(tmp_path, changed(whole, *case)) for case in chosen]
    assert 10 < sum(f == 'page' for f in found) < 70


TABLE = [(('rows', 0, 'accuracy'), 'text', 'rows[0].accuracy: expected a number in [0, 1], got "abc"'),
         (('rows', 1, 'accuracy'), 'deleted', "rows[1]: 'accuracy' is missing"),
         (('rows', 0, 'accuracy'), 'NaN', 'rows[0].accuracy: expected a number in [0, 1], got NaN'),
         (('rows', 0, 'seed'), 'number', 'rows[0].seed: expected a whole number, got -7.5'),
         (('rows', 0, 'seed'), 'true', 'rows[0].seed: expected a whole number, got true'),
         (('rows', 0, 'seed'), 'huge', 'rows[0].seed: expected a whole number, got 1000'),
         (('rows', 0, 'method'), 'empty text', 'rows[0].method: expected a text of 1 to 500 characters, got ""'),
         (('rows', 0, 'method'), 'long', 'rows[0].method: expected a text of 1 to 500 characters, got "xxx'),
         (('rows', 0, 'method'), 'null', "rows[0]: 'method' is missing"),
         (('rows', 0, 'group_accuracy'), 'empty list', 'rows[0].group_accuracy: expected an object, got an empty list'),
         (('rows', 0, 'group_accuracy', 'minority'), 'number',
          'rows[0].group_accuracy.minority: expected a number in [0, 1], got -7.5'),
         (('rows', 0, 'class_group_counts', '0|minority'), 'number',
          'rows[0].class_group_counts.0|minority: expected a whole number'),
         (('rows', 0, 'confusion'), 'nested',
          'rows[0].confusion: expected a square list of lists of numbers, got an object'),
         (('rows', 0, 'confusion', 0), 'empty list', 'rows[0].confusion: expected a square list'),
         (('rows', 0, 'corruptions', 'fog'), 'text', 'rows[0].corruptions.fog: expected an object, got "abc"'),
         (('rows', 0, 'seconds'), 'infinite', 'rows[0].seconds: expected a finite number, got Infinity'),
         (('rows', 0, 'training', 'epochs'), 'nested',
          'rows[0].training.epochs: expected a single value, got an object'),
         (('rows', 0), 'text', 'rows[0]: expected an object, got "abc"'),
         (('rows',), 'empty list', 'rows: expected at least one row, got an empty list'),
         (('rows',), 'deleted', "the file: 'rows' is missing"),
         (('rows',), 'number', 'rows: expected a list, got -7.5'),
         (('config',), 'text', 'config: expected an object, got "abc"'),
         (('config', 'methods'), 'empty list', 'config.methods: expected an object, got an empty list'),
         (('failed', 0, 'error'), 'deleted', "failed[0]: 'error' is missing")]


@pytest.mark.parametrize('path, change, line', TABLE, ids=lambda v: str(v)[:40])
def test_the_line_names_the_place(whole, tmp_path, path, change, line):
    found = outcome(tmp_path, changed(whole, path, change))
    assert found.startswith(f'{tmp_path/"report.json"}: {line}')


FOREIGN = ['', '{', '[]', '7', '"x"', 'null', '\ufeff{}', '[' * 100_000, '{"rows": ' + '[' * 60 + ']' * 60 + '}',
           '{"rows": [' + '9' * 5000 + ']}', '{"rows": [{"method": "\\ud800", "seed": 0}]}']


@pytest.mark.parametrize('content', FOREIGN, ids=lambda v: ascii(v)[:20])
def test_files_that_are_no_reports(tmp_path, content):
    (tmp_path/'report.json').write_text(content, encoding='utf-8')
    with pytest.raises(ValueError) as e: read_report(tmp_path)
    assert str(e.value).startswith(str(tmp_path/'report.json')) and '\n' not in str(e.value) and len(str(e.value)) < 400


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path/'report.json').write_bytes(b'\xff\xfe\x00{')
    with pytest.raises(ValueError, match='not a JSON file'): read_report(tmp_path)


def test_names_with_escape_codes_are_written_out(tmp_path):
    row = dict(method='red\x1b[31m', seed=0, accuracy=.5, group_accuracy={'left\u202eright': .4, 'שלום': .5})
    write_json(tmp_path/'report.json', dict(rows=[row], config={'a\x07b': 'c\x9bd'}))
    (tmp_path/'runs'/'\x1b]0;x\x07-seed1').mkdir(parents=True)
    c = read_comparison(tmp_path)
    assert c.methods == ['red\\u001b[31m'] and list(c.rows[0]['group_accuracy']) == ['left\\u202eright', 'שלום']
    assert c.config == {'a\\u0007b': 'c\\u009bd'} and not {'\x1b', '\x07'} & set(''.join(c.notes))
    assert visible('a\nb') == 'a\\u000ab'


def test_an_error_line_holds_no_escape_codes(tmp_path):
    write_json(tmp_path/'report.json', dict(rows=[dict(method='a', seed=0, accuracy='\x1b[2J', group_accuracy={})]))
    with pytest.raises(ValueError) as e: read_report(tmp_path)
    assert '\x1b' not in str(e.value) and 'u001b' in str(e.value)


def test_the_same_row_twice_is_no_error(tmp_path):
    write_json(tmp_path/'report.json', dict(rows=[dict(method='a', seed=0, accuracy=.5)] * 2))
    assert isinstance(read_comparison(tmp_path), Comparison)


def test_run_files_of_the_wrong_shape_become_notes(tmp_path):
    folder = comparison(tmp_path/'c')
    runs = folder/'runs'
    (runs/'gradient-seed0'/'config.json').write_text('[1, 2]')
    (runs/'gradient-seed1'/'config.json').write_text('[' * 100_000)
    (runs/'random-seed0'/'config.json').write_text('{"method": 7, "steps": {"a": 1}}')
    lines = ['7', '[]', '{"step": "x"}', '{"step": 1, "loss": NaN}', '{"step": 1e99, "loss": 1}', '']
    (runs/'rdd-target-seed0'/'metrics.jsonl').write_text('\n'.join(lines))
    c = read_comparison(folder)
    assert sum('config.json could not be read' in n for n in c.notes) == 2
    assert any('4 lines of metrics.jsonl' in n for n in c.notes)
    assert '<html' in to_html(c)
