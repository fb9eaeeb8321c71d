"""The recurrent cell and the softmax layer by the kernel in use; what that kernel does not take, the reference runs.

`auto` takes the fused kernel where it is compiled already, or where enough work is ahead for compiling to pay; else the
reference. A process begins with the reference. All kernels are exact, but their sums differ in order, so a run that is
continued must not change from one to the other: it asks `decide` once and keeps the answer.
"""

from collections.abc import Callable

from torch import Tensor

from lmnas.nn.kernel_table import PLAIN
from lmnas.nn.kernels import cross_entropy, fused, planned, reference
from lmnas.nn.kernels.choice import kernel_named
from lmnas.nn.kernels.in_use import current
from lmnas.nn.kernels.reference import Operands, Program


def decide(seconds_of_work_ahead: Callable[[], float]) -> tuple[str, str]:
    """The name of the kernel that `auto` means here, and the reason in a few words; nothing is compiled yet.

    Args:
        seconds_of_work_ahead: at the reference's speed; asked only where the answer matters.
    """
    problem = unavailable("fused")
    if problem:
        return PLAIN, problem
    if fused.is_cached():
        return "fused", "compiled already"
    seconds = seconds_of_work_ahead()
    if seconds > 2 * fused.COMPILE_SECONDS:
        return "fused", f"about {seconds:.0f} s of work at the plain kernel's speed pay for compiling"
    return PLAIN, f"about {seconds:.0f} s of work do not pay for compiling"


def unavailable(kernel: str) -> str | None:
    """Reason that `kernel` is unavailable here, as far as known before compiling; None: it is available."""
    return kernel_named(kernel).unavailable()


def must_compile(kernel: str) -> bool:
    """True if taking this kernel would compile it first."""
    return kernel_named(kernel).must_compile()


def keeps_a_block(kernel: str) -> bool:
    """True if the cell's backward pass reads one block of memory with this kernel, as `planned` lays it out."""
    return kernel_named(kernel).keeps_a_block


def kernel_in_use(device: str = "cpu") -> str:
    """Name of the code that runs on this type of device in float32 and float64; other types run the reference."""
    return kernel_named(current().kernel).runs_on.get(device, PLAIN)


def recurrent_path(x: Operands, program: Program, sampled: bool = False) -> Tensor:
    """`reference.recurrent_path` by the kernel in use. (T, B, H).

    Args:
        sampled: other programs follow in other calls, so that nothing costly should be prepared for this one.
    """
    if x.inputs.is_meta and keeps_a_block(current().planned):
        return planned.recurrent(x, x.weights, len(program.inputs), len(program.inputs))
    kernel = kernel_named(current().kernel)
    if kernel.takes(x, x.weights):
        return kernel.recurrent_path(x, program, sampled)
    return reference.recurrent_path(x, program)


def recurrent_mixture(x: Operands, p_input: Tensor, p_edges: Tensor, output_weights: Tensor) -> Tensor:
    """`reference.recurrent_mixture` by the kernel in use. (T, B, H)."""
    weights = (*x.weights, p_input, p_edges, output_weights)
    if x.inputs.is_meta and keeps_a_block(current().planned):
        return planned.recurrent(x, weights, len(output_weights) - 1, len(p_edges))
    kernel = kernel_named(current().kernel)
    if kernel.takes(x, weights):
        return kernel.recurrent_mixture(x, p_input, p_edges, output_weights)
    return reference.recurrent_mixture(x, p_input, p_edges, output_weights)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int = -100
) -> Tensor:
    """`cross_entropy.linear_cross_entropy` by the kernel in use. Scalar."""
    kernel = kernel_named(current().kernel)
    if kernel.takes_softmax(hidden, weight, *([] if bias is None else [bias])):
        return kernel.linear_cross_entropy(hidden, weight, bias, targets, ignore)
    return cross_entropy.linear_cross_entropy(hidden, weight, bias, targets, ignore)
