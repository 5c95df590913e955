"""CIFAR-10 on a processor: CIFAR10-S in the published protocol, and a hidden minority, 10 images per class.

    python benchmarks/cifar_columns.py --work runs/cifar --curve        # how many steps: digits, validation only
    python benchmarks/cifar_columns.py --work runs/cifar --minutes 8    # a slice; the same command goes on
    python benchmarks/cifar_columns.py --work runs/cifar --minutes 0    # only the result file of what is there

All 50,000 training images and all 20,000 test images (each in both looks). What is smaller than in the papers, so that
it fits on one core: ConvNet-3 of width 32 in place of 128, a real batch of 64 in place of 256 images per class, and
`STEPS` steps in place of 20,000. The methods are those of the package with the settings that were developed on the
digits and coloured MNIST (see `benchmarks/auto.py`); nothing was tuned on CIFAR-10. `STEPS` was read off a curve on
validation images of the digits (`curve` in the result file: twice as many gain less than a point) and committed
before a test number of this benchmark was read. In `benchmarks/auto.py`, half-grey CIFAR-10 of 16 x 16 pixels had been
read once, and nothing was changed after it.

All rows of a seed share training data, networks and real batches, so that they are paired. All seeds share one test
set. * marks methods that see group labels.
"""
import re, time, warnings

from rdd_nb.auto import distill_together
from rdd_nb.distill import distill
from rdd_nb.evaluation import evaluate
from rdd_nb.intervals import interval
from rdd_nb.methods import as_method
from rdd_nb.metrics import NoiseWarning
from rdd_nb.sources import load_data
from rdd_nb.synthetic import load, save
from rdd_nb.training import Training

from common import Rows, TimeIsUp, commit, options, write
from tune import both_looks

STEPS, WIDTH, IPC, EPOCHS, NETWORKS = 120, 32, 10, 100, 2
TASKS = {'CIFAR10-S': dict(name='cifar10-s', share=.1, val=0),
         'hidden minority': dict(name='cifar10', shift='minority', share=.05, val=0)}
FREE = 'random', 'k-center', 'kmeans', 'herding'                    # selections without a step
MATCHING = 'distribution', 'density', 'rdd-distance', 'rdd-hard', 'fairdd'
METHODS = *FREE, *MATCHING
NUMBERS = 'accuracy', 'worst_group_accuracy', 'worst_class_group_accuracy', 'deo_m', 'deo_a'
CURVE, CURVE_SEEDS = (15, 30, 60, 120, 240), 2


def method(name, steps=STEPS):
    "A row as a method: selections as they are, the others with a smaller batch and network."
    m = as_method(name)
    return as_method(m, batch='random(64)', network=dict(width=WIDTH), steps=steps) if m.objective else m


def starred(name): return f'{name}*' if as_method(name).sees_groups else name


# The curve

def curve(name, steps, seed):
    "Accuracies on validation images of the digits in both looks after so many steps."
    splits = load_data('digits', data_seed=seed)
    s = distill(splits.train, method(name, steps), IPC, seed, 'cpu', progress=False)
    row = evaluate(s, both_looks(splits), Training(width=WIDTH), NETWORKS, seed, device='cpu', progress=False)
    keep = {k: row[k] for k in ('accuracy', 'group_accuracy')}
    return dict(method=name, steps=steps, seed=seed, seconds=round(s.provenance['seconds'], 2), **keep)


# The columns

def folder(work, task, seed): return work / f'{task.replace(" ", "-")}-{seed}'


def distilled(work, task, seed, rows):
    "All sets of a task and a seed, in a folder; the row of their distillation is written when all are there."
    def make():
        begun, splits = time.process_time(), load_data(**TASKS[task], data_seed=seed)
        loaded = time.process_time()
        sets = distill_together(splits.train, {k: method(k) for k in METHODS}, IPC, seed, 'cpu', False)
        folder(work, task, seed).mkdir(parents=True, exist_ok=True)
        for k, s in sets.items(): save(s, folder(work, task, seed) / f'{k}.safetensors')
        return dict(task=task, seed=seed, method='all sets', train=len(splits.train), groups=splits.train.groups,
                    loading=round(loaded - begun, 1), seconds=round(time.process_time() - loaded, 1), commit=commit())
    return rows.row((task, seed, 'all sets'), make)


