"""lmnas finds neural architectures for language, trains the one it found, and hands it over."""

__version__ = "0.1.0"
