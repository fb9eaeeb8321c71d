"""The scripts of `benchmarks/` run; what they measure here means nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])])
def test_gpu(device, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(SCRIPTS / "gpu.py"), "--device", device, "--small", "--no-compiled"]
    subprocess.run([*command, "--rounds", "1", "--out", str(out)], check=True, timeout=300)
    document = json.loads(out.read_text())
    assert set(document["rows"]) == {
        "search-weight",
        "search-first-order",
        "search-second-order",
        "retrain",
        "retrain-3-seeds",
        "enas-shared",
    }
    for row in document["rows"].values():
        assert {"eager", "lstm"} <= set(row["ways"])
        assert all(way["median"] > 0 and len(way["milliseconds"]) == 1 for way in row["ways"].values())