def evaluated(work, task, seed, name, test):
    "The row of one set, from two networks on the whole test set."
    begun, s = time.process_time(), load(folder(work, task, seed) / f'{name}.safetensors')
    row = evaluate(s, test, Training(width=WIDTH, epochs=EPOCHS), NETWORKS, seed, device='cpu', progress=False)
    keep = *NUMBERS, 'group_accuracy', 'group_counts', 'worst_class_group', 'class_group_accuracy'
    return dict(task=task, seed=seed, method=name, **{k: row[k] for k in keep}, test=len(test),
                seconds=round(time.process_time() - begun, 1), commit=commit())


def one(work, task, seed, rows):
    "All rows of a task and a seed."
    distilled(work, task, seed, rows)
    if all((task, seed, k) in rows.index for k in METHODS): return
    if time.perf_counter() > rows.stop: raise TimeIsUp
    test = load_data(**TASKS[task], data_seed=seed).test
    for k in METHODS: rows.row((task, seed, k), lambda: evaluated(work, task, seed, k, test))


def summary(rows):
    "Per task and method, over the seeds that all methods have: numbers, and worst groups against two others."
    found = {}
    for task in TASKS:
        by = {k: {r['seed']: r for r in rows if (r['task'], r['method']) == (task, k)} for k in METHODS}
        seeds = sorted(set.intersection(*(set(own) for own in by.values())))
        if not seeds: continue
        def worst(k): return [by[k][s]['worst_group_accuracy'] for s in seeds]
        def above(k, base): return interval([a - b for a, b in zip(worst(k), worst(base))])
        best = max(FREE, key=lambda k: sum(worst(k)))
        found[task] = dict(seeds=seeds, best_free=best, methods={starred(k): {
            n: interval([by[k][s][n] for s in seeds]) for n in NUMBERS} | dict(
            groups={g: interval([by[k][s]['group_accuracy'][g] for s in seeds]) for g in by[k][0]['group_accuracy']},
            n_worst_class_group=[by[k][s]['worst_class_group']['n'] for s in seeds],
            above_best_free=above(k, best), above_plain=above(k, 'distribution')) for k in METHODS})
    return found


def main():
    parser = options('cifar-columns', __doc__, 3, work=True)
    parser.add_argument('--curve', action='store_true', help='only the curve on the digits')
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter('ignore', NoiseWarning)        # n stands in the rows
    steps = Rows(args.work/'curve.json', lambda r: (r['method'], r['steps'], r['seed']), args.minutes)
    rows = Rows(args.work/'rows.json', lambda r: (r['task'], r['seed'], r['method']), args.minutes)
    todo = [(t, s) for s in range(args.seeds) for t in TASKS if re.search(args.only, t)]
    try:
        if args.curve:
            for key in [(m, n, s) for s in range(CURVE_SEEDS) for m in MATCHING for n in CURVE]:
                steps.row(key, lambda: curve(*key))
        else:
            for task, seed in todo: one(args.work, task, seed, rows)
    except TimeIsUp: print('time is up')
    absent = dict.fromkeys(t for t in TASKS for s in range(args.seeds) for k in METHODS
                           if (t, s, k) not in rows.index)
    command = 'python benchmarks/cifar_columns.py --work runs/cifar'
    settings = dict(steps=STEPS, width=WIDTH, ipc=IPC, epochs=EPOCHS, networks=NETWORKS, seeds=args.seeds)
    write(args.out, tasks=TASKS, settings=settings, command=command, curve=steps.rows,
          methods={starred(k): method(k).describe() for k in METHODS}, rows=rows.rows, summary=summary(rows.rows),
          not_run=[f'{command} --only "{t}"' for t in absent],
          cpu_seconds=sum(r['seconds'] + r.get('loading', 0) for r in rows.rows))


if __name__ == '__main__': main()
