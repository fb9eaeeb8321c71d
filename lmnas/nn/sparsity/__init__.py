"""Smaller dense networks by sparse Bayesian learning: strips of weights (`strips`), training with them (`training`)."""
