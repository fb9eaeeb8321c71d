"""Messages between a driver and its workers: JSON, one document a message."""

import json
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from lmnas.core import errors
from lmnas.core.updates import Incident, Progress, Update

LONGEST_TEXT = 500
"""Characters of a text in an update."""
KNOWN = {error.__name__: error for error in (errors.UserError, errors.Interrupted, errors.Unscored, errors.Emptied)}
"""Errors that mean the same on the other side, made of their message."""


class WorkerError(RuntimeError):
    """An error of a call in a worker: its type, message and traceback."""


def send(connection: Connection, **message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> dict[str, Any]:
    return json.loads(connection.recv_bytes())


def update_document(update: Update) -> dict[str, Any]:
    found = asdict(update)
    return {key: value[:LONGEST_TEXT] if isinstance(value, str) else value for key, value in found.items()}


def read_update(document: dict[str, Any]) -> Update:
    return Incident(**document) if "message" in document else Progress(**document)


def error_document(error: BaseException) -> dict[str, Any]:
    step = {"step": error.step, "cause": error.cause} if isinstance(error, errors.Diverged) else {}
    text = "".join(traceback.format_exception(error))
    return {"type": type(error).__name__, "message": str(error), "traceback": text, **step}


def read_error(document: dict[str, Any]) -> Exception:
    """The same error where its type is this package's, else one that tells all about it."""
    name, message = document["type"], document["message"]
    known = KNOWN.get(name)
    if known is not None:
        return known(*([message] if message else []))
    if name == errors.Diverged.__name__:
        return errors.Diverged(document["step"], document["cause"])
    return WorkerError(f"{name}: {message}\n{document['traceback']}")
