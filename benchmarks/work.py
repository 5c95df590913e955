"""Work against quality: how many images have to pass through networks for a minority accuracy, by schedule.

    OMP_NUM_THREADS=1 python benchmarks/work.py --work DIR     # adds rows to benchmarks/results/work.json, resumable

Two tasks with a hidden minority of a tenth: digits (1,097 images, 8 x 8, width 32, 200 steps) and MNIST (10,000
images, 28 x 28, width 16, 100 steps). Everything is measured on validation images, each in both looks; no test image
is looked at. A forward pass of one image counts 1, a forward and backward pass of a synthetic image 3. Seconds are
those of the processor on one thread, without the selection of the start and the clusters. Schedules are paired by
seed, which redraws data, start and networks.
"""
import re, time

import torch

from rdd_nb.core import read_json
from rdd_nb.distill import Distiller
from rdd_nb.training import Training
from rdd_nb.evaluation import evaluate
from rdd_nb.methods import as_method
from rdd_nb.sources import load_data

from common import Rows, TimeIsUp, options, write
from tune import both_looks

TASKS = dict(
    digits=dict(data=dict(name='digits'), steps=200, width=32),
    mnist=dict(data=dict(name='mnist', shift='minority', limit=11_112, test=10), steps=100, width=16),
)


def schedule(batch, steps=1., life=1, once=False): return dict(batch=batch, steps=steps, life=life, once=once)


# name -> real batch, steps in units of the default, updates in one network, whether its real statistics serve them all
SCHEDULES = {
    'default': schedule('random(256)'),
    'random 64': schedule('random(64)'), 'random 32': schedule('random(32)'),
    'balanced 64': schedule('balanced(64)'), 'balanced 32': schedule('balanced(32)'),
    'balanced 16': schedule('balanced(16)'),
    'balanced 32, twice the steps': schedule('balanced(32)', 2.),
    'random 256, half the networks': schedule('random(256)', 1., 2),
    'random 256, as many networks, twice the steps': schedule('random(256)', 2., 2),
    'random 256 once, half the networks': schedule('random(256)', 1., 2, True),
    'random 256 once, as many networks, twice the steps': schedule('random(256)', 2., 2, True),
    'random 64 once, as many networks, twice the steps': schedule('random(64)', 2., 2, True),
    'random 64 once, half the networks, twice the steps': schedule('random(64)', 2., 4, True),
}


def measured(task, name, seed):
    t, how = TASKS[task], SCHEDULES[name]
    splits = load_data(**t['data'], data_seed=seed)
    steps = round(how['steps'] * t['steps'])
    plan = dict(width=t['width'], life=how['life'], once=how['once'])
    method = as_method('rdd-distance', batch=how['batch'], steps=steps, network=plan)
    run = Distiller(splits.train, method, 10, seed, 'cpu')
    real, draw = [0], type(method.batch).draw
    start = time.process_time()
    for _ in range(steps): run.step()
    seconds = time.process_time() - start
    for k in range(3): real[0] += len(draw(method.batch, run, torch.Generator().manual_seed(k))[0])
    batches = steps // how['life'] if how['once'] else steps
    forwards = batches * real[0] / 3 + steps * 3 * len(run.sy)
    s = run.result({}, splits.train.mean, splits.train.std, splits.train.classes)
    row = evaluate(s, both_looks(splits), Training(width=t['width']), 2, seed, device='cpu', progress=False)
    groups = row['group_accuracy']
    return dict(task=task, schedule=name, seed=seed, steps=steps, forwards=round(forwards), seconds=round(seconds, 3),
                minority=groups['minority'], majority=groups['majority'], accuracy=row['accuracy'])


def summary(rows):
    "Mean of each schedule, and what it changes against the default, paired by seed."
    found = []
    for task in TASKS:
        of = {n: {r['seed']: r for r in rows if r['task'] == task and r['schedule'] == n} for n in SCHEDULES}
        for name, mine in of.items():
            both = sorted(mine.keys() & of['default'].keys())
            if not both: continue
            def mean(k, part=mine): return sum(part[s][k] for s in both) / len(both)
            row = {k: mean(k) for k in ('forwards', 'seconds', 'minority', 'majority')}
            row |= {f'{k}_to_default': row[k] / mean(k, of['default']) for k in ('forwards', 'seconds')}
            differences = [mine[s]['minority'] - of['default'][s]['minority'] for s in both]
            found.append(dict(task=task, schedule=name, seeds=len(both), minority_differences=differences) | row)
    return found


def main():
    parser = options('work', __doc__, seeds=5, work=True)
    args = parser.parse_args()
    before = read_json(args.out)['rows'] if args.out.exists() else []
    rows = Rows(args.work / 'work.json', lambda r: (r['task'], r['schedule'], r['seed']), args.minutes, before)
    args.work.mkdir(parents=True, exist_ok=True)
    todo = [(t, n, seed) for seed in range(args.seeds) for t in TASKS for n in SCHEDULES
            if re.search(args.only, f'{t}/{n}')]
    try:
        for key in todo: rows.row(key, lambda: measured(*key))
    except TimeIsUp: print('time is up')
    for s in summary(rows.rows):
        d = s['minority_differences']
        print(f"{s['task']:7} {s['schedule']:47} {s['seeds']} seeds  work {s['forwards_to_default']:5.2f}  seconds "
              f"{s['seconds_to_default']:5.2f} ({s['seconds']:6.1f})  minority {s['minority']:.3f} "
              f"({sum(d) / len(d):+.3f}, {min(d):+.3f} to {max(d):+.3f})")
    write(args.out, tasks=TASKS, schedules=SCHEDULES, rows=rows.rows, summary=summary(rows.rows))


if __name__ == '__main__': main()
