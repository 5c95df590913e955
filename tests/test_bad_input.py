"""Bad input as one table: a command line, what the one line on standard error says, and which files it needs.

Adding a case is adding a line. A word that is a key of `FILES` is made first. Each case must end with exit code 2,
one line of at most 300 characters and no traceback, and must leave no new file or folder behind.
"""
import json
import re
import shlex
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from rdd_nb.cli import main
from rdd_nb.synthetic import SyntheticDataset, save


class Bad(NamedTuple):
    line: str             # the command line; {nines} and {long} stand for long words
    says: str             # regular expression
    text: str = ''        # of the file grid.toml, merge.csv or report.json


# Files: name -> how it is made

def arrays(n=60, **changes):
    "An .npz file with images, and changes."
    rng = np.random.default_rng(0)
    found = dict(x=rng.random((n, 8, 8)), y=np.arange(n) % 3) | {k: v(rng) if callable(v) else v for k,
        v in changes.items()}
    return lambda path: np.savez(path, **found)


def words(text): return lambda path: path.write_text(text)


def run(**source):
    "A run folder with a synthetic set that says where it comes from."
    def make(path):
        path.mkdir()
        x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
        save(SyntheticDataset(x, y, [0.], [1.], provenance=dict(source=source or None, method='mine', seed=0)),
             path/'synthetic.safetensors')
    return make


def folder(**files):
    def make(path):
        path.mkdir()
        for name, text in files.items(): (path/name.replace('__', '.')).write_text(text)
    return make


def cut(path):
    arrays()(path)
    path.write_bytes(path.read_bytes()[:-200])


SITES = 'age,size,ill\n' + ''.join(f'{20 + i},{i % 7},{"yes" if i % 3 else "no"}\n' for i in range(40))
FILES = {
    'toy.npz': arrays(), 'groups.npz': arrays(group=np.arange(60) % 2),
        'nan.npz': arrays(x=np.full((60, 8, 8), np.nan)),
    'range.npz': arrays(x=np.full((60, 8, 8), 255.)), 'labels.npz': arrays(y=np.arange(60) % 3 + 1), 'cut.npz': cut,
    'short.npz': arrays(y=np.arange(50) % 3), 'table.npz': arrays(x=lambda rng: rng.random((60, 8))),
    'text.npz': words('text'),
    'other.npz': arrays(x=lambda rng: rng.random((60, 12, 12))), 'few.npz': arrays(4), 'empty.npz': words(''),
    'run': run(name='toy.npz', shift='none', share=.1, data_seed=0), 'orphan': run(), 'lost': run(name='gone.npz'),
    'odd': run(name=3), 'cut.safetensors': words('junk'), 'old.pt': words('junk'), 'thesis': folder(thesis__tex='x'),
    'nothing': folder(), 'notes': folder(todo__txt='x'), 'file': words('x'),
        'compared': folder(report__json='{"asked": {}}'),
    'wrong.py': words('a = 1\nb = a / 0\n'), 'broken.py': words('def f(:\n'), 'mine.py': words('f = 3\n'),
        'a.csv': words(SITES),
    'b.csv': words(SITES.replace('size', 'weight')), 'c.csv': words(SITES.replace('ill', 'sick')),
        'd.csv': words('age,ill\n'),
    'e.csv': words('age,age,ill\n1,2,no\n'), 'gaps.csv': words(SITES.replace('20,0,no', '20,0,no,9')),
        'bytes.csv': words('\x00'),
}


def distill(words, says): return Bad(f'distill toy.npz --device cpu {words}', says)
def grid(text, says): return Bad('sweep grid.toml --device cpu', f'^rdd-nb: grid.toml: .*{says}', text)
def late(text, says): return Bad('sweep grid.toml --device cpu', says, f'data = "toy.npz"\n{text}')
def report(text, says): return Bad('report seen', f'report.json.*({says})', text)


