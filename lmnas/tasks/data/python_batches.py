"""The batches of CIFAR-10's python archive, read without running what they say.

They are pickles (protocol 2, written by Python 2): a dict of byte strings, a list of numbers and one array of bytes. A
pickle is a program, so only the instructions that these files use are understood, and of the functions that they name
only the two that make a numpy array; everything else is refused. Instructions are told apart by the standard library's
disassembler, which runs none.
"""

import pickletools
from typing import Any

import numpy as np

_ARRAY, _NDARRAY, _DTYPE = "array", "ndarray", "dtype"
_GLOBALS = {
    "numpy.core.multiarray _reconstruct": _ARRAY,
    "numpy._core.multiarray _reconstruct": _ARRAY,
    "numpy ndarray": _NDARRAY,
    "numpy dtype": _DTYPE,
}
_VALUES = {"SHORT_BINSTRING", "BINSTRING", "BINUNICODE", "BININT", "BININT1", "BININT2"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


class Refused(ValueError):
    """Not one of these files, or one that asks for more than they do."""


class _Global(str):
    """A function that a file names; a text of its own class, so that no text of the file can pass for it."""


class _Array:
    """An array between the instruction that makes it and the one that fills it."""

    array: np.ndarray | None = None


def read_batch(data: bytes) -> dict[str, Any]:
    """The dict that a batch holds: texts, lists of numbers and texts, and (N, M) uint8 arrays, by name.

    Raises:
        Refused: with the reason.
    """
    try:
        value = _run(data)
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
        raise Refused(f"broken ({error or type(error).__name__})") from None
    if not isinstance(value, dict):
        raise Refused("holds no dict")
    return {key: item.array if isinstance(item, _Array) else item for key, item in value.items()}


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        start = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[start + 1 :]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "TUPLE":
            stack.append(tuple(to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("APPEND", "APPENDS"):
            items = to_mark() if name == "APPENDS" else [stack.pop()]
            _of(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _of(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            if argument not in _GLOBALS:
                raise Refused(f"names {argument.replace(' ', '.')!r}, which is not run")
            stack.append(_Global(_GLOBALS[argument]))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "BUILD":
            _build(stack[-2], stack.pop())
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise Refused(f"has the instruction {name}, which these files do not use")
    raise Refused("has no end")


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise Refused(f"takes a {type(value).__name__} for a {kind.__name__}")
    return value


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global):
        raise Refused("calls what is no function")
    if function == _ARRAY and isinstance(arguments[0], _Global) and arguments[0] == _NDARRAY:
        return _Array()
    if function == _DTYPE and arguments[0] == "u1":
        return _Global("u1")
    raise Refused("makes something else than an array of bytes")


def _build(target: Any, state: Any) -> None:
    """An array's state is (version, shape, dtype, whether columns come first, bytes); a dtype's is nothing new."""
    if isinstance(target, _Array):
        _, shape, dtype, columns_first, content = state
        if dtype != "u1" or columns_first:
            raise Refused("holds an array of something else than bytes, or in another order")
        target.array = np.frombuffer(content.encode("latin-1"), np.uint8).reshape(shape)
    elif not (isinstance(target, _Global) and target == "u1"):
        raise Refused("sets the state of what is no array")
