"""Lengths as values and as text."""

import pytest

from lmnas.core.errors import UserError
from lmnas.core.length import UNITS, Length


@pytest.mark.parametrize("unit", UNITS)
def test_text_and_back(unit):
    for amount in (1, 5, 1234567, 0.5):
        length = Length(amount, unit)
        assert Length.parse(length.text()) == length


def test_what_is_read():
    assert Length.parse("7") == Length(7, "epochs") and Length.parse("1e6 tokens") == Length(1000000, "tokens")
    assert Length.parse("1 step") == Length(1, "steps") and Length(1, "steps").text() == "1 step"


@pytest.mark.parametrize(
    "text, message",
    [
        ("5 stepz", "unit 'stepz' is unknown. Did you mean 'steps'?"),
        ("0 steps", "expected a positive number"),
        ("nan epochs", "expected a positive number"),
        ("many", "length 'many': expected a positive number"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(UserError) as refused:
        Length.parse(text)
    assert message in str(refused.value) and "\n" not in str(refused.value)