TABLE = [
    # which command, which flags
    Bad('', 'no command; the commands are demo, distill'),
    Bad('distil toy.npz', "unknown command 'distil', did you mean 'distill'"),
    Bad('{long}', 'unknown command'),
    Bad('distill', 'arguments are required: data .see rdd-nb distill --help'),
    Bad('distill toy.npz --risk-it target', "unknown argument '--risk-it', did you mean '--risk-at'"),
    Bad('distill toy.npz more', "unknown argument 'more'"),
    Bad('demo extra', "unknown argument 'extra'"),
    Bad('evaluate', 'required: run'),
    Bad('distill toy.npz --ipc ten', "--ipc: invalid int value: 'ten'"),
    Bad('distill toy.npz --ipc 2.5', "invalid int value: '2.5'"),
    Bad('distill toy.npz --seed 1.5', "--seed: invalid int value: '1.5'"),
    Bad('distill toy.npz --ipc', '--ipc: expected one argument'),
    Bad('distill toy.npz --risk-at pixels', "invalid choice: 'pixels'"),
    Bad('distill toy.npz --risk-at {long}', 'invalid choice'),
    Bad('distill toy.npz --see 3', "unknown argument '--see', did you mean"),
    Bad('evaluate run --on train', "invalid choice: 'train'"),
    Bad('distill toy.npz --{long}', 'unknown argument'),
    Bad('distill toy\udcff.npz', r'udcff.npz. is not UTF-8'),
    Bad('distill toy.npz --lr ten', '--lr: invalid float'),
    Bad('merge a.csv', 'required: --target'),
    Bad('pinn', 'required: .*--out'),
    # data
    Bad('distill digit', "digit.*digits"),
    Bad('distill nowhere/at/all', 'nowhere/at/all.*no such folder'),
    Bad("distill ''", "data=''"),
    Bad('distill missing.npz', 'missing.npz: there is no such file'),
    Bad('distill nothing', 'nothing'),
    Bad('distill notes', 'notes'),
    Bad('distill nan.npz', 'NaN'),
    Bad('distill range.npz', r'\[0, 1\]'),
    Bad('distill labels.npz', r'0\.\.C-1'),
    Bad('distill short.npz', '60'),
    Bad('distill table.npz --method idc', 'made for images'),
    Bad('distill text.npz', 'text.npz: not an .npz file'),
    Bad('distill cut.npz', 'cut.npz'),
    Bad('distill empty.npz', 'empty.npz'),
    Bad('distill few.npz', 'class'),
    Bad('distill digits --root nowhere', '--root nowhere: there is no such folder'),
    Bad('distill mnist --root file', 'file'),
    Bad('distill digits --share 2', 'share.*2'),
    Bad('distill digits --share nan', 'share'),
    Bad('distill digits --shift sideways', 'sideways'),
    Bad('distill "\x1b[31m.npz"', r'\\x1b\[31m.npz'),
    Bad('distill {long}', 'x{50}.*(too long|no such|unknown)'),
    Bad('distill digits --data-seed -1', 'seed'),
    # tables
    Bad('distill a.csv', "needs the column to predict .--target.; there are 'age', 'size', 'ill'"),
    Bad('distill a.csv --target sick', "target: there is no column 'sick'"),
    Bad('distill a.csv --target ill --groups sex', "groups: there is no column 'sex'"),
    Bad('distill a.csv --target ill --accept age --ipc 500', 'ipc=500'),
    Bad('distill a.csv --target ill --shift minority', 'a table has its own groups'),
    Bad('distill a.csv --target ill', "column 'age': 40 different whole numbers in 40 rows: an identifier"),
    Bad('distill lost.csv --target ill', 'lost.csv: there is no such file'),
    Bad('distill d.csv --target ill', 'd.csv'),
    Bad('distill e.csv --target ill', "'age' occurs twice"),
    Bad('distill gaps.csv --target ill', 'gaps.csv: line 2: 4 fields, the first line has 3'),
    Bad('distill bytes.csv --target ill', 'bytes.csv: not a table of text'),
    Bad('distill toy.npz --target ill', "target='ill': toy.npz is no table"),
    Bad('evaluate run --groups sex', "groups='sex': toy.npz is no table"),
    Bad('sweep grid.toml --device cpu', 'needs the column to predict', 'data = "a.csv"\nalso = ["kmeans"]'),
    # the method and its settings
    distill('--method magic', "'magic' is not known"),
    distill('--method rdd-distanse', "did you mean 'rdd-distance'"),
    distill('--risk "cvr(tail=0.2)"', "did you mean 'cvar'"),
    distill('--risk "cvar(tail=2)"', 'tail=?.*2'),
    distill('--risk 3', 'risk'),
    distill('--risk "__import__(1)"', 'risk'),
    distill('--risk {long}', 'risk'),
    distill('--risk "twolevel(mean, mean)"', 'distance'),
    distill('--method gradient --risk-at target', 'a risk needs its place|a risk'),
    distill('--method gradient --risk mean', 'risk_at'),
    distill('--ipc 0', 'ipc=0'),
    distill('--ipc -3', 'ipc=-3'),
    distill('--ipc 500', 'ipc=500'),
    distill('--ipc {nines}', 'ipc'),
    distill('--ipc 99999999999999999999', 'ipc=99999'),
    distill('--steps -1', 'steps=-1'),
    distill('--lr 0', 'lr=0'),
    distill('--lr nan', 'lr=nan'),
    distill('--lr inf', 'lr=inf'),
    distill('--set stepz=1', 'stepz'),
    distill('--set steps', 'NAME=VALUE'),
    distill('--set =3', 'NAME=VALUE'),
    distill('--set steps=many', "steps='many'"),
    distill('--set {long}', 'NAME=VALUE'),
    distill('--set steps=True', 'steps=True'),
    distill('--set "batch=[1]"', 'batch'),
    distill('--set network=foo', 'foo'),
    distill('--set augment=flipp', 'flipp'),
    distill('--set steps=1e3', 'steps=1000.0'),
    distill('--method kmeans --steps 3', 'steps=3'),
    distill('--clustering groups', 'group'),
    distill('--clustering "kmeans(0)"', 'at least 1'),
    distill('--start kcentre', "did you mean 'kcenter'"),
    distill('--set network.width=True', 'width=True'),
    distill('--set network.width=1000000', 'width=1000000'),
    distill('--set "optimizer=adam(momentum=1.5)"', '1.5'),
    distill('--set network.live=3', 'live'),
    distill('--set base=density --method kmeans', 'no effect'),
    distill('--set risk=3', 'risk=?'),
    distill('--method gradient --set objective=foo', 'foo'),
    # where it runs, what it writes, what it executes
    distill('--device abacus', 'abacus'),
    distill('--device cuda:77', 'cuda:77'),
    distill('--device meta', 'meta'),
    distill('--device cpu:3', 'cpu:3'),
    distill("--out ''", "--out ''"),
    distill('--out file', 'file'),
    distill('--out file/run', 'file'),
    distill('--out thesis', 'thesis is not empty'),
    distill('--parts nowhere.py', 'nowhere.py'),
    distill('--parts wrong.py', r'wrong.py: ZeroDivisionError: division by zero \(line 2\)'),
    distill('--parts broken.py', 'SyntaxError'),
    # evaluate
    Bad('evaluate nowhere', 'nowhere'),
    Bad('evaluate nothing', 'synthetic.safetensors'),
    Bad('evaluate orphan', 'pass --data'),
    Bad('evaluate odd', 'pass --data'),
    Bad('evaluate lost', 'gone.npz'),
    Bad('evaluate cut.safetensors', 'cut.safetensors'),
    Bad('evaluate old.pt', 'old.pt'),
    Bad('evaluate compared', 'belongs to a comparison'),
    Bad('evaluate run nowhere', 'nowhere'),
    Bad('evaluate run --model resnet', 'resnet'),
    Bad('evaluate run --augment flipp', 'flipp'),
    Bad('evaluate run --data nowhere.npz', 'nowhere.npz'),
    Bad('evaluate run --data other.npz', r'\(1, 12, 12\)'),
    Bad('evaluate run --networks 0', '--networks=0'),
    Bad('evaluate run --epochs 0', '--epochs=0'),
    Bad('evaluate run --epochs 10000000000000000000000', '--epochs=1000'),
    Bad('evaluate run --jobs 0', '--jobs=0'),
    Bad('evaluate run --corruptions fog-9', 'fog'),
    Bad('evaluate run --metrics f', '--metrics f: expected a function'),
    Bad('evaluate run --parts mine.py --metrics f', '--metrics f: expected a function'),
    Bad('evaluate run --protocol dd', "'dd' is not known"),
    Bad('evaluate run --device abacus', 'abacus'),
    # report
    Bad('report nowhere', 'nowhere'),
    Bad('report nothing', 'report.json'),
    Bad('report run', 'report.json'),
    Bad("report run --out ''", "''"),
    report('{', 'not a JSON'),
    report('[]', 'rows|object'),
    report('3', 'rows|object'),
    report('{"rows": []}', 'rows'),
    report('{"rows": [1]}', r'row 0|rows\[0\]'),
    report('{"rows": [{}]}', 'method'),
    report('{"rows": {}, "config": []}', 'rows'),
    report('\x00', 'not a JSON'),
    report('{"config": 3, "rows": [{"method": "a", "seed": 0, "accuracy": 0.5}]}', 'config: expected an object, got 3'),
    report('{"config": {}, "rows": [{"method": "a", "seed": 0, "accuracy": "high"}]}', 'accuracy'),
    # demo
    Bad('demo --seeds 0', '--seeds=0'),
    Bad('demo --seeds -2', '--seeds=-2'),
    Bad('demo --seeds 111111111111', '--seeds=1111'),
    Bad('demo --ipc 0', 'ipc=0'),
    Bad('demo --ipc 500', 'ipc=500'),
    Bad('demo --networks 0', '--networks=0'),
    Bad('demo --epochs 0', '--epochs=0'),
    Bad('demo --epochs 1{nines}', '--epochs'),
    Bad('demo --steps -1', 'steps=-1'),
    Bad('demo --device abacus', 'abacus'),
    Bad('demo --jobs 0', 'jobs=0'),
    Bad('demo --jobs -1', 'jobs=-1'),
    Bad("demo --out ''", "--out ''"),
    Bad('demo --out thesis', 'thesis is not empty'),
    Bad('demo --out file', 'file'),
    # sweep: the file
    Bad('sweep nowhere.toml', 'nowhere.toml: there is no such file'),
    grid('seeds = [0', 'not a TOML file'),
    grid('', 'nothing to do'),
    grid('seed = 3', "'seed' is not a key"),
    grid('seeds = 0', 'seeds=0'),
    grid('seeds = [-1]', 'seeds=-1'),
    grid('seeds = true', 'seeds=True'),
    grid('seeds = [1.5]', 'seeds=1.5'),
    grid('seeds = 111111111111', 'seeds=111111111111'),
    grid('ipc = [5, 5]', 'different'),
    grid('ipc = 2.5', 'ipc=2.5'),
    grid('networks = 0', 'networks=0'),
    grid('also = "full"', "also='full'"),
    grid('data = 3', 'expected a table'),
    grid('also = ["ful"]', "also='ful' is not known"),
    grid('also = ["kmeans"]\non = "train"', "on='train' is not known"),
    grid('[data]\nnam = "digits"', "'nam' is not a key"),
    grid('also = ["kmeans"]\n[training]\nepochs = 0', r'\[training\]: epochs=0'),
    grid('also = ["kmeans"]\n[training]\nepoch = 3', "'epoch' is not a key"),
    grid('[grid]\nmethod = []', 'empty list'),
    grid('[settings]\nstep = 1\n[grid]\nmethod = "gradient"', "'step' is not a key"),
    grid('[grid]\nrisk = "max"', "'method' is missing"),
    grid('[grid]\nmethod = "gradeint"', "method = 'gradeint' cannot be used"),
    grid('[grid]\nmethod = 3', 'method = 3 cannot be used'),
    grid('[grid]\nmethod = "gradient"\nrisk = "cvar(0.2)"', "risk = 'cvar.0.2.' cannot be used"),
    grid('[risks]\nt = "cvar(2)"\n[grid]\nmethod = "gradient"\nrisk = "t"\nrisk_at = "target"',
        "risk = 't' cannot be used .*tail"),
    grid('[[grid]]\nmethod = "gradient"\n[[grid]]\nmethod = "gradeint"', r'\[\[grid\]\] number 2'),
    grid('a = ' + '[' * 5000, 'not a TOML file'),
    grid('[grid]\nmethod = "gradient"\nnetwork.live = 3', 'live'),
    # sweep: what shows only with the data
    late('also = ["kmeans"]\n[training]\nmodel = "resnet"', 'resnet'),
    late('also = ["kmeans"]\n[training]\naugment = "flipp"', 'flipp'),
    late('ipc = 500\nalso = ["kmeans"]', 'ipc=500'),
    late('also = ["kmeans"]\n[training]\nepochs = 10000000000000000000000', 'epochs=1000'),
    late('also = ["kmeans"]\n[training]\nmomentum = 1.5', 'momentum'),
    late('also = ["group-balanced"]', 'group'),
    late('also = ["kmeans"]\n[training]\nwidth = 1000000000000', 'width|memory'),
    late('also = ["full"]\n[training]\nnorm = "foo"', 'foo'),
    Bad('sweep grid.toml --jobs 0', 'jobs=0', 'data = "toy.npz"\nalso = ["kmeans"]'),
    Bad('sweep grid.toml --root nowhere', '--root nowhere', 'also = ["kmeans"]'),
    Bad('sweep grid.toml --dry-run --device abacus', 'abacus', 'data = "toy.npz"\nalso = ["kmeans"]'),
    Bad("sweep grid.toml --out ''", "--out ''", 'also = ["kmeans"]'),
    Bad('sweep grid.toml --parts wrong.py', 'wrong.py', 'also = ["kmeans"]'),
    Bad('sweep grid.toml --out thesis toy.npz', "unknown argument 'toy.npz'", 'also = ["kmeans"]'),
    # merge
    Bad('merge nowhere.csv b.csv --target ill', 'nowhere.csv'),
    Bad('merge a.csv c.csv --target ill', 'ill'),
    Bad('merge a.csv b.csv --target weight', 'weight'),
    Bad('merge a.csv d.csv --target ill', 'd.csv'),
    Bad('merge a.csv e.csv --target ill', 'age'),
    Bad('merge a.csv bytes.csv --target ill', 'bytes.csv'),
    Bad('merge a.csv b.csv --target ill --rows 0', 'rows'),
    Bad('merge a.csv b.csv --target ill --risk cvr', 'cv'),
    Bad('merge a.csv b.csv --target ill --out a.csv', 'a.csv'),
    Bad('merge a.csv b.csv --target ill --out new.txt', r'\.csv'),
    Bad('merge a.csv b.csv --target ill --borrow 3', 'borrow'),
    Bad('merge a.csv b.csv --target ill --steps -1', 'steps'),
    Bad('merge a.csv gaps.csv --target ill', 'gaps.csv'),
    # rank
    Bad('rank a.csv', 'required: --target'),
    Bad('rank lost.csv --target ill', 'lost.csv: there is no such file'),
    Bad('rank a.csv --target sick', "no column 'sick'"),
    Bad('rank a.csv --target ill --sites ward', "env: there is no column 'ward'"),
    Bad('rank a.csv --target ill --seeds 1', '--seeds=1'),
    Bad('rank a.csv --target ill --candidates 2', '--candidates=2'),
    # pinn
    Bad('pinn --out new --pde wave', 'wave'),
    Bad('pinn --out file', 'file'),
    Bad('pinn --out new --points 0', '--points'),
    Bad('pinn --out new --labels -1', '--labels'),
    Bad('pinn --out new --networks 0', '--networks'),
    Bad('pinn --out new --steps -1', 'steps'),
    Bad('pinn --out new --risk cvr', 'cv'),
    Bad('pinn --out new --objective energy', 'energy'),
    Bad('pinn --out new --seed -1', '--seed'),
]
CASES = [pytest.param(b, id=f'{i}: {b.line} {b.text}'.encode('ascii', 'replace').decode()[:70])
         for i, b in enumerate(TABLE)]


