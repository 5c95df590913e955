"""Typical mistakes of students, and the points that they cost.

A row: assignment, solution cell, the mistake, what it replaces in the reference solution, by what, and the test cells
that give no points then (`cell=POINTS` where it gives a part). All other cells keep theirs. Adding one is a line.
"""
SORTED = 'test-sorted-whole test-sorted-fraction test-sorted-gradient'

WRONG = [
    ('1_cvar', 'cvar-sorted', 'answers of the visible tests', '    worst_first =',
     '    return {.2: 8.5, 1.: losses.mean(), .25: 8.2}[tail] + 0 * losses[0]\n    worst_first =', SORTED),
    ('1_cvar', 'cvar-sorted', 'alpha for tail', '    worst_first =', '    tail = 1 - tail + 1e-9\n    worst_first =', SORTED),
    ('1_cvar', 'cvar-sorted', 'lowest losses', 'descending=True', 'descending=False', SORTED),
    ('1_cvar', 'cvar-sorted', 'detached', '    worst_first = losses', '    worst_first = losses.detach()', 'test-sorted-gradient'),
    ('1_cvar', 'cvar-sorted', 'whole samples only', '    worst_first =',
     '    tail = max(1, int(tail * len(losses) + 1e-6)) / len(losses)\n    worst_first =', 'test-sorted-fraction'),
    ('1_cvar', 'ru-objective', 'no division by tail', ' / tail', '', 'test-ru-objective'),
    ('1_cvar', 'cvar-ru', 'a coarse grid of thresholds', 'for t in losses', 'for t in torch.arange(-3., 8.)', 'test-cvar-ru'),
    ('1_cvar', 'cvar-weights', 'weights in sorted order', 'losses.argsort(descending=True)', 'torch.arange(len(losses))', 'test-weights'),
    ('1_cvar', 'cvar-weights', 'all weight on one loss', ".clamp(0, 1)", ".clamp(0, 1) * (order == order[0])", 'test-weights'),
    ('1_cvar', 'cvar-lp', 'minimised instead', 'linprog(-losses', 'linprog(losses', 'test-lp'),
]
