"""The tables of the papers at their own budgets, one entry at a time, on whatever machine there is.

    python benchmarks/paper/published.py known --work runs/known --minutes 8   # DM, DC, DSA: a slice; goes on
    python benchmarks/paper/published.py fair --work runs/fair --minutes 8     # fair distillation, FairDD's protocol
    python benchmarks/paper/published.py known --work runs/known --minutes 0   # only the result file

An entry is a method, a data set, images per class and a seed. Its distillation stops when time is up and goes on
from its last checkpoint; then networks are trained by the protocol of the paper, one row each. An entry that has not
run stands in `results/paper-TABLE.json` with its command. `--share .01` takes a part of the published iterations, so
that an entry fits on two cores; rows say which. Images are normalised as in the papers; settings are theirs where we
know them, and nothing is tuned. Two cores need hours to days for a whole entry.
"""
import re, signal, sys, time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rdd_nb.core import pick_device
from rdd_nb.distill import distill
from rdd_nb.evaluation import evaluate
from rdd_nb.foreign import CONSTANTS
from rdd_nb.methods import as_method
from rdd_nb.sources import TASKS, load_data

from common import Rows, TimeIsUp, commit, options, write

WIDE = 'convnet(width=128)'
LOOPS = {1: (1, 1), 10: (10, 50)}      # of DC: updates of the images in a network, and of the network between them


def matched(name, **changes): return as_method(name, start='random', steps=20_000, lr=1., network=WIDE, **changes)


def gradients(ipc, augment=''):
    life, steps = LOOPS[ipc]
    network = f'convnet(width=128, life={life}, steps={steps if life > 1 else 0}, lr=0.01)'
    return as_method('gradient', start='random', steps=1000 * life, lr=.1, batch='random(256)', augment=augment,
                     network=network)


AUGMENT = 'crop cutout scale rotate'
METHODS = dict(DM=lambda ipc: matched('distribution', augment=AUGMENT), DC=gradients,
               DSA=lambda ipc: gradients(ipc, AUGMENT),
               **{'DM, FairDD*': lambda ipc: matched('fairdd', augment=AUGMENT),
                  'DM, COBRA*': lambda ipc: matched('cobra', augment=AUGMENT),
                  'rdd-distance': lambda ipc: matched('rdd-distance', augment=AUGMENT),
                  'rdd-hard': lambda ipc: as_method('rdd-hard', steps=20_000, lr=1., network=WIDE, augment=AUGMENT)})
PROTOCOL = dict(DC='dc', DSA='dsa')     # the others: dm
PUBLISHED = dict(                       # accuracy in percent, and DEO_M where the paper has it; None: no figure at hand
    known={('DM', 'mnist', 1): 89.7, ('DM', 'mnist', 10): 97.5, ('DC', 'mnist', 1): 91.7, ('DSA', 'mnist', 1): 88.7,
           ('DC', 'fashion-mnist', 1): 70.5, ('DM', 'cifar10', 1): 26.0, ('DM', 'cifar10', 10): 48.9,
           ('DC', 'cifar10', 1): 28.3, ('DC', 'cifar10', 10): 44.9, ('DSA', 'cifar10', 1): 28.8,
           ('DSA', 'cifar10', 10): 52.1,
           **{(m, s, 10): None for m in ('DC', 'DSA') for s in ('mnist', 'fashion-mnist')},
           **{('DM', 'fashion-mnist', n): None for n in (1, 10)}, ('DSA', 'fashion-mnist', 1): None},
    fair={('DM', 'c-mnist-fg', 10): (25.0, 100.), ('DM, FairDD*', 'c-mnist-fg', 10): (94.6, 17.0),
          ('DM', 'c-mnist-bg', 10): (23.4, None), ('DM, FairDD*', 'c-mnist-bg', 10): (94.9, 13.4),
          ('DM', 'cifar10-s', 10): (37.9, 59.2), ('DM, FairDD*', 'cifar10-s', 10): (45.2, 31.8),
          **{(m, s, 10): None for m in ('DM, COBRA*', 'rdd-distance', 'rdd-hard')
             for s in ('c-mnist-fg', 'c-mnist-bg', 'cifar10-s')}})
