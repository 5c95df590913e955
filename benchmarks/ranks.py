"""One distillation by one process and by two: how much faster are two?

    python benchmarks/ranks.py                    # writes benchmarks/results/ranks.json, about six minutes
    python benchmarks/ranks.py --rounds 1 --steps 5

Each process has one thread. torchrun starts the processes; after two steps to warm up, the first of them measures the
rest. The two contestants take turns, and the result is the ratio of each turn and its median. It says something on a
machine that does nothing else; the load before each turn is kept beside it. `shared` is the same ratio for the
processor's time of the busier process: it says how well the work is divided, also on a machine that is busy.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile
from pathlib import Path

from common import RESULTS, write

SETTINGS = {    # shape, width, real samples per class, method
    'rdd-distance, 28 x 28, width 64': ((1, 28, 28), 64, 64, 'rdd-distance'),
    'rdd-distance, 32 x 32 x 3, width 64': ((3, 32, 32), 64, 64, 'rdd-distance'),
    'rdd-target, 28 x 28, width 32': ((1, 28, 28), 32, 64, 'rdd-target'),
}


def job(name, steps, out):
    "What each process does: seconds of a step, written by the first."
    import time, torch
    import torch.distributed as dist
    from rdd_nb.core import generator
    from rdd_nb.data import GroupedDataset
    from rdd_nb.distributed import ShardedDistiller, _join
    from rdd_nb.methods import as_method
    torch.set_num_threads(1)
    shape, width, batch, method = SETTINGS[name]
    y = torch.arange(10).repeat_interleave(2 * batch)
    data = GroupedDataset(torch.randn(len(y), *shape, generator=generator('ranks')), y)
    small = dict(steps=10**6, network=dict(width=width), batch=f'random({batch})', start='random')
    _join('gloo', 300.)
    run = ShardedDistiller(data, as_method(method, **small), 10, 0, 'cpu')
    for _ in range(2): run.step()
    dist.barrier()
    start, spent = time.perf_counter(), time.process_time()
    for _ in range(steps): run.step()
    busy = torch.tensor((time.process_time() - spent) / steps)
    dist.all_reduce(busy, dist.ReduceOp.MAX)
    if run.rank == 0: Path(out).write_text(json.dumps([(time.perf_counter() - start) / steps, busy.item()]))
    dist.barrier()                 # one that leaves early takes the connection of the other with it
    dist.destroy_process_group()


def seconds(name, ranks, steps):
    "Seconds of a step by so many processes, and the processor's seconds of the busier one."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, 'seconds.json')
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(ranks),
                   __file__, '--job', name, '--steps', str(steps), '--out', str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
        if done.returncode: raise RuntimeError(done.stderr[-1000:])
        return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=RESULTS / 'ranks.json', help='result file (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=5, help='turns of each setting (default: %(default)s)')
    parser.add_argument('--steps', type=int, default=10, help='that are measured (default: %(default)s)')
    parser.add_argument('--job', choices=list(SETTINGS), help='be one of the processes')
    args = parser.parse_args()
    if args.job: return job(args.job, args.steps, args.out)
    rows = []
    for name in SETTINGS:
        turns = []
        for _ in range(args.rounds):
            load = os.getloadavg()[0]
            (one, busy), (two, busier) = (seconds(name, ranks, args.steps) for ranks in (1, 2))
            turns.append(dict(load=round(load, 2), one=one, two=two, faster=one / two, shared=busy / busier))
        median = {k: statistics.median(t[k] for t in turns) for k in ('load', 'faster', 'shared')}
        rows.append(dict(setting=name, **median, turns=turns))
        print('{:38} faster {faster:.2f}, work shared {shared:.2f}, load {load:.1f}'.format(name, **median), flush=True)
    write(args.out, config=dict(rounds=args.rounds, steps=args.steps, cores=os.cpu_count()), rows=rows)


if __name__ == '__main__': main()
