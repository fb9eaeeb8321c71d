"""The ENAS controller: an autoregressive LSTM policy over the decisions of any space.

Pham et al., Efficient Neural Architecture Search via Parameter Sharing, 2018, sections 2.1 and 2.2
(https://arxiv.org/abs/1802.03268). The attention over earlier nodes, the locality prior and what is fed to the next
step follow the authors' code (https://github.com/melodyguan/enas), as the paper only says "softmax".

Where we depart:
- All rows of a batch go through the LSTM together; the authors' code samples one architecture at a time.
- The entropy is that of every step's whole distribution, the authors' recurrent code takes -p log p of the sampled
  token alone.
- A decision with one option takes no step (the authors let node 1 "choose" node 0). The anchor of a node is the output
  of its first step that attends to earlier ones (macro networks: the step of its skips); a node without such a step, or
  one that only some rows take, gets a step of its own.
- Decisions that are not active take no step in their row: state and next input stay as they were.
- Weights are float64: rounding depends on the batch size, and in float32 it could change which option a given
  uniform number falls on, so that a proposal would depend on how many were asked for at once.

Shapes: n architectures, K options, H hidden width, U uniform numbers of one architecture.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmnas.core.decisions import Choices, Decision, Decisions
from lmnas.core.errors import UserError, nearest


@dataclass(frozen=True)
class _Step:
    """Step of the controller for one decision.

    Attributes:
        constant: nothing to choose, no LSTM step.
        position: the node that decides (l in the paper's formulas).
        anchors: nodes (of the decision's graph) whose anchors are written by steps of their own before this one.
        is_anchor: this step's LSTM output is the anchor of its node.
        head: index of the linear head and embedding table; None: attention over anchors.
    """

    decision: Decision
    constant: bool
    position: int = -1
    anchors: tuple[int, ...] = ()
    is_anchor: bool = False
    head: int | None = None


@dataclass
class _Rollout:
    """Actions and activity by decision name, and the (n,) log-probability and entropy of the rows.

    Actions: (n,) indices of an option, or (n, K) bits of a subset. Activity: (n,) bits, None where always active.
    """

    actions: dict[str, Tensor]
    active: dict[str, Tensor | None]
    log_prob: Tensor
    entropy: Tensor
    subsets: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    """For every free subset: (n, K) log-probabilities of taking and of leaving each option, and its activity."""


class Controller(nn.Module):
    """The policy π(choices).

    With LSTM output s at a step, squash(x) = C tanh(x / T) and anchors a_j (LSTM output at the step of node j):

        category      logits = squash(head s + bias)                                next input: embedding of the choice
        index         u_j = v^T tanh(W1 a_j + W2 s)
                      logits = squash(u_j) - (l - j)^2 / locality                   next input: a_j / (0.1 + l - j)
        subset        log-odds = 2 squash(q_j), the two-class logits [-q_j, q_j];   next input: sum of the chosen
                      q_j = u_j if it reads nodes, else one output of its head      anchors or embeddings / (1 + number)
        subset of k   k indices or categories one after the other, each behind the last: options that are not, or
                      leave too few, have probability 0. Exact, and one sequence for one subset

    Category decisions of nodes share head and embeddings with those of the same options; others have their own.

    Args:
        decisions: of the space.
        generator: draws the initial weights, uniform in ±`init_range`.
        hidden: H.
        temperature: T; None: no division.
        tanh_constant: C; None: logits as they are.
        locality: width of the fixed prior for near nodes; None: none.
        category_constant: C of categories, where it is another (ENAS' micro cells: 0.44 beside 1.1).
        option_bias: what a category's bias starts from, by option; others from 0. None: no biases.

    >>> controller = Controller(space.decisions, torch.Generator().manual_seed(0))
    >>> choices = controller.sample(10, torch.Generator().manual_seed(1))
    >>> log_prob, entropy = controller.evaluate(choices)
    """

    def __init__(
        self,
        decisions: Decisions,
        generator: torch.Generator,
        *,
        hidden: int = 100,
        temperature: float | None = 5.0,
        tanh_constant: float | None = 2.5,
        locality: float | None = 6.0,
        init_range: float = 0.1,
        category_constant: float | None = None,
        option_bias: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.decisions = decisions
        self.category_constant = tanh_constant if category_constant is None else category_constant
        self.hidden, self.temperature, self.tanh_constant, self.locality = hidden, temperature, tanh_constant, locality
        self.plan, head_sizes = _plan(decisions)
        self.n_uniforms = sum(_n_uniforms(step.decision) for step in self.plan if not step.constant)

        def weight(*shape: int) -> nn.Parameter:
            drawn = torch.empty(shape, dtype=torch.float64).uniform_(-init_range, init_range, generator=generator)
            return nn.Parameter(drawn)

        self.start = weight(hidden)
        self.W_input = weight(4 * hidden, hidden)
        self.W_hidden = weight(4 * hidden, hidden)
        self.W1 = weight(hidden, hidden)
        self.W2 = weight(hidden, hidden)
        self.v = weight(hidden)
        self.heads = nn.ParameterList([weight(size, hidden) for size in head_sizes])
        self.embeddings = nn.ParameterList([weight(size, hidden) for size in head_sizes])
        self.biases = None if option_bias is None else nn.ParameterList(self._biases(option_bias))

    def sample(self, n: int, generator: torch.Generator) -> list[Choices]:
        """Draw `n` architectures in one pass."""
        return self.draw(torch.rand(n, self.n_uniforms, dtype=torch.float64, generator=generator))[0]

    @torch.no_grad()
    def draw(self, uniforms: Tensor) -> tuple[list[Choices], Tensor, Tensor]:
        """The architectures that uniform numbers stand for: row i depends on row i alone.

        Args:
            uniforms: (n, U) in [0, 1), float64.

        Returns:
            n choices, their log-probabilities (n,) and entropies (n,) in nats.
        """
        rollout = self._unroll(len(uniforms), uniforms=uniforms)
        rows: list[Choices] = [{} for _ in range(len(uniforms))]
        for step in self.plan:
            decision = step.decision
            on = rollout.active[decision.name]
            values = rollout.actions[decision.name].tolist()
            for row, value, is_on in zip(rows, values, [True] * len(rows) if on is None else on.tolist(), strict=True):
                if not is_on:
                    continue
                row[decision.name] = decision.from_action(value)
        return rows, rollout.log_prob, rollout.entropy

    def evaluate(self, choices: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """Log-probability (n,) of `choices` and the entropy (n,) of the steps on their way in nats; differentiable.

        Raises:
            UserError: choices that the decisions do not allow.
        """
        rollout = self._replay(choices)
        return rollout.log_prob, rollout.entropy

    def evaluate_against(self, choices: Sequence[Mapping[str, Any]], rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Results of `evaluate`, and (n,) divergence of the free subsets (those of no fixed size) from a given rate.

        It is KL = p ln(p / rate) + (1 - p) ln((1 - p) / (1 - rate)) in nats, p an option's probability on the way of
        the row, summed over the options of a subset and averaged over the row's subsets; 0 without any. The authors'
        code has a sigmoid of each of the two logits in place of p, their softmax.
        """
        rollout = self._replay(choices)
        total = count = torch.zeros_like(rollout.log_prob)
        for log_yes, log_no, on in rollout.subsets:
            divergence = log_yes.exp() * (log_yes - math.log(rate)) + log_no.exp() * (log_no - math.log(1 - rate))
            active = torch.ones_like(count) if on is None else on.to(count.dtype)
            total, count = total + active * divergence.sum(-1), count + active
        return rollout.log_prob, rollout.entropy, total / count.clamp(min=1)

    def _replay(self, choices: Sequence[Mapping[str, Any]]) -> _Rollout:
        for row in choices:
            self.decisions.check(row, "controller")
        given = {}
        for decision in self.decisions:
            actions = [decision.action(row.get(decision.name)) for row in choices]
            given[decision.name] = torch.tensor(actions, dtype=torch.long).reshape(len(choices), *decision.shape)
        return self._unroll(len(choices), given=given)

    def _unroll(self, n: int, uniforms: Tensor | None = None, given: Mapping[str, Tensor] | None = None) -> _Rollout:
        """Take every decision of `n` rows: the `given` actions, or those drawn by inverse CDF from `uniforms`."""
        zeros = self.start.new_zeros(n, self.hidden)
        rollout = _Rollout({}, {}, zeros[:, 0], zeros[:, 0])
        start = inputs = self.start.expand(n, -1)
        state = (zeros, zeros)
        anchors: dict[tuple[str, Any], Tensor] = {}  # (graph, node) -> (n, H)
        used = 0

        for step in self.plan:
            decision = step.decision
            name, size = decision.name, len(decision.options)
            on = rollout.active[name] = self._active(decision, rollout)
            if step.constant:
                only = torch.ones(n, *decision.shape) if decision.shape else torch.zeros(n)
                rollout.actions[name] = only.long()
                continue

            for node in step.anchors:
                state = torch.lstm_cell(start, state, self.W_input, self.W_hidden)
                anchors[decision.graph, node] = state[0]
            s, cell = torch.lstm_cell(inputs, state, self.W_input, self.W_hidden)
            state = _where(on, s, state[0]), _where(on, cell, state[1])

            if step.head is None:
                memory = torch.stack([anchors[decision.graph, option] for option in decision.options], 1)  # (n, K, H)
            else:
                memory = self.embeddings[step.head].expand(n, -1, -1)
            if step.is_anchor:
                anchors[decision.graph, step.position] = s

            if not decision.shape:
                uniform = None if uniforms is None else uniforms[:, used]
                used += 1
                chosen = None if given is None else given[name]
                action, step_log_prob, step_entropy, following = self._index(step, s, memory, uniform, chosen)
            elif decision.picks is not None:
                # (n, k) positions in ascending order
                positions = None if given is None else given[name].topk(decision.picks).indices.sort(-1).values
                action = torch.zeros(n, size, dtype=torch.bool)
                step_log_prob = step_entropy = zeros[:, 0]
                last = torch.full((n,), -1)
                for k in range(decision.picks):
                    if k > 0:
                        s, cell = torch.lstm_cell(following, state, self.W_input, self.W_hidden)
                        state = _where(on, s, state[0]), _where(on, cell, state[1])
                    column = torch.arange(size)
                    allowed = (column > last[:, None]) & (column <= size - decision.picks + k)
                    uniform = None if uniforms is None else uniforms[:, used]
                    used += 1
                    chosen = None if positions is None else positions[:, k]
                    last, log_prob, entropy, following = self._index(step, s, memory, uniform, chosen, allowed)
                    step_log_prob, step_entropy = step_log_prob + log_prob, step_entropy + entropy
                    action = action | (column == last[:, None])
            else:
                logits = self._logits(step, s, memory)
                log_yes, log_no = F.logsigmoid(2 * logits), F.logsigmoid(-2 * logits)
                rollout.subsets.append((log_yes, log_no, on))
                if given is not None:
                    action = given[name].bool()
                else:
                    assert uniforms is not None
                    action = uniforms[:, used : used + size] < log_yes.exp()
                    used += size
                step_log_prob = torch.where(action, log_yes, log_no).sum(-1)
                step_entropy = -(log_yes.exp() * log_yes + log_no.exp() * log_no).sum(-1)
                chosen = action.to(logits.dtype)[..., None]
                following = (chosen * memory).sum(1) / (1 + chosen.sum(1))

            rollout.actions[name] = action
            if on is not None:
                step_log_prob, step_entropy = step_log_prob * on, step_entropy * on
            rollout.log_prob = rollout.log_prob + step_log_prob
            rollout.entropy = rollout.entropy + step_entropy
            inputs = _where(on, following, inputs)
        return rollout

    def _biases(self, start: Mapping[str, float]) -> list[nn.Parameter]:
        options = {step.head: step.decision.options for step in self.plan if step.head is not None}
        known = {str(option) for heads in options.values() for option in heads}
        for name in start:
            if name not in known:
                raise UserError(f"strategy.option_bias: {name!r} is no option of a decision. " + nearest(name, known))
        return [
            nn.Parameter(torch.tensor([start.get(str(option), 0.0) for option in options[head]], dtype=torch.float64))
            for head in range(len(self.heads))
        ]

    def _logits(self, step: _Step, s: Tensor, memory: Tensor) -> Tensor:
        """(n, K), before any prior."""
        scores = self._scores(step, s, memory)
        constant = self.tanh_constant if step.head is None else self.category_constant
        if self.temperature is not None:
            scores = scores / self.temperature
        return scores if constant is None else constant * torch.tanh(scores)

    def _scores(self, step: _Step, s: Tensor, memory: Tensor) -> Tensor:
        """(n, K): attention over `memory` (n, K, H), or the outputs of the step's head."""
        if step.head is not None:
            return F.linear(s, self.heads[step.head], None if self.biases is None else self.biases[step.head])
        return torch.tanh(memory @ self.W1.T + (s @ self.W2.T)[:, None]) @ self.v

    def _index(
        self,
        step: _Step,
        s: Tensor,
        memory: Tensor,
        uniform: Tensor | None,
        given: Tensor | None,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One of the options of a step, drawn by inverse CDF from `uniform` (n,) or `given` (n,).

        Args:
            allowed: (n, K) options that may be taken; None: all.

        Returns:
            Position (n,), its log-probability (n,), the entropy (n,) in nats, the next input (n, H).
        """
        size = memory.shape[1]
        logits = self._logits(step, s, memory)
        distance = None
        if step.head is None:
            distance = step.position - torch.tensor(step.decision.options, dtype=torch.float64)  # l - j
            if self.locality is not None:
                logits = logits - distance**2 / self.locality
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -1e30)  # finite: 0 log 0 is 0, with a gradient of 0
        log_p = F.log_softmax(logits, -1)
        p = log_p.exp()
        if given is not None:
            action = given
        else:
            assert uniform is not None
            # the last sum may round to less than 1: the clamp catches a uniform number above it
            last = size - 1 if allowed is None else torch.where(allowed, torch.arange(size), 0).amax(-1)
            action = torch.minimum((p.cumsum(-1) <= uniform[:, None]).sum(-1), torch.as_tensor(last))
        following = memory[torch.arange(len(s)), action]
        if distance is not None:
            following = following / (0.1 + distance[action])[:, None]
        return action, log_p.gather(-1, action[:, None])[:, 0], -(p * log_p).sum(-1), following

    def _active(self, decision: Decision, rollout: _Rollout) -> Tensor | None:
        """(n,) bool: true where `decision` is asked; None: in all rows. `Decisions.is_active` for a batch."""
        if decision.when is None:
            return None
        parent, values = decision.when
        actions = rollout.actions[parent]
        if self.decisions[parent].shape:  # its value is a list, never one of `values`
            return torch.zeros(len(actions), dtype=torch.bool)
        on = torch.tensor([option in values for option in self.decisions[parent].options])[actions]
        above = rollout.active[parent]
        return on if above is None else on & above


def _where(on: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the rows that are on (None: all), `old` elsewhere; (n, H)."""
    return new if on is None else torch.where(on[:, None], new, old)


def _n_uniforms(decision: Decision) -> int:
    """Uniform numbers that draw it."""
    return len(decision.options) if decision.picks is None else decision.picks


def _plan(decisions: Decisions) -> tuple[list[_Step], list[int]]:
    """The step of each decision, and the sizes of the linear heads."""
    asked = [decision for decision in decisions if decision.count() > 1]
    read: set[Any] = {(d.graph, node) for d in asked if d.reads_node for node in d.options}
    first: dict[tuple[str, int], Decision] = {}
    for decision in asked:
        if decision.node is not None and decision.reads_node:
            first.setdefault((decision.graph, decision.node), decision)
    # an index that only some rows choose would leave the others without an anchor
    own = {node for node, decision in first.items() if decision.when is None}
    missing = sorted(read - own)

    heads: dict[Any, int] = {}
    sizes: list[int] = []
    plan = []
    for decision in decisions:
        if decision.count() == 1:
            plan.append(_Step(decision, constant=True))
            continue
        position = -1 if decision.node is None else decision.node
        head = None
        if decision.reads_node:
            # a reader that belongs to no node (which one is the output?) stands behind all it reads
            position = max(position, 1 + max(int(option) for option in decision.options))
        else:
            key = (type(decision), decision.options) if decision.node is not None else decision.name
            head = heads.setdefault(key, len(heads))
            if head == len(sizes):
                sizes.append(len(decision.options))
        ready = tuple(node for graph, node in missing if graph == decision.graph and node <= position)
        missing = [key for key in missing if key[0] != decision.graph or key[1] not in ready]
        is_anchor = any(first[key] is decision for key in own & {(decision.graph, decision.node)})
        plan.append(_Step(decision, False, position, ready, is_anchor, head))
    return plan, sizes
