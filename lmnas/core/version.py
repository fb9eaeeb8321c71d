"""The version of the package, where everybody may read it."""

VERSION = "0.1.0"
