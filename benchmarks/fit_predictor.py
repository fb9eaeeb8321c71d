"""Fit the predictor that the package ships to 100 trained cells of NAS-Bench-NLP.

    python benchmarks/fit_predictor.py DATA/nas-bench-nlp/architectures.jsonl lmnas/proxies/predictor.json

Features are standardised over 500 untrained cells of the benchmark's generator; the 100 cells are drawn by seed 0, at
most one of a group. About three minutes on one core.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from lmnas.core.files import digest, write_atomic
from lmnas.core.genotype import Genotype
from lmnas.core.seeds import rng
from lmnas.methods.proxies.predictor import Predictor, features
from lmnas.spaces.recurrent.graph import RecurrentGraph

SEED, N_CELLS, N_UNTRAINED = 0, 100, 500


def main(table: str, target: str) -> None:
    torch.set_num_threads(1)
    space = RecurrentGraph(direct_memory=True)
    untrained = [features(space, space.sample(rng(SEED, "untrained", k))) for k in range(N_UNTRAINED)]
    values = np.array([list(cell.values()) for cell in untrained])
    mean, scale = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    scale[scale < 1e-6] = 1.0

    with open(table, "rb") as file:
        text = file.read()
    entries = [json.loads(line) for line in text.splitlines()]
    groups: dict[str, list] = {}
    for entry in entries:
        if entry["ptb"]["test_loss_mean"] is not None:
            groups.setdefault(entry["group"], []).append(entry)
    draws = rng(SEED, "trained cells")
    chosen = [draws.choice(groups[group]) for group in draws.sample(sorted(groups), N_CELLS)]
    cells = [features(space, space.canonical(Genotype(space.name, entry["recipe"]))) for entry in chosen]
    predictor = Predictor.fit(cells, [entry["ptb"]["test_loss_mean"] for entry in chosen], mean, scale)
    provenance = {
        "table": "NAS-Bench-NLP, PTB test losses (Klyuchnikov et al., 2020, Apache-2.0; Serianni & Kalita, 2023, "
        "CC BY 4.0)",
        "table_digest": digest(text),
        "fitted_by": "benchmarks/fit_predictor.py",
        "seed": SEED,
        "untrained_cells": N_UNTRAINED,
        "trained_cells": [entry["id"] for entry in chosen],
        "groups": [entry["group"] for entry in chosen],
    }
    write_atomic(Path(target), json.dumps({"provenance": provenance, **predictor.document()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
