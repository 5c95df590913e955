"""Does a distilled set serve other networks than the one it was made with?

    OMP_NUM_THREADS=1 python benchmarks/architectures.py      # writes results/architectures.json, about forty minutes

Digits with a hidden minority, 100 images: k-means medoids, and the set that distribution matching with a risk over
clusters makes of them with a ConvNet of two blocks. Each is given to every architecture of
`rdd_nb.evaluation.ARCHITECTURES`, and to two estimators of scikit-learn. The step size of each architecture was
chosen on validation data with the medoids. The images stay at their 8x8 pixels, on which the large networks
(ResNet-18, VGG-11, AlexNet, ViT) cost ten to some hundred times as much as the ConvNet; `--heavy` says how many of
the seeds they get, and 0 leaves them out.
"""
import tempfile, warnings
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from tqdm.auto import tqdm

from rdd_nb.sources import load_data
from rdd_nb.core import read_json, versions, write_json
from rdd_nb.distill import distill
from rdd_nb.training import Training
from rdd_nb.evaluation import ARCHITECTURES, evaluate_architectures
from rdd_nb.intervals import interval

from common import commit
from evaluation import options

SETS = 'kmeans', 'rdd-distance'
HEAVY = 'ResNet-18', 'VGG-11', 'AlexNet', 'ViT'
ENTRIES = ARCHITECTURES | {
    '1 nearest neighbour': KNeighborsClassifier(1),
    'logistic regression': LogisticRegression(C=0.1, max_iter=1000),
}
KEPT = (
    'accuracy',
    'group_accuracy',
    'worst_class_group_accuracy',
    'error',
    'training',
    'evaluation_seconds',
    'evaluation_steps',
)


def main():
    parser = options('architectures', __doc__)
    parser.add_argument('--epochs', type=int, default=60)
    parser.add_argument('--heavy', type=int, default=3, help='seeds for ResNet-18, VGG-11, AlexNet and ViT')
    args = parser.parse_args()
    splits, training, rows = load_data('digits'), Training(epochs=args.epochs), []
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        wanted = [
            (m, s, a) for s in range(args.seeds) for a in ENTRIES for m in SETS if a not in HEAVY or s < args.heavy
        ]
        for method, seed, name in tqdm(sorted(wanted, key=lambda w: w[2] in HEAVY)):
            path = work / 'rows' / f'{method}-{seed}-{name}.json'
            if not path.exists():
                s = distill(splits.train, method, 10, seed, 'cpu', work / f'{method}-{seed}', resume=True)
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    (row,) = evaluate_architectures(
                        s, splits.test, {name: ENTRIES[name]}, training, 1, seed=seed, device='cpu', progress=False
                    )
                write_json(path, dict(set=method, seed=seed, architecture=name) | {k: row[k] for k in KEPT if k in row})
            rows.append(read_json(path))
    table = []
    for name in (n for n in ENTRIES if n not in HEAVY or args.heavy):
        own = {m: {r['seed']: r for r in rows if (r['set'], r['architecture']) == (m, name)} for m in SETS}
        first = own[SETS[0]][0]
        if 'error' in first: table.append(dict(architecture=name, error=first['error'])); continue
        line = dict(architecture=name, n_seeds=len(own[SETS[0]]))
        for group in splits.test.groups:
            values = {m: [r['group_accuracy'][group] for _, r in sorted(own[m].items())] for m in SETS}
            line[group] = {m: interval(v) for m, v in values.items()} | dict(
                difference=interval([b - a for a, b in zip(values[SETS[0]], values[SETS[1]])])
            )
        table.append(line)
    write_json(
        args.out,
        dict(
            config=dict(
                data='digits',
                ipc=10,
                seeds=args.seeds,
                training=training.describe(),
                sets=SETS,
                networks=1,
                heavy=HEAVY,
            ),
            table=table,
            rows=rows,
            versions=versions(),
            commit=commit(),
            command=f'python benchmarks/architectures.py --seeds {args.seeds} --heavy {args.heavy}',
            seconds=round(sum(r.get('evaluation_seconds', 0) for r in rows), 1),
        ),
    )
    for line in table:
        print(
            line['architecture'],
            line.get('error') or {g: {k: round(v['mean'], 3) for k, v in line[g].items()} for g in splits.test.groups},
        )


if __name__ == '__main__': main()
