"""The kernels by name: the one line that a new one adds. Importing this loads nothing else.

Each is a subclass of `lmnas.nn.kernels.reference.Reference`, in a file of its own.
"""

KERNELS = {
    "reference": "lmnas.nn.kernels.reference:Reference",
    "fused": "lmnas.nn.kernels.fused:Fused",
    "segment": "lmnas.nn.kernels.segment:Segment",
}
PLAIN = "reference"
"""What runs where nothing else is chosen or taken."""
CHOICES = ("auto", *KERNELS)
"""What `execution.kernel` and `--kernel` take."""
