"""Everything that wants a GPU, in one call: first the tests flagged cuda, then the benchmarks.

    python tools/gpu.py [--out DIR] [--skip-tests]

Needs the development extra. Prints one line per part and exits with 1 if any failed. Result files go to
benchmarks/results/ (or DIR), next to those of the CPU, with device, versions and commit inside.
"""
import argparse, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def parts(out):
    "Name and command of each part, cheapest first."
    marked = [p for p in sorted((ROOT / 'nbs').rglob('*.ipynb')) if '#| cuda' in p.read_text(encoding='utf-8')]
    python = sys.executable
    yield 'tests marked cuda', [python, '-m', 'pytest', '-q', '-k', 'cuda or gpu', 'tests']
    for nb in (str(p.relative_to(ROOT)) for p in marked):
        run = f'from nbdev.test import nbdev_test; nbdev_test({nb!r}, flags="cuda", n_workers=0)'
        yield f'cuda cells of {nb}', [python, '-c', run]
    for name, options in ('steps', ['--device', 'cuda']), ('risk', ['--device', 'cuda']), ('clustering', []):
        yield f'benchmark {name}', [python, f'benchmarks/{name}.py', *options, '--out', str(out / f'{name}-cuda.json')]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'results')
    parser.add_argument('--skip-tests', action='store_true')
    args = parser.parse_args()
    import torch
    if not torch.cuda.is_available(): sys.exit('tools/gpu.py: this machine has no CUDA device')
    failed = 0
    for name, command in parts(args.out.absolute()):
        if args.skip_tests and not name.startswith('benchmark'): continue
        start = time.time()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        failed += done.returncode != 0
        print(f'{"ok  " if done.returncode == 0 else "FAIL"} {time.time() - start:6.1f} s  {name}', flush=True)
        if done.returncode: print((done.stdout + done.stderr)[-1500:], flush=True)
    sys.exit(failed > 0)


if __name__ == '__main__': main()
