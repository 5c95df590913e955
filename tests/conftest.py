"""What all tests share: one thread each, no window system, hypothesis without time limits and the same in every run."""
import os, sys
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # before torch is imported; small tensors on many threads are several times slower
os.environ['MPLBACKEND'] = 'Agg'
# nbgrader calls other programs of this environment, which need not be activated
os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])

from hypothesis import settings

settings.register_profile('suite', deadline=None, derandomize=True, database=None)
settings.load_profile('suite')