NETWORKS, SEEDS = 5, 1


@contextmanager
def time_limit(until):
    "Raises `TimeIsUp` inside when the clock shows `until`; a distillation then has its last checkpoint."
    def up(*_): raise TimeIsUp
    left = until - time.perf_counter()
    if left <= 0: raise TimeIsUp
    before = signal.signal(signal.SIGALRM, up)
    signal.setitimer(signal.ITIMER_REAL, min(left, 10**6))
    try: yield
    finally: signal.setitimer(signal.ITIMER_REAL, 0), signal.signal(signal.SIGALRM, before)


@cache
def parts(name):
    "Training and test part, normalised as in the papers."
    if name in TASKS: splits, constants = load_data(name, val=0), None
    else: splits, constants = load_data(name, 'none', val=0), CONSTANTS[name]
    if constants is None: return splits.train, splits.test
    return tuple(p.renormalise(*constants[:2]) for p in (splits.train, splits.test))


def scaled(name, ipc, share):
    m = METHODS[name](ipc)
    return as_method(m, steps=max(1, round(share * m.steps)))


def entry(work, key, share, rows):
    "Distil an entry, or go on, and evaluate it: one row for each network."
    name, data, ipc, seed = key
    train, test = parts(data)
    folder = work / f'{name}-{data}-{ipc}-{seed}-{share}'.replace(' ', '').replace('*', '').replace(',', '-')
    with time_limit(rows.stop):
        s = distill(train, scaled(name, ipc, share), ipc, seed, out=folder, resume=True, progress=False,
                    checkpoint_every=10)
    for network in range(NETWORKS): rows.row((*key, share, network), lambda: evaluated(s, test, key, share, network))


def evaluated(s, test, key, share, network):
    name, data, ipc, seed = key
    row = evaluate(s, test, networks=1, seed=1000 * seed + network, protocol=PROTOCOL.get(name, 'dm'), progress=False)
    keep = {k: row[k] for k in ('accuracy', 'worst_group_accuracy', 'deo_m', 'deo_a') if k in row}
    return dict(method=name, data=data, ipc=ipc, seed=seed, share=share, network=network, **keep, commit=commit(),
                device=str(pick_device()), seconds=row['evaluation_seconds'], distilled=s.provenance['seconds'])


def entries(table, rows, command):
    "What is published, what we have, and the command for what has not run."
    found = []
    for key, published in PUBLISHED[table].items():
        own = [r for r in rows if (r['method'], r['data'], r['ipc']) == key]
        line = dict(zip(('method', 'data', 'ipc'), key), published=published, networks=len(own))
        if own: line |= {k: sum(r[k] for r in own) / len(own) for k in ('accuracy', 'deo_m') if k in own[0]}
        name = ' '.join(map(str, key)).replace('*', r'\*')
        run = f'{command} --only "^{name} "'
        found.append(line | (dict(share=own[0]['share']) if own else {}) | dict(run=run, ran=len(own) >= NETWORKS))
    return found


def main():
    parser = options('published', __doc__, SEEDS, work=True)
    parser.add_argument('table', choices=PUBLISHED)
    parser.add_argument('--share', type=float, default=1., help='part of the published iterations (default: all)')
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.work/'rows.json', lambda r: tuple(r[k] for k in ('method', 'data', 'ipc', 'seed', 'share',
                                                                      'network')), args.minutes)
    try:
        for seed in range(args.seeds):
            for key in PUBLISHED[args.table]:
                if re.search(args.only, ' '.join(map(str, (*key, seed)))):
                    entry(args.work, (*key, seed), args.share, rows)
    except TimeIsUp: print('time is up')
    command = f'python benchmarks/paper/published.py {args.table} --work runs/{args.table}'
    table = entries(args.table, rows.rows, command)
    write(args.out.with_stem(f'paper-{args.table}'), entries=table, rows=rows.rows,
          not_run=[e['run'] for e in table if not e['ran']],
          seconds=sum(r['seconds'] for r in rows.rows))


if __name__ == '__main__': main()
