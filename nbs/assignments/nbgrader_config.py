"""nbgrader's settings for the course: where things are, what students see, and how submissions are contained.

nbgrader runs this file in the folder of the course. `c` is the configuration that it fills.
"""
import os, sys
from pathlib import Path
from nbgrader import preprocessors
from nbgrader.converters import Autograde

COURSE = Path.cwd()
GUARDED = sys.platform == 'linux'   # run submissions in the kernel of _kernel/, which cannot write elsewhere
CELL_SECONDS = 60                   # then a cell is interrupted and gets no points
OUTPUT_BYTES = 2_000_000            # of a whole notebook; what comes after that is dropped
os.environ['RDD_NB_KERNEL_CPU_SECONDS'] = '300'   # of a whole notebook; then its kernel is ended


class Execute(preprocessors.Execute):
    "nbgrader's preprocessor, which drops output that would fill the memory."
    def process_message(self, msg, cell, cell_index):
        self.seen = getattr(self, 'seen', 0) + len(str(msg['content']))
        shows = msg['msg_type'] in ('stream', 'display_data', 'update_display_data')
        if shows and self.seen > OUTPUT_BYTES: return None
        return super().process_message(msg, cell, cell_index)


c = get_config()  # noqa: F821 (nbgrader defines it)
c.CourseDirectory.course_id = 'rdd'
c.CourseDirectory.source_directory = '_source'    # the underscore keeps answers out of nbdev and off its site
c.ClearSolutions.code_stub = {'python': "# your code here\nraise NotImplementedError('still to be written')"}
c.ClearSolutions.text_stub = '*Write your answer here.*'
c.IncludeHeaderFooter.header = ''
c.Execute.timeout = CELL_SECONDS
c.Execute.iopub_timeout = CELL_SECONDS
usual = Autograde.class_traits()['autograde_preprocessors'].default()
c.Autograde.autograde_preprocessors = [Execute if p is preprocessors.Execute else p for p in usual]
if GUARDED:
    c.Execute.kernel_name = 'guarded'
    os.environ['JUPYTER_PATH'] = os.pathsep.join(
        filter(None, [str(COURSE/'_kernel'), os.environ.get('JUPYTER_PATH')]))
