"""What the segment kernel alone promises; `test_kernels` has the rest."""

import torch
from segments import Problem, errors

from lmnas.nn.kernels import Program
from lmnas.nn.kernels.segment import Segment


def test_nodes_without_a_part_may_be_infinite():
    """As in the reference, a loose end that overflows does not reach the mean of other nodes."""
    program = Program((3, 3, 0), (0, 0), (2,))
    problem = Problem(1, 2, 4, 2, seed=1, program=program, dtype=torch.float32)
    with torch.no_grad():
        problem.w_nodes[0].fill_(1e38)
        problem.inputs *= 1e3
        plain = problem.run()
        assert plain.isfinite().all()
        assert max(errors([problem.run(Segment())], [plain])) < 1e-5
