"""The run directory: everything about one experiment, readable after any kill.

recipe.yaml       the resolved recipe             jobs/<job>/      checkpoints, events, result of each job
environment.json  versions, device, data          study.db         the trials (Optuna, SQLite)
incidents.jsonl   starts, stops, incidents        genotype.json, model.safetensors, results.json, report.html
kernel.json       which kernel the run keeps
"""

import contextlib
import errno
import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from lmnas.core.errors import UserError
from lmnas.core.files import append_line, move_into_place, not_written, write_atomic, write_json
from lmnas.runs.recipe import Recipe, differences, load_recipe, resolved

NOT_THE_EXPERIMENT = ("execution",)
"""Sections that may differ when a run is continued."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""Errors of writing that are the machine's, not the program's."""


class Run:
    """An open run directory; one process at a time holds it.

    Args:
        path: made if absent.
        recipe: of a new run, or the same again to continue; None: continue what is there.

    Raises:
        UserError: not writable, held by another process, no run there, or a run of another recipe.
    """

    def __init__(self, path: Path, recipe: Recipe | None = None):
        self.path = path
        self.asked_kernel = "auto" if recipe is None else recipe.execution.kernel
        """The kernel that this start asks for; the one pinned in the directory stays unless another one is named."""
        if recipe is None and not (path / "recipe.yaml").is_file():
            raise UserError(f"run {path}: no run there (recipe.yaml is missing); start one with `lmnas search`")
        if recipe is not None and path.is_dir() and not (path / "recipe.yaml").is_file():
            strangers = [entry.name for entry in path.iterdir() if entry.name not in ("lock", ".recipe.yaml.tmp")]
            if strangers:
                raise UserError(f"run {path}: the folder holds other files ({strangers[0]}) and no run; name another")
        try:
            path.mkdir(parents=True, exist_ok=True)
            # the system's own lock: it ends with the process, however that ends; the file stays
            self._lock = FileLock(
                path / "lock", blocking=False, thread_local=False, preserve_lock_file=True, on_acquired=_sign
            )
            self._lock.acquire()
        except Timeout:
            raise UserError(f"run {path}: another process ({_holder(path)}) is working on it") from None
        except OSError as error:
            raise UserError(f"run {path}: cannot be written ({error.strerror})") from None
        try:
            self.recipe = self._settle(recipe)
        except BaseException:
            self.close()
            raise

    @functools.cached_property
    def storage(self) -> RDBStorage:
        """`study.db`, opened once, since opening takes a while.

        It is made beside its place: tables and their indices come one after the other, and a kill between them would
        leave a database that takes the same study twice.
        """
        path, beside = self.path / "study.db", self.path / ".study.db.tmp"
        if not path.exists():
            for left in (beside, Path(f"{beside}-journal")):
                left.unlink(missing_ok=True)
            made = RDBStorage(f"sqlite:///{beside}")
            made.remove_session()
            made.engine.dispose()
            move_into_place(beside, path)
        return RDBStorage(f"sqlite:///{path}")

    def close(self) -> None:
        if "storage" in self.__dict__:
            self.storage.remove_session()
            self.storage.engine.dispose()
        self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Raises UserError in place of an error of the disk or the database, which no code of ours can mend."""
        self.close()
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise UserError(not_written(Path(error.filename or self.path), error)) from error
        if isinstance(error, (StorageInternalError, SQLAlchemyError)):
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(
                f"run {self.path}: study.db cannot be read or written ({cause}). Make room or repair the disk, then "
                f"run the same command again to continue; if the file is broken, move it away: it is made anew from "
                f"the finished jobs"
            ) from error

    def _settle(self, recipe: Recipe | None) -> Recipe:
        """The recipe to follow: the given one if the directory is new or holds the same."""
        path = self.path / "recipe.yaml"
        if not path.is_file():
            assert recipe is not None
            write_atomic(path, yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True))
            return recipe
        stored = load_recipe(str(path))
        if recipe is None:
            return stored
        found = differences(resolved(stored), resolved(recipe))
        differing = [d for d in found if d[0].split(".")[0] not in NOT_THE_EXPERIMENT]
        if differing:
            place, there, here = differing[0]
            raise UserError(
                f"run {self.path} holds another experiment: {place} is {there!r} there and {here!r} here; "
                f"give another --run to start anew"
            )
        return recipe

    def job(self, name: str) -> Path:
        return self.path / "jobs" / name

    def note(self, event: str, **fields: Any) -> None:
        """An incident for `incidents.jsonl`: not part of the deterministic history."""
        line = json.dumps({"time": round(time.time(), 3), "pid": os.getpid(), "event": event, **fields})
        append_line(self.path / "incidents.jsonl", line)

    def results(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.path / "results.json").read_text(encoding="utf-8"))
        return {}

    def write_results(self, results: dict[str, Any]) -> None:
        write_json(self.path / "results.json", results)


def _sign(lock: int) -> None:
    """Leave this process's number in the open lock file, for whoever is refused."""
    with contextlib.suppress(OSError):  # a full disk: it is for information
        os.ftruncate(lock, 0)
        os.write(lock, f"pid {os.getpid()}".encode())


def _holder(path: Path) -> str:
    """Text that the holder of a run left in its lock file."""
    with contextlib.suppress(OSError, ValueError):
        return (path / "lock").read_text(encoding="utf-8").strip() or "unknown"
    return "unknown"