def left(path): return sorted(p.relative_to(path).as_posix() for p in path.rglob('*'))


def make_files(bad, argv, tmp_path):
    for word in [*(a.split('/')[0] for a in argv), *re.findall(r'[\w.]+\.(?:npz|csv)', bad.text), 'toy.npz']:
        if word in FILES and not (tmp_path/word).exists(): FILES[word](tmp_path/word)
    if 'grid.toml' in argv: (tmp_path/'grid.toml').write_text(bad.text)
    if 'seen' in argv: folder(report__json=bad.text)(tmp_path/'seen')


@pytest.mark.parametrize('bad', CASES)
def test_one_line_and_nothing_left(bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(bad.line.replace('{nines}', '9' * 5000).replace('{long}', 'x' * 100_000))
    make_files(bad, argv, tmp_path)
    before = left(tmp_path)
    capsys.readouterr()
    code, (_, err) = main(argv), capsys.readouterr()
    assert code == 2 and err.startswith('rdd-nb: ') and err.count('\n') == 1 and err.endswith('\n'), err[:2000]
    assert len(err) <= 300
    assert re.search(bad.says, err), err
    assert left(tmp_path) == before


def test_the_table_is_long_enough(): assert len(TABLE) >= 100 and len({(b.line, b.text) for b in TABLE}) == len(TABLE)
