"""REINFORCE with the ENAS controller.

Pham et al., Efficient Neural Architecture Search via Parameter Sharing, 2018, section 2.2
(https://arxiv.org/abs/1802.03268); defaults are the paper's, its recurrent search's where they differ. What the paper
leaves open (T, C, the locality prior, c = 80) follows the authors' code (https://github.com/melodyguan/enas).

Where we depart:
- Rewards come in batches: one baseline update and one Adam step for each.
- The baseline starts at the first batch's mean: from 0, early advantages are all positive.
- Gradients are not clipped.
"""

import copy
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from lmnas.core import seeds
from lmnas.core.contracts import Objective, Proposal, SharingStrategy, Space, Trial
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.methods.strategies.controller import Controller

RECENT = 100
"""Proposals over which `statistics` averages the entropy."""

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Reinforce(SharingStrategy):
    """An LSTM policy over the space's decisions, trained by the score-function gradient.

    For a told batch, with R' = R + entropy_weight H and H the entropy, a constant here (only the score-function term
    acts on it):

        b <- b - (1 - baseline_decay) (b - mean R')
        loss = -mean((R' - b) log π) + subset_penalty mean(D)

    The baseline moves first, as in the authors' code. It then holds a part of the batch's own rewards, which shrinks
    the expected gradient of n trials by the factor 1 - (1 - baseline_decay) / n (1 - 1 / n for the batch that
    `first-reward` starts from) and leaves its direction alone.

    D is how far the probabilities of the options of subsets (skip connections, each on its own) are from `subset_rate`:
    their Kullback-Leibler divergence from it, summed over the options, averaged over the subsets. The paper speaks of
    the reward, its code adds it to the loss, as here. Off by default; ENAS' macro search has it (0.8, rate 0.4).

    Trials are taken to come from the present policy: what was proposed before the last update is not reweighted.

    Args:
        hidden: width of the LSTM.
        adam_beta1: the authors' code uses 0, with an epsilon of 1e-3.
        temperature: T in C tanh(logit / T); null: no division.
        tanh_constant: C; null: logits as they are.
        entropy_weight: reward per nat.
        baseline_start: mean R' of the first told batch, or 0.
        reward_scale: c in R = c / value, where the objective is minimised; a maximised value is the reward itself, and
            a minimised one that has a worst value gives R = 1 - value / worst (an error rate: the accuracy). A failed
            trial has R = 0.
        locality: index logits lose (l - j)^2 / locality; null: no prior.
        init_range: weights start uniform within ± this.
        category_constant: C of categories, the choices that are no index; null: `tanh_constant`.
        option_bias: what the learned bias of a category's options starts from, `{sep_conv_3x3: 10}` (ENAS' micro
            search); null: no biases.
        subset_penalty: weight of D.
        subset_rate: share of a subset's options that is meant to be taken.
        rewards_per_round: proposals scored after each pass over the training data.
        rewards_per_update: of these, how many one Adam step takes.

    >>> strategy = Reinforce(space, objective, seed=0)
    >>> proposals = strategy.ask(10)
    >>> strategy.tell([Trial(p, scores={"perplexity": perplexity(p.genotype)}) for p in proposals])
    """

    def __init__(
        self,
        space: Space,
        objective: Objective,
        seed: int,
        *,
        hidden: Annotated[int, Field(ge=1)] = 100,
        learning_rate: Positive = 3.5e-4,
        adam_beta1: Fraction = 0.9,
        adam_epsilon: Positive = 1e-8,
        temperature: Positive | None = 5.0,
        tanh_constant: Positive | None = 2.5,
        entropy_weight: Annotated[float, Field(ge=0)] = 1e-4,
        baseline_decay: Fraction = 0.95,
        baseline_start: Literal["first-reward", "zero"] = "first-reward",
        reward_scale: Positive = 80.0,
        locality: Positive | None = 6.0,
        init_range: Positive = 0.1,
        category_constant: Positive | None = None,
        option_bias: dict[str, float] | None = None,
        subset_penalty: Annotated[float, Field(ge=0)] = 0.0,
        subset_rate: Annotated[float, Field(gt=0, lt=1)] = 0.4,
        rewards_per_round: Annotated[int, Field(ge=0)] = 2000,
        rewards_per_update: Annotated[int, Field(ge=1)] = 10,
    ):
        if not len(space.decisions):
            raise UserError(
                f"space {space.name!r} states no decisions for a controller to take; use a strategy that "
                "samples and mutates"
            )
        self.space, self.objective, self.seed = space, objective, seed
        self.entropy_weight, self.baseline_decay, self.reward_scale = entropy_weight, baseline_decay, reward_scale
        self.subset_penalty, self.subset_rate = subset_penalty, subset_rate
        self.rewards_per_round, self.rewards_per_update = rewards_per_round, rewards_per_update
        self.controller = Controller(
            space.decisions,
            seeds.generator(seed, "controller"),
            hidden=hidden,
            temperature=temperature,
            tanh_constant=tanh_constant,
            locality=locality,
            init_range=init_range,
            category_constant=category_constant,
            option_bias=option_bias,
        )
        self.optimizer = torch.optim.Adam(
            self.controller.parameters(), lr=learning_rate, betas=(adam_beta1, 0.999), eps=adam_epsilon
        )
        self.baseline: float | None = 0.0 if baseline_start == "zero" else None
        self.n_proposed = 0
        self.entropies: list[float] = []
        self.mean_reward: float | None = None

    def ask(self, n: int) -> list[Proposal]:
        """`n` proposals of the present policy; they may repeat."""
        if n < 1:
            return []
        rows = [self._uniforms("proposal", self.n_proposed + k) for k in range(n)]
        choices, _, entropy = self.controller.draw(torch.stack(rows))
        self.n_proposed += n
        self.entropies = (self.entropies + entropy.tolist())[-RECENT:]
        return [Proposal(Genotype(self.space.name, row)) for row in choices]

    def choice(self, step: int) -> Genotype:
        """A fresh path of the present policy for each minibatch (section 2.2)."""
        (row,), _, _ = self.controller.draw(self._uniforms("choice", step)[None])
        return Genotype(self.space.name, row)

    def _uniforms(self, *purpose: object) -> torch.Tensor:
        """(U,) the uniform numbers that one architecture is drawn from."""
        generator = seeds.generator(self.seed, *purpose)
        return torch.rand(self.controller.n_uniforms, dtype=torch.float64, generator=generator)

    def tell(self, trials: Sequence[Trial]) -> None:
        """One update of the policy from all of `trials`.

        Raises:
            UserError: a minimised value is not above 0, so that c / value is no reward.
        """
        if not trials:
            return
        rewards = torch.tensor([self.reward(trial.value) for trial in trials], dtype=torch.float64)
        choices = [trial.genotype.choices for trial in trials]
        log_prob, entropy, divergence = self.controller.evaluate_against(choices, self.subset_rate)
        R = rewards + self.entropy_weight * entropy.detach()
        mean = float(R.mean())
        b = mean if self.baseline is None else self.baseline
        self.baseline = b - (1 - self.baseline_decay) * (b - mean)
        loss = -((R - self.baseline) * log_prob).mean()
        if self.subset_penalty:
            loss = loss + self.subset_penalty * divergence.mean()
        self.mean_reward = float(rewards.mean())
        if not loss.requires_grad:  # a space of constants: nothing to learn
            return
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def reward(self, value: float | None) -> float:
        """R of one trial's value."""
        if value is None or not math.isfinite(value):
            return 0.0
        if self.objective.direction == "maximize":
            return value
        if self.objective.worst is not None:
            return 1 - value / self.objective.worst
        if value <= 0:
            raise UserError(
                f"reinforce: the reward {self.reward_scale:g} / {self.objective.name} needs values above 0, got {value}"
            )
        return self.reward_scale / value

    def statistics(self) -> dict[str, Any]:
        """Mean entropy in nats of the latest proposals, baseline, and mean reward of the last told batch.

        None where there is nothing to average yet.
        """
        entropy = sum(self.entropies) / len(self.entropies) if self.entropies else None
        return {"entropy": entropy, "baseline": self.baseline, "reward": self.mean_reward}

    def state_dict(self) -> dict[str, Any]:
        return {
            "controller": {name: weight.clone() for name, weight in self.controller.state_dict().items()},
            # the settings in `param_groups` come from the recipe
            "adam": copy.deepcopy(self.optimizer.state_dict()["state"]),
            "baseline": self.baseline,
            "n_proposed": self.n_proposed,
            "entropies": list(self.entropies),
            "mean_reward": self.mean_reward,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.controller.load_state_dict(state["controller"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": copy.deepcopy(state["adam"]), "param_groups": groups})
        self.baseline = state["baseline"]
        self.n_proposed = state["n_proposed"]
        self.entropies = list(state["entropies"])
        self.mean_reward = state["mean_reward"]
