"""The genotype: an architecture as a small frozen value.

It names its space and the choices made there, nothing else. Sizes, seeds and training settings are not part of it, so
one cell has one id whatever it is trained on.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lmnas.core.errors import UserError, nearest

FORMAT = 1
SHIPPED = Path(__file__).parents[1] / "spaces" / "genotypes"


@dataclass(frozen=True)
class Genotype:
    """The named choices of one architecture.

    Attributes:
        space: name of the space that can build it.
        choices: decision name -> chosen value (JSON values; subsets are lists in option order).
    """

    space: str
    choices: Mapping[str, Any] = field(hash=False, compare=False)
    canonical: str = field(init=False, repr=False)
    """Canonical JSON: sorted keys, no spaces. Equality and the id rest on it."""

    def __post_init__(self) -> None:
        text = json.dumps({"choices": dict(self.choices), "space": self.space}, sort_keys=True, separators=(",", ":"))
        object.__setattr__(self, "canonical", text)
        # a private deep copy that refuses assignment: no edit may reach a frozen value
        object.__setattr__(self, "choices", MappingProxyType(json.loads(json.dumps(dict(self.choices)))))

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, Any]]]:
        # a mapping proxy cannot be pickled or copied
        return type(self), (self.space, dict(self.choices))

    @property
    def id(self) -> str:
        """First 12 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "space": self.space, "choices": dict(self.choices)}

    @classmethod
    def from_dict(cls, document: Any, where: str = "genotype") -> "Genotype":
        """Read the value back; `where` names the source in errors.

        Raises:
            UserError: not an object with `format`, `space` and `choices`, or of an unknown format.
        """
        if not isinstance(document, dict):
            raise UserError(
                f"{where}: expected a JSON object with 'space' and 'choices', got {type(document).__name__}"
            )
        missing = [key for key in ("format", "space", "choices") if key not in document]
        if missing:
            raise UserError(f"{where}: missing {missing[0]!r}; a genotype file has 'format', 'space' and 'choices'")
        if type(document["format"]) is not int or document["format"] != FORMAT:
            raise UserError(f"{where}: format {document['format']!r} is unknown, this version reads format {FORMAT}")
        if not isinstance(document["space"], str) or not isinstance(document["choices"], dict):
            raise UserError(f"{where}: 'space' must be a name and 'choices' an object of decision: value")
        return cls(document["space"], document["choices"])


def shipped_names() -> list[str]:
    """Names of the published genotypes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load_genotype(name_or_path: str | Path) -> Genotype:
    """A genotype from a JSON file or by the name of a shipped one (`darts-v2`).

    Raises:
        UserError: no such file or name, or the file is not a genotype.
    """
    return Genotype.from_dict(load_document(name_or_path), str(name_or_path))


def load_document(name_or_path: str | Path) -> dict[str, Any]:
    """The JSON document of a genotype, with whatever notes stand beside the choices (`source`, say)."""
    path = Path(name_or_path)
    try:
        exists = path.exists()
    except OSError:  # a name too long for a path
        exists = False
    if not exists:
        if str(name_or_path) not in shipped_names():
            raise UserError(
                f"genotype {str(name_or_path)!r}: neither a file nor a shipped name. "
                + nearest(name_or_path, shipped_names())
            )
        path = SHIPPED / f"{name_or_path}.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"genotype {path}: not JSON ({error})") from None
    except OSError as error:
        raise UserError(f"genotype {path}: cannot be read ({error.strerror})") from None
    return document
