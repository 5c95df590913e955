"""How long an evaluation takes on a CPU, and what makes it shorter.

    OMP_NUM_THREADS=1 RDD_NB_DATA=... python benchmarks/evaluation.py      # results/evaluation.json, four minutes

Two sizes. *Digits*: 100 medoids of 8 x 8 pixels, five networks, the whole protocol, in one process and in two.
*MNIST*: 100 random images (10 per class) of 28 x 28, ConvNet-3 of width 128, trained for a few epochs by a plain
eager float32 loop as published scripts have it and by `rdd_nb.evaluation.train` and its relatives, in turns, from
the same initial network and with the same order of samples, so that accuracies can be compared. Seconds are CPU
seconds of one thread (other work on the machine counts less that way); 300 epochs are extrapolated. Without
RDD_NB_DATA, random images of that size take the place of MNIST, and there is no accuracy to compare.
"""
import argparse, os, platform, time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F


from rdd_nb.sources import load_data
from rdd_nb.coresets import class_medoids
from rdd_nb.core import generator, read_json, versions, write_json
from rdd_nb.data import GroupedDataset
from rdd_nb.training import Training, predict, train, train_together
from rdd_nb.evaluation import evaluate
from rdd_nb.models import HalfSize

from common import commit

HERE = Path(__file__).parent
EPOCHS = 300          # of the protocol, to which the time is extrapolated


def published(net):
    "The network as published scripts build it: with PyTorch's own average pooling in place of ours."
    for parent in list(net.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, HalfSize): setattr(parent, name, torch.nn.AvgPool2d(2))
    return net


