"""Look a candidate up in a table of published trainings: searches of seconds whose scores are real.

For cells of NAS-Bench-NLP (Klyuchnikov et al., 2020, arXiv 2006.07116): the perplexity on the test split of Penn
Treebank after the benchmark's 50 epochs, mean over its trainings. The benchmark's validation losses are not public, so
a search on this table sees test losses: good for comparing searches, not for choosing a model to report.
"""

import math
from pathlib import Path

import torch

from lmnas.core.capabilities import refuse_unfit
from lmnas.core.contracts import Estimator, Proposal, Score, Space, Task
from lmnas.core.errors import Unscored, UserError
from lmnas.core.genotype import Genotype
from lmnas.core.job import Job
from lmnas.spaces.recurrent.published import NAS_BENCH_NLP, PublishedCell, nas_bench_nlp


class Table(Estimator):
    """Published perplexities; a candidate that the table lacks, or that never trained to an end, has no score."""

    takes = frozenset({"graph"})
    is_proxy = True  # others trained it, at another size: it ranks candidates and is no result of this run
    is_cheap = True

    def __init__(self, space: Space, task: Task, seed: int, device: torch.device, *, data: str = NAS_BENCH_NLP):
        """
        Args:
            data: the table's file or folder; default: nas-bench-nlp below LMNAS_DATA.
        """
        refuse_unfit("the table of estimator.data", self.takes, space.name, space.makes)
        if task.objective.name != "perplexity":
            raise UserError(f"estimator.data: the table has perplexities, the task measures {task.objective.name}")
        self.space = space
        self.cells: dict[str, PublishedCell] = {}
        for cell in nas_bench_nlp(data, "estimator.data"):
            try:
                # two recipes of one function keep the first one's losses, as the benchmark numbers them
                self.cells.setdefault(space.canonical(Genotype(space.name, cell.recipe)).id, cell)
            except UserError:
                continue  # a cell that this space's settings do not allow is not asked for

    def estimate(self, proposal: Proposal, seed: int, job: Job, parent: Path | None = None) -> Score:
        """The published mean perplexity; `n_predictions` is 0, as the table does not say.

        Raises:
            Unscored: the table does not have the cell, or no training of it came to an end.
        """
        loss = self.loss(proposal.genotype)
        return Score(math.exp(loss), "test", 0)

    def loss(self, genotype: Genotype) -> float:
        """Nats per token.

        Raises:
            Unscored: as `estimate`.
        """
        cell = self.cells.get(self.space.canonical(genotype).id)
        if cell is None:
            raise Unscored(f"the table has no cell {genotype.id}")
        if cell.loss is None:
            raise Unscored(f"none of the {cell.n_runs} published trainings of cell {cell.id} came to an end")
        return cell.loss
