"""Recurrent bodies: (T, B, H) -> (T, B, H) with a state that is carried on."""

RECURRENT = frozenset({"sequence", "causal", "stateful"})
"""Capabilities of them all."""
