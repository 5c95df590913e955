"""Make the students' versions of the assignments from their sources, with nbgrader.

    python tools/make_assignments.py             # nbs/assignments/release from nbs/assignments/_source
    python tools/make_assignments.py --out DIR   # elsewhere

Solutions, hidden tests and outputs are gone from them. The sources are cleaned by the way.
"""
import argparse, logging, os, shutil, sys, tempfile
from pathlib import Path

from nbdev.clean import nbdev_clean
from nbgrader.apps import NbGraderAPI, NbGrader

COURSE = Path(__file__).resolve().parents[1]/'nbs'/'assignments'


def names(): return sorted(p.name for p in (COURSE/'_source').iterdir() if (p/f'{p.name}.ipynb').is_file())


def generate(folder):
    "Run nbgrader in the folder of a course; raises `SystemExit` with its log where it fails."
    before = Path.cwd()
    os.chdir(folder)
    try:
        app = NbGrader()
        app.log_level = logging.ERROR
        app.load_config_file()
        api = NbGraderAPI(config=app.config)
        for name in names():
            done = api.generate_assignment(name)
            if not done['success']: raise SystemExit(f"{name}: {done.get('error') or done.get('log')}")
    finally: os.chdir(before)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=COURSE/'release', help='folder of the students\' versions')
    out = parser.parse_args().out.absolute()
    if out == COURSE/'release':
        for name in names(): nbdev_clean(fname=str(COURSE/'_source'/name/f'{name}.ipynb'))
    with tempfile.TemporaryDirectory() as folder:
        course = Path(folder)/'course'
        shutil.copytree(COURSE, course, ignore=shutil.ignore_patterns('release'))
        generate(course)
        for name in names():
            (out/name).mkdir(parents=True, exist_ok=True)
            made = course/'release'/name/f'{name}.ipynb'
            nbdev_clean(fname=str(made))
            shutil.copyfile(made, out/name/made.name)
    print(f'{len(names())} assignments in {out}')


if __name__ == '__main__': sys.exit(main())
