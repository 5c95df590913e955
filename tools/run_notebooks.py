"""Run notebooks and store their outputs, which `nbdev_test` does not do.

    python tools/run_notebooks.py                              # every notebook
    python tools/run_notebooks.py nbs/25_risk.ipynb            # the ones named
    python tools/run_notebooks.py --flags "slow data" NOTEBOOK # also cells that are skipped by default

Cells that are skipped keep the outputs they have. What a cell writes to stderr (warnings, progress bars) is shown
here and not stored. A notebook that fails is left as it was.
"""
import argparse, os, subprocess, sys, time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # has to be set before torch is imported

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor


def skipped(path, force):
    "Ids of the code cells that `nbdev_test` would skip, or None for a notebook that is not executed at all."
    flags = set(get_config().tst_flags.split()) - set(force)
    nb = NBProcessor(path, procs=FrontmatterProc, process=True).nb  # strips the directives: good for looking only
    if str(getattr(nb, 'frontmatter_', {}).get('skip_exec', False)).lower() == 'true': return None

    def skip(cell):
        directives = getattr(cell, 'directives_', None) or {}
        return ('nbdev_export(' in cell.source or flags & directives.keys()
                or directives.get('eval:', [''])[0].lower() == 'false')
    return {cell.id for cell in nb.cells if cell.cell_type == 'code' and skip(cell)}


def drop_stderr(cell):
    "Show what `cell` wrote to stderr and take it out of the stored outputs."
    for out in cell.outputs:
        if out.get('name') == 'stderr': sys.stderr.write(''.join(out.text))
    cell.outputs = [out for out in cell.outputs if out.get('name') != 'stderr']


def run(path, force=()):
    "Execute the notebook at `path` in this process and store its outputs; returns whether it succeeded."
    path, start = Path(path).absolute(), time.time()
    skip = skipped(path, force)
    if skip is None: return True
    nb = read_nb(path)
    for cell in nb.cells:
        if cell.cell_type == 'code' and cell.id not in skip: cell.outputs = []
    sys.path.insert(0, str(get_config().config_path))
    os.chdir(path.parent)
    shell = CaptureShell(path, mpl_format='png')
    try:
        shell.run_all(nb, exc_stop=True, preproc=lambda c: c.cell_type != 'code' or c.id in skip, postproc=drop_stderr)
    except Exception:
        sys.stderr.write(shell.prettytb(fname=path.name))
        return False
    write_nb(nb, path)
    nbdev_clean(fname=str(path))
    print(f'{time.time() - start:6.1f} s  {path.name}', flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', help='notebooks or folders (default: all)')
    parser.add_argument('--flags', default='', help='flags of cells to run although they are skipped by default')
    args = parser.parse_args()
    paths = sorted(p for arg in args.notebooks or [get_config().nbs_path] for p in nbglob(arg, as_path=True))
    if not paths: parser.error(f'no notebooks found in {args.notebooks}')
    if len(paths) == 1: return not run(paths[0], args.flags.split())
    # one process each, so that no state leaks from one notebook into the next
    return any([subprocess.run([sys.executable, __file__, str(p), '--flags', args.flags]).returncode for p in paths])


if __name__ == '__main__': sys.exit(main())
