"""Known numbers again: random images, distribution matching and gradient matching on MNIST and Fashion-MNIST.

    python benchmarks/reproduce.py --work reproduce    # writes benchmarks/results/reproduce.json; hours on one core
    python benchmarks/reproduce.py --work reproduce --minutes 5 --only "random.*ipc1 "   # a slice; finished rows stay

ConvNet-3 of width 128. Images are normalised with the published constants. Networks are trained by the protocol of
each method (`rdd_nb.evaluation.PROTOCOLS`): `dc` for random images and DC, `dsa` for DSA, `dm` for DM. Less than in
the papers: repetitions, the number of iterations (20,000 of DM, 1,000 of DC and DSA there), and real images in a
step.

Rows whose `network` is not "convnet" were made before `convnet` padded images of 28 x 28 pixels: images were padded
to 32 x 32 by hand and trained by a loop of this file. The padding is the same, but the border of the images could
be learned, all rows were evaluated by a variant of DC's protocol, and matrix products were in bfloat16. Needs the
environment variable RDD_NB_DATA.
"""
import re, time
from functools import cache

import numpy as np
from tqdm.auto import tqdm

from rdd_nb.coresets import random_per_class
from rdd_nb.core import read_json
from rdd_nb.distill import distill
from rdd_nb.training import Training
from rdd_nb.evaluation import evaluate
from rdd_nb.foreign import CONSTANTS
from rdd_nb.methods import Method
from rdd_nb.sources import load_data

from common import Rows, TimeIsUp, commit, options, write

PUBLISHED = {   # accuracy in percent; `memory`: quoted from memory, the others were read in the source
    ('random', 'mnist', 1): (64.9, 'DC/DSA papers, table 1', True),
    ('random', 'mnist', 10): (95.1, 'DC/DSA papers, table 1', True),
    ('random', 'fashion-mnist', 1): (51.4, 'DC/DSA papers, table 1', True),
    ('random', 'fashion-mnist', 10): (73.8, 'DC/DSA papers, table 1', True),
    ('DM', 'mnist', 1): (89.7, 'DM paper', True), ('DM', 'mnist', 10): (97.5, 'DM paper', True),
    ('DC', 'mnist', 1): (91.7, 'README of the DC/DSA code', False),
    ('DC', 'fashion-mnist', 1): (70.5, 'README of the DC/DSA code', False),
    ('DSA', 'mnist', 1): (88.7, 'README of the DC/DSA code', False),
}
METHODS = {
    'DM': Method('distribution', start='random', steps=150, lr=10., network='convnet(width=128)'),
    'DC': Method('gradient', start='random', steps=150, lr=.2, batch='random(32)', network='convnet(width=128)'),
    'DSA': Method('gradient', start='random', steps=150, lr=.2, batch='random(32)', network='convnet(width=128)',
                  augment='crop cutout scale rotate'),
}
SETS = 'mnist', 'fashion-mnist'
PLAN = [('random', s, 1, 5) for s in SETS] + [('random', s, 10, 2) for s in SETS] \
     + [('DM', 'mnist', 1, 2), ('DM', 'fashion-mnist', 1, 2), ('DM', 'mnist', 10, 1), ('DM', 'fashion-mnist', 10, 1)] \
     + [('DC', 'mnist', 1, 1), ('DC', 'fashion-mnist', 1, 1), ('DSA', 'mnist', 1, 1)]   # method, set, ipc, seeds
PROTOCOL = dict(random='dc', DC='dc', DSA='dsa', DM='dm')


@cache
def load(name):
    "Training and test part, normalised with the published constants."
    splits, (mean, std, _) = load_data(name, 'none', val=100), CONSTANTS[name]
    return splits.train.renormalise(mean, std), splits.test.renormalise(mean, std)


def run(method, name, ipc, seed):
    train_set, test = load(name)
    start = time.perf_counter()
    if method == 'random': source = train_set.subset(random_per_class(train_set.y, ipc, seed))
    else: source = distill(train_set, METHODS[method], ipc, seed, 'cpu', progress=False)
    made, training = time.perf_counter() - start, Training(width=128)
    row = evaluate(source, test, training, 1, seed, device='cpu', protocol=PROTOCOL[method], progress=False)
    return dict(method=method, set=name, ipc=ipc, seed=seed, accuracy=row['accuracy'], distill_seconds=round(made, 1),
                seconds=round(time.perf_counter() - start, 1), protocol=PROTOCOL[method], commit=commit())


def table(rows):
    for method, name, ipc, n in PLAN:
        found = [r for r in rows if (r['method'], r['set'], r['ipc']) == (method, name, ipc)]
        found = [r for r in found if 'network' not in r] or found            # old rows only where there are no others
        own = [100 * r['accuracy'] for r in found]
        value, source, memory = PUBLISHED.get((method, name, ipc), (None, None, None))
        if own:
            yield dict(method=method, set=name, ipc=ipc, runs=len(own), ours=round(np.mean(own), 1),
                       sd=round(np.std(own, ddof=1), 1) if len(own) > 1 else None, published=value, source=source,
                       from_memory=memory, network=found[0].get('network', 'convnet'))


def main():
    args = options('reproduce', __doc__, work=True).parse_args()
    before = read_json(args.out)['rows'] if args.out.exists() else []
    key = lambda r: (r['method'], r['set'], r['ipc'], r['seed'], r.get('network', 'convnet'))
    rows = Rows(args.work / 'rows.json', key, args.minutes, before)
    wanted = [(m, s, ipc, seed) for m, s, ipc, n in PLAN for seed in range(n)]
    try:
        for one in tqdm([w for w in wanted if re.search(args.only, '{} {} ipc{} {}'.format(*w))], desc='runs'):
            print(rows.row((*one, 'convnet'), lambda: run(*one)), flush=True)
    except TimeIsUp: print('time is up', flush=True)
    config = dict(methods={n: m.describe() for n, m in METHODS.items()}, protocols=PROTOCOL,
                  published='percent; `from_memory` marks figures that were not read again')
    write(args.out, config=config, rows=rows.rows, table=list(table(rows.rows)))


if __name__ == '__main__': main()