def plain_loop(x, y, n_classes, t, seed, autocast=False, channels_last=False, pooling=published, wrap=lambda net: net):
    "The training loop of published code: all samples of a batch at once, eager, float32."
    net = pooling(t.network(x.shape[1:], n_classes, seed))
    if channels_last: net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    run = wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), t.lr, momentum=t.momentum, weight_decay=t.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, t.epochs * -(-len(y) // t.batch))
    for epoch in range(t.epochs):
        for batch in torch.randperm(len(y), generator=generator('evaluation', seed, epoch)).split(t.batch):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast): scores = run(x[batch])
            loss = F.cross_entropy(scores.float(), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


STRATEGIES = {
    'plain loop, float32': lambda x, y, t, s: plain_loop(x, y, 10, t, s),
    'own pooling, float32': lambda x, y, t, s: plain_loop(x, y, 10, t, s, pooling=lambda net: net),
    'own pooling in blocks, float32': lambda x, y, t, s: train(x, y, 10, t, s, 'cpu'),
    'plain loop, channels last': lambda x, y, t, s: plain_loop(x, y, 10, t, s, channels_last=True),
    'plain loop, bfloat16': lambda x, y, t, s: plain_loop(x, y, 10, t, s, autocast=True),
    'own pooling in blocks, bfloat16': lambda x, y, t, s: train(x, y, 10, replace(t, precision='bfloat16'), s, 'cpu'),
    'plain loop, compiled': lambda x, y, t, s: plain_loop(x, y, 10, t, s, wrap=torch.compile),
}


def mnist_sized():
    "100 images to train on, and 1,000 to test on (none where there is no MNIST)."
    g = generator('evaluation benchmark')
    try: splits = load_data('mnist', val=1000)
    except FileNotFoundError:
        return torch.randn(100, 1, 28, 28, generator=g), torch.arange(10).repeat_interleave(10), None, 'random images'
    few = torch.cat([i[torch.randperm(len(i), generator=g)[:10]] for i in map(splits.train.class_indices, range(10))])
    some = torch.randperm(len(splits.test), generator=g)[:1000]
    return splits.train.x[few], splits.train.y[few], splits.test.subset(some), 'mnist'


def one_training(name, mnist, epochs, seed):
    x, y, test, _ = mnist
    t = Training(epochs=epochs)
    start, cpu = time.perf_counter(), time.process_time()
    net = STRATEGIES[name](x, y, t, seed)
    row = dict(strategy=name, seed=seed, seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu)
    if test is not None: row['accuracy'] = (predict(net, test.x) == test.y).double().mean().item()
    return row


def compile_seconds(mnist):
    "CPU seconds until the first step of a compiled network is done (child processes included)."
    x, y, _, _ = mnist
    before = os.times()
    STRATEGIES['plain loop, compiled'](x, y, Training(epochs=1), 0)
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


def digits_row(jobs):
    splits = load_data('digits')
    few = splits.train.subset(class_medoids(splits.train.x, splits.train.y, ipc=10))
    start, cpu = time.perf_counter(), time.process_time()
    row = evaluate(few, splits.test, Training(), networks=5, device='cpu', jobs=jobs, progress=False)
    return dict(
        jobs=jobs,
        networks=5,
        epochs=200,
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu if jobs == 1 else None,
        accuracy=row['accuracy'],
    )


def stack_row():
    "Networks in one stack, on a CPU: what the GPU wants is not what the CPU wants."
    splits, t = load_data('digits'), Training(epochs=30)
    few = splits.train.subset(class_medoids(splits.train.x, splits.train.y, ipc=10))
    start = time.process_time()
    for s in range(5): train(few.x, few.y, 10, t, s, 'cpu')
    middle = time.process_time()
    train_together(few.x, few.y, 10, t, range(5), 'cpu')
    return dict(networks=5, epochs=30, one_by_one=middle - start, together=time.process_time() - middle)


def processes_row(mnist, epochs=20):
    "Two networks of the MNIST size, one after the other and in two processes, in wall seconds."
    x, y, test, _ = mnist
    few = GroupedDataset(x, y, classes=[str(c) for c in range(10)])
    small = few.subset(slice(0, 100))
    found = {}
    for jobs in (1, 2):
        start = time.perf_counter()
        evaluate(few, small, Training(epochs=epochs), networks=2, device='cpu', jobs=jobs, progress=False)
        found[f'seconds_{jobs}'] = time.perf_counter() - start
    return dict(networks=2, epochs=epochs) | found


def processor():
    try: lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError: return dict(model=platform.processor(), bfloat16=None)
    value = lambda key: next((l.split(':', 1)[1].strip() for l in lines if l.startswith(key)), '')
    return dict(
        model=value('model name'),
        cores=os.cpu_count(),
        bfloat16=sorted(set(value('flags').split()) & {'avx512_bf16', 'amx_bf16'}),
    )


def options(name, description, seeds=3):
    "A parser with what benchmarks of evaluation have in common."
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument('--seeds', type=int, default=seeds)
    parser.add_argument('--work', type=Path, help='folder for finished parts; a stopped benchmark goes on from there')
    parser.add_argument('--out', type=Path, default=HERE / 'results' / f'{name}.json')
    torch.set_num_threads(1)
    return parser


def main():
    parser = options('evaluation', __doc__)
    parser.add_argument('--epochs', type=int, default=20, help='of the trainings of MNIST size')
    parser.add_argument(
        '--compile', action='store_true', help='also torch.compile, which needs a C++ compiler and a minute'
    )
    args = parser.parse_args()
    start, mnist = time.perf_counter(), mnist_sized()

    def part(name, f):
        path = args.work and args.work / f'{name}.json'
        if path and path.exists(): return read_json(path)
        found = f() | dict(load=os.getloadavg()[0])
        if path: write_json(path, found)
        return found

    names = [n for n in STRATEGIES if n != 'plain loop, compiled' or args.compile]
    report = dict(
        digits=[part(f'digits-{jobs}', lambda: digits_row(jobs)) for jobs in (1, 2)],
        stack=part('stack', stack_row),
        processes=part('processes', lambda: processes_row(mnist)),
    )
    if 'plain loop, compiled' in names:
        report['compile'] = part('compile', lambda: dict(cpu_seconds=compile_seconds(mnist)))
    rows = [
        part(f'{n}-{s}', lambda: one_training(n, mnist, args.epochs, s))
        for s in range(args.seeds)
        for n in names
        if not s or n != 'plain loop, compiled'
    ]
    mean = lambda values: sum(values) / len(values)
    for n in names:
        own = [r for r in rows if r['strategy'] == n]
        best = min(r['cpu_seconds'] for r in own)
        report.setdefault('mnist', []).append(
            dict(
                strategy=n,
                epochs=args.epochs,
                cpu_seconds=best,
                extrapolated_300_epochs=best / args.epochs * EPOCHS,
                **({'accuracy': mean([r['accuracy'] for r in own])} if 'accuracy' in own[0] else {}),
            )
        )
    plain = report['mnist'][0]['cpu_seconds']
    for m in report['mnist']: m['times_faster'] = plain / m['cpu_seconds']
    report |= dict(
        rows=rows,
        config=dict(
            data=mnist[3], epochs=args.epochs, seeds=args.seeds, extrapolated_to=EPOCHS, images=len(mnist[0]), threads=1
        ),
        processor=processor(),
        versions=versions(),
        commit=commit(),
        command='python benchmarks/evaluation.py',
        seconds=time.perf_counter() - start,
    )
    write_json(args.out, report)
    for m in report['mnist']:
        seconds = f"{m['cpu_seconds']:7.1f} s for {args.epochs} epochs, {m['times_faster']:.2f} x"
        print(f"{m['strategy']:28} {seconds}" + (f", accuracy {m['accuracy']:.3f}" if 'accuracy' in m else ''))
    for d in report['digits']: print(f"digits, five networks, {d['jobs']} process(es): {d['seconds']:.1f} s")


if __name__ == '__main__': main()
