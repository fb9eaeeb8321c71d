"""The Python interface on runs that are not finished."""

import pytest
import tiny

import lmnas
from lmnas.core.errors import UserError
from lmnas.runs.directory import Run
from lmnas.runs.recipe import load_recipe


def test_an_unfinished_run_says_what_it_lacks(tmp_path):
    Run(tmp_path / "run", load_recipe(tiny.recipe("pydoc"))).close()
    run = lmnas.load(tmp_path / "run")
    with pytest.raises(UserError, match=r"run: it has no genotype yet; start it again to continue it"):
        _ = run.genotype
    with pytest.raises(UserError, match=r"run: it has no trained model yet"):
        run.model()
    (tmp_path / "run" / "model.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.json: cannot be read .* writes it anew"):
        run.model()
