"""Recurrent bodies: (T, B, H) -> (T, B, H) with a state that is carried on."""

RECURRENT = frozenset({"sequence", "causal", "stateful"})
"""What all of them make."""
