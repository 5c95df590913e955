"""How long does a distillation of CIFAR-10's size take on a processor: 50,000 images, ConvNet of width 128, ipc 10?

    OMP_NUM_THREADS=2 python benchmarks/cifar.py --work DIR        # adds rows to benchmarks/results/cifar.json

Images are random bytes: the time of a step does not depend on what they show; that of k-means does, a little. Steps
are those of the method's default (200). Evaluation is two networks, 200 epochs on the 100 images, projected from two
epochs. `seconds` are wall time, `cpu_seconds` those of the processor, summed over threads; on a machine that is shared
with others only the second is comparable.
"""
import os, re, time

import torch

from rdd_nb.core import Cost, generator, read_json
from rdd_nb.data import from_arrays
from rdd_nb.distill import Distiller
from rdd_nb.training import Training, train
from rdd_nb.methods import as_method

from common import Rows, TimeIsUp, options, write

N, IPC = 50_000, 10
# method, real batch, precision of the real side
CASES = [('distribution', 'random(256)', 'float32'), ('rdd-distance', 'random(256)', 'float32'),
         ('rdd-distance', 'random(256)', 'bfloat16'), ('rdd-distance', 'balanced(64)', 'float32'),
         ('rdd-distance', 'balanced(64)', 'bfloat16'), ('rdd-distance', 'balanced(32)', 'bfloat16')]


def images():
    x = torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8, generator=generator('cifar'))
    return from_arrays(x, torch.arange(N) % 10)


def timed(f):
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return dict(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)


def preparation(data):
    "Start and clusters of `rdd-distance`: k-means with 10 and with 4 centres in each class."
    with Cost() as cost: found = timed(lambda: Distiller(data, as_method('rdd-distance'), IPC, 0, 'cpu'))
    return found | dict(peak_mb=cost.peak_mb)


def step(data, method, batch, precision):
    "The faster of two steps, after one to warm up."
    changes = dict(batch=batch, network=dict(precision=precision), start='random')
    run = Distiller(data, as_method(method, **changes), IPC, 0, 'cpu')
    run.step()
    with Cost() as cost: found = min((timed(run.step) for _ in range(2)), key=lambda t: t['cpu_seconds'])
    return found | dict(peak_mb=cost.peak_mb, steps=run.method.steps)


def evaluation(data, precision):
    "Two networks for 200 epochs, from one network and two epochs."
    x, y = torch.randn(10 * IPC, 3, 32, 32), torch.arange(10).repeat_interleave(IPC)
    found = timed(lambda: train(x, y, 10, Training(epochs=2, precision=precision), device='cpu'))
    return {k: 2 * 100 * v for k, v in found.items()}


def main():
    parser = options('cifar', __doc__, work=True)
    args = parser.parse_args()
    torch.set_num_threads(threads := int(os.environ.get('OMP_NUM_THREADS', os.cpu_count())))
    args.work.mkdir(parents=True, exist_ok=True)
    before = read_json(args.out)['rows'] if args.out.exists() else []
    rows = Rows(args.work/'cifar.json', lambda r: (r['what'], r['threads']), args.minutes, before)
    data = images()
    todo = {'preparation': lambda: preparation(data), 'evaluation float32': lambda: evaluation(data, 'float32'),
            'evaluation bfloat16': lambda: evaluation(data, 'bfloat16')}
    todo |= {f'{m}, {b}, {p}': lambda m=m, b=b, p=p: step(data, m, b, p) for m, b, p in CASES}
    try:
        for what, make in todo.items():
            if not re.search(args.only, what): continue
            rows.row((what, threads), lambda: dict(what=what, threads=threads) | make())
    except TimeIsUp: print('time is up')
    for r in rows.rows:
        print(f"{r['threads']} threads  {r['what']:42} {r['seconds']:8.2f} s  {r['cpu_seconds']:8.2f} s of CPU time")
    write(args.out, n=N, ipc=IPC, rows=rows.rows, projected=projected(rows.rows))


def projected(rows):
    "Minutes of preparation, all steps and evaluation, for each case that has all three."
    found = []
    by = {(r['what'], r['threads']): r for r in rows}
    for what, threads in by:
        if what.count(',') != 2 or ('preparation', threads) not in by: continue
        r, ready = by[what, threads], by['preparation', threads]
        tested = by.get((f'evaluation {what.split(", ")[-1]}', threads))
        if not tested: continue
        def minutes(k): return (ready[k] + r['steps'] * r[k] + tested[k]) / 60
        found.append(dict(case=what, threads=threads, minutes=minutes('seconds'), cpu_minutes=minutes('cpu_seconds')))
    return found


if __name__ == '__main__': main()
