"""The command line called in this process: exit code, output, answers as JSON."""

import contextlib
import io
import json

import tiny
import yaml

from lmnas.cli.main import main


def call(*arguments):
    """(exit code, standard output, standard error)"""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def answer(*arguments):
    """The JSON object that a command answers with; there is nothing else on standard output."""
    code, out, _ = call(*arguments, "--json")
    assert code == 0
    assert out.count("\n") == 1
    return json.loads(out)


def write_recipe(path, data, **changes):
    path.write_text(yaml.safe_dump(tiny.recipe(data, **changes)))
    return path
