"""The kernels by name: the one line that a new one adds. Importing this loads nothing else.

Each is a subclass of `lmnas.nn.kernels.reference.Reference`, in a file of its own.
"""

KERNELS = {
    "reference": "lmnas.nn.kernels.reference:Reference",
    "fused": "lmnas.nn.kernels.fused:Fused",
    "segment": "lmnas.nn.kernels.segment:Segment",
}
PLAIN = "reference"
"""Kernel that runs where no other is chosen or supports the operation."""
CHOICES = ("auto", *KERNELS)
"""Values of `execution.kernel` and `--kernel`."""
