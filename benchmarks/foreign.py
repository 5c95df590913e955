"""Distilled sets of others under the protocol of their authors: do we measure what they measured?

    RDD_NB_DATA=... python benchmarks/foreign.py --work foreign           # writes benchmarks/results/foreign.json
    RDD_NB_DATA=... python benchmarks/foreign.py --work foreign --minutes 8 --only mnist   # a slice; finished rows stay

The files are described in `RDD_NB_DATA/distilled-sets/README.md`. Each holds one or several sets (runs) and the
accuracies that its authors measured, for one or several architectures. (The code of DC tests the images at the
beginning of its last iteration, updates them once more and saves them then: the file holds their successors.) We
train networks on every run by `protocol='dc'`, test them on all 10,000 test images, and put the mean beside theirs.
They used up to 100 networks a row. The table marks what has not run. On one core, a network takes seconds (MLP,
LeNet), one to two minutes (ConvNet), or five to fifteen (the others).
"""
import argparse, math, os, re, time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from rdd_nb.sources import load_data
from rdd_nb.core import read_json, versions, write_json
from rdd_nb.training import Training
from rdd_nb.evaluation import evaluate
from rdd_nb.foreign import read_runs

from common import commit
from evaluation import processor

HERE = Path(__file__).parent
MODELS = dict(ConvNet='convnet', MLP='mlp', LeNet='lenet', AlexNet='alexnet', VGG11='vgg11', ResNet18='resnet18')
MNIST, CIFAR, CIFAR50 = (f'{n}.pt' for n in ('dg_res_DC_MNIST_ConvNet_1ipc', 'dg_res_DC_CIFAR10_ConvNet_10ipc',
                                             'res_DC_CIFAR10_ConvNet_10ipc'))
PLAN = [  # file, data, architecture, networks for each run: in the order of the work
    (MNIST, 'mnist', 'MLP', 4), (MNIST, 'mnist', 'LeNet', 4), (MNIST, 'mnist', 'ConvNet', 2),
    (CIFAR50, 'cifar10', 'ConvNet', 8), (CIFAR, 'cifar10', 'MLP', 4), (CIFAR, 'cifar10', 'LeNet', 4),
    (MNIST, 'mnist', 'VGG11', 1), (MNIST, 'mnist', 'AlexNet', 1), (CIFAR, 'cifar10', 'ConvNet', 2),
    (MNIST, 'mnist', 'ResNet18', 1), (CIFAR, 'cifar10', 'VGG11', 1), (CIFAR, 'cifar10', 'AlexNet', 1),
    (CIFAR, 'cifar10', 'ResNet18', 1),
]


@cache
def test_set(name): return load_data(name, 'none').test


@cache
def sets(file, name):
    return read_runs(Path(os.environ['RDD_NB_DATA']) / 'distilled-sets' / file, name, classes=test_set(name).classes)


def one_row(file, name, architecture, run, network):
    s = sets(file, name)[run]
    training = Training(MODELS[architecture])
    row = evaluate(s, test_set(name), training, 1, network, device='cpu', protocol='dc', progress=False)
    return dict(file=file, data=name, architecture=architecture, run=run, network=network, accuracy=row['accuracy'],
                training=row['training'], seconds=row['evaluation_seconds'], sha256=s.provenance['sha256'])


def table(rows):
    "One line for each file and architecture: ours, theirs, and whether they differ by less than their deviation."
    for file, name, architecture, _ in PLAN:
        own = [r['accuracy'] for r in rows if (r['file'], r['architecture']) == (file, architecture)]
        theirs = sets(file, name)[0].provenance['measured'][architecture]
        line = dict(file=file, data=name, architecture=architecture, n=len(own))
        line |= {f'theirs{end}': theirs[k] for end, k in (('', 'mean'), ('_sd', 'sd'), ('_n', 'n'))}
        if not own: line['remark'] = 'not run'
        else:
            difference = float(np.mean(own)) - theirs['mean']
            sd = float(np.std(own)) if len(own) > 1 else None
            error = math.hypot(theirs['sd'] / theirs['n'] ** .5, (sd or theirs['sd']) / len(own) ** .5)
            line |= dict(ours=float(np.mean(own)), sd=sd, difference=difference,
                         agrees=abs(difference) <= theirs['sd'], standard_errors=abs(difference) / error)
        yield line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work', type=Path, required=True, help='folder for rows; where they are, work goes on')
    parser.add_argument('--out', type=Path, default=HERE / 'results' / 'foreign.json')
    parser.add_argument('--only', default='', help='regular expression for "data architecture run network file"')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='start no further row after so many')
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, rows, about = time.perf_counter(), [], dict(commit=commit(), versions=versions())
    wanted = [(f, d, a, run, n) for f, d, a, each in PLAN for n in range(each) for run in range(len(sets(f, d)))]
    for f, d, a, run, n in tqdm(wanted):
        path = args.work / f'{Path(f).stem}-{a}-{run}-{n}.json'
        late = time.perf_counter() - start > 60 * args.minutes
        if not path.exists() and not late and re.search(args.only, f'{d} {a} {run} {n} {f}'):
            write_json(path, one_row(f, d, a, run, n) | about)
        if path.exists(): rows.append(read_json(path))
    lines = list(table(rows))
    config = dict(protocol='dc', networks={f'{f} {a}': n for f, _, a, n in PLAN}, device='cpu', threads=1)
    write_json(args.out, dict(config=config, table=lines, rows=rows, versions=versions(), commit=about['commit'],
                              processor=processor(), command='python benchmarks/foreign.py --work WORK',
                              seconds=round(sum(r['seconds'] for r in rows), 1)))
    for t in lines: print({k: round(v, 4) if isinstance(v, float) else v for k, v in t.items()})


if __name__ == '__main__': main()
