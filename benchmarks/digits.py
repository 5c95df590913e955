"""The main table: all methods on the digits with a hidden minority, five seeds, test set read once.

    python benchmarks/digits.py        # writes benchmarks/results/digits.json; about ten minutes on two cores

Beside the methods of `rdd-nb demo` it has the ablations that tell the parts apart: clusters without a risk, the
paper's cells around the synthetic images, the true groups in place of clusters (an upper row that uses labels), and
training on all real images under mean + CVaR.
"""
import tempfile
from pathlib import Path

from rdd_nb.compare import compare
from rdd_nb.core import write_json
from rdd_nb.training import Training
from rdd_nb.methods import METHODS, as_method
from rdd_nb.sources import load_data

from common import options

MAIN = 'random', 'kmeans', 'gradient', 'distribution', 'rdd-network', 'rdd-target', 'rdd-distance', 'full', 'full-risk'
ABLATIONS = {
    'gradient, step of rdd-target':
    as_method('gradient', lr=.2),
    'network, as in the paper':
    as_method('rdd-network', clustering='nearest', risk='twolevel(cvar(tail=0.5), 0.5*mean + 0.5*max)'),
    'target, mean + CVaR over clusters':
    as_method('rdd-target', risk='twolevel(mean, 0.5*mean + 0.5*cvar(tail=0.5))', clustering='kmeans(4)'),
    'target, cells of synthetic images':
    as_method('rdd-target', clustering='nearest'),
    'target, true groups':
    as_method('rdd-target', clustering='groups'),
    'distance, cells of synthetic images':
    as_method('rdd-distance', clustering='nearest'),
    'distance, mean over clusters':
    as_method('rdd-distance', risk='mean'),
    'distance, true groups':
    as_method('rdd-distance', clustering='groups', risk='mean'),
    'gradient, random start':
    as_method('gradient', lr=.2, start='random'),
    'target, random start':
    as_method('rdd-target', start='random'),
    'distribution, random start':
    as_method('distribution', start='random'),
    'distance, random start':
    as_method('rdd-distance', start='random'),
}


def main():
    parser = options('digits', __doc__, 5)
    parser.add_argument('--work',
                        help='folder for the runs; a stopped benchmark goes on from there (default: a temporary one)')
    parser.add_argument('--jobs', type=int)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        splits, methods = load_data('digits'), {m: METHODS.get(m) for m in MAIN} | ABLATIONS
        report = compare(splits, methods, range(args.seeds), args.work or Path(temporary) / 'runs', training=Training(),
                         source=splits.source, device='cpu', jobs=args.jobs, resume=bool(args.work),
                         command='python benchmarks/digits.py')
    write_json(args.out, report)


if __name__ == '__main__': main()
