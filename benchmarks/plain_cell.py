"""Our recurrent cell against the formulation of the papers' published codes, in one run.

Plain: every time step by itself, x and h concatenated, every operation of a mixture evaluated, multiplied by its weight
and added by itself, batch norm as a layer, log-softmax over all words and its negative log-likelihood, default matrix
products. A node's predecessors go through one product, as in the DARTS search code; `--per-edge` takes one product for
each, as ENAS' codes do. Both sides share weights, data and masks, and both take the same optimiser step.

    python benchmarks/plain_cell.py --rows search-weight,retrain --rounds 5 --threads 1

Ratios of CPU time (1 thread) or wall time, medians and extremes over interleaved rounds. `check` compares the losses.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lmnas.genotype import Genotype, load_genotype
from lmnas.jobs import covering_space
from lmnas.kernels import gemm, kernel_in_use, set_kernel
from lmnas.protocols import Batch, LearnStep
from lmnas.seeds import generator, rng
from lmnas.spaces.recurrent_cell import RecurrentCell
from lmnas.strategies.gradient import architecture_gradient
from lmnas.tasks.language_modeling import LanguageModel, ModelSettings

FUNCTIONS = (torch.tanh, torch.relu, torch.sigmoid, lambda a: a)
VOCABULARY, BPTT = 10_000, 35
DROPOUT = {"dropout_output": 0.75, "dropout_x": 0.75, "dropout_hidden": 0.25, "dropout_input": 0.2}


def gate(state: Tensor, pre: Tensor, op: int) -> Tensor:
    c, a = pre.chunk(2, dim=-1)
    return state + c.sigmoid() * (FUNCTIONS[op](a) - state)


def norm(states: Tensor) -> Tensor:
    return F.batch_norm(states, None, None, training=True)


def masked(states: Tensor, mask: Tensor | None) -> Tensor:
    return states if mask is None else states * mask


def plain_path(inputs, h, w_input, w_nodes, program, mask_x, mask_h, batch_norm):
    hs = []
    for x in inputs:
        s = gate(h, torch.cat([masked(x, mask_x), masked(h, mask_h)], dim=-1) @ w_input, program.ops[0])
        states = [norm(s) if batch_norm == "nodes" else s]
        for op, source, weight in zip(program.ops[1:], program.inputs, w_nodes, strict=True):
            s = gate(states[source], masked(states[source], mask_h) @ weight, op)
            states.append(norm(s) if batch_norm == "nodes" else s)
        h = torch.stack([states[i] for i in program.outputs], -1).mean(-1)
        if batch_norm == "output":
            h = norm(h)
        hs.append(h)
    return torch.stack(hs)


def plain_mixture(inputs, h, w_input, w_nodes, p_edges, mask_x, mask_h, per_edge):
    """DARTS' search cell: node 0 tanh, node-shared weights, mean of nodes 1..N."""
    hs = []
    for x in inputs:
        s = norm(gate(h, torch.cat([masked(x, mask_x), masked(h, mask_h)], dim=-1) @ w_input, 0))
        states, row = s[None], 0
        for weight in w_nodes:
            n, batch, width = states.shape
            if per_edge:
                pre = torch.stack([masked(state, mask_h) @ weight for state in states])
            else:
                pre = (masked(states, mask_h).view(-1, width) @ weight).view(n, batch, -1)
            c, a = pre.chunk(2, dim=-1)
            c = c.sigmoid()
            s = torch.zeros_like(states[0])
            for k, function in enumerate(FUNCTIONS):
                s = s + (p_edges[row : row + n, k, None, None] * (states + c * (function(a) - states))).sum(0)
            states = torch.cat([states, norm(s)[None]])
            row += n
        h = states[1:].mean(0)
        hs.append(h)
    return torch.stack(hs)


class Plain(torch.nn.Module):
    """The same parameters as a LanguageModel, run the plain way."""

    def __init__(self, model: LanguageModel, per_edge: bool):
        super().__init__()
        self.model, self.per_edge = model, per_edge

    def forward(self, batch, carry, masks, choice=None, penalised=True):
        model, body = self.model, self.model.body
        embedded = F.embedding(batch.inputs, model.embedding)
        if "embedding" in masks:
            embedded = embedded * masks["embedding"][batch.inputs]
        if "input" in masks:
            embedded = embedded * masks["input"]
        mask_x, mask_h = masks.get("x"), masks.get("hidden")
        if isinstance(choice, dict):
            p_edges = choice["nodes"][:, 1:]  # column 0 is `none`
            raw = plain_mixture(
                embedded, carry, body.w_input, list(body.w_nodes), p_edges, mask_x, mask_h, self.per_edge
            )
        else:
            program, weights, batch_norm = self._path(choice)
            raw = plain_path(embedded, carry, body.w_input, weights, program, mask_x, mask_h, batch_norm)
        dropped = raw * masks["output"] if "output" in masks else raw
        logits = F.linear(dropped.flatten(0, 1), model.embedding, model.bias)
        loss = F.nll_loss(F.log_softmax(logits, dim=-1), batch.targets.flatten())
        if penalised and model.settings.tar > 0:
            loss = loss + model.settings.tar * (raw[1:] - raw[:-1]).square().mean()
        return loss, raw[-1].detach()

    def _path(self, choice):
        body = self.model.body
        if choice is None:
            return body.program, list(body.w_nodes), body.batch_norm
        program = body.space.program(choice)
        return program, [body.w_nodes[row] for row in body._path_rows(program)], body.space.batch_norm


class Setting:
    """One model and its plain twin, one batch of random tokens, one draw of dropout masks."""

    def __init__(self, body, width: int, batch_size: int, per_edge: bool, **settings):
        noise = generator(0, "benchmark")
        self.model = LanguageModel(body, VOCABULARY, ModelSettings(width=width, **settings))
        self.model.initialise(noise)
        self.plain = Plain(self.model, per_edge)
        self.batches = []
        for _ in range(2):
            tokens = torch.randint(VOCABULARY, (BPTT + 1, batch_size), generator=noise)
            self.batches.append(Batch(tokens[:-1], tokens[1:]))
        self.masks = self.model.draw_masks(self.batches[0], noise)
        self.carry = body.initial_state(batch_size)
        self.tokens = BPTT * batch_size
        # a rate of zero: every round does the same work
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, weight_decay=5e-7)

    def weight_step(self, forward: Callable, choice=None) -> float:
        loss, _ = forward(self.batches[0], self.carry, self.masks, choice)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.25, foreach=True)
        self.optimizer.step()
        return loss.item()

    def evaluate(self, forward: Callable) -> float:
        with torch.no_grad():
            return forward(self.batches[0], self.carry, {}, None, False)[0].item()


def search(order: int) -> Callable:
    def make(per_edge: bool):
        space = RecurrentCell()
        setting = Setting(space.supernet(300), 300, 256, per_edge, tar=1e-3, **DROPOUT)
        alphas = {"nodes": (1e-3 * torch.randn(36, 5, generator=generator(0, "alpha"))).requires_grad_()}
        names = {"": setting.model, "model.": setting.plain}

        def relax(alphas):
            return {"nodes": alphas["nodes"].softmax(-1)}

        def step(forward) -> float:
            prefix = "" if forward is setting.model else "model."

            def loss(number):
                def run(weights, mixture):
                    named = {prefix + name: weight for name, weight in weights.items()}
                    arguments = (setting.batches[number], setting.carry, setting.masks, mixture, False)
                    return torch.func.functional_call(names[prefix], named, arguments)[0]

                return run

            if order == 1 and forward is setting.plain:
                loss(1)(dict(setting.model.named_parameters()), relax(alphas)).backward()  # as published: all gradients
            elif order > 0:
                learn = LearnStep(0, loss(0), loss(1), dict(setting.model.named_parameters()), 20.0, 5e-7, 0.25)
                architecture_gradient(learn, alphas, relax, order)
            with torch.no_grad():
                fixed = relax(alphas)
            return setting.weight_step(forward, fixed)

        return setting, step

    return make


def retrain(per_edge: bool):
    genotype = load_genotype("darts-v2")
    setting = Setting(covering_space(genotype).build(genotype, 850), 850, 64, per_edge, tar=1e-3, **DROPOUT)
    return setting, setting.weight_step


def evaluate(batch_size: int) -> Callable:
    def make(per_edge: bool):
        genotype = load_genotype("darts-v2")
        setting = Setting(covering_space(genotype).build(genotype, 850), 850, batch_size, per_edge)
        return setting, setting.evaluate

    return make


def enas_shared(per_edge: bool):
    space = RecurrentCell(
        n_nodes=11, input_activation="searched", output="loose-ends", sharing="edge", batch_norm="output", none=False
    )
    setting = Setting(space.supernet(1000), 1000, 64, per_edge, decoder_bias=False, **DROPOUT)
    genotypes = [space.sample(rng(0, "paths", i)) for i in range(4)]
    count = {setting.model: 0, setting.plain: 0}

    def step(forward) -> float:
        genotype: Genotype = genotypes[count[forward] % 4]
        count[forward] += 1
        return setting.weight_step(forward, genotype)

    return setting, step


ROWS: dict[str, Callable] = {
    "search-weight": search(0),
    "search-first-order": search(1),
    "search-second-order": search(2),
    "retrain": retrain,
    "evaluate-1": evaluate(1),
    "evaluate-10": evaluate(10),
    "evaluate-64": evaluate(64),
    "enas-shared": enas_shared,
}


def measure(name: str, rounds: int, per_edge: bool, clock: Callable[[], float]) -> str:
    setting, step = ROWS[name](per_edge)

    def seconds(forward) -> tuple[float, float]:
        began = clock()
        loss = step(forward)
        return clock() - began, loss

    seconds(setting.model), seconds(setting.plain)
    ours, plain, losses = [], [], []
    for _ in range(rounds):
        a, loss_a = seconds(setting.model)
        b, loss_b = seconds(setting.plain)
        ours.append(a), plain.append(b), losses.append(abs(loss_a - loss_b))
    ratios = [b / a for a, b in zip(ours, plain, strict=True)]
    return (
        f"{name:20s} ours {setting.tokens / statistics.median(ours):8.0f} tokens/s   "
        f"plain {setting.tokens / statistics.median(plain):8.0f}   "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})   "
        f"losses differ by {max(losses):.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernel", default="fused")
    parser.add_argument("--per-edge", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    set_kernel(options.kernel)
    print(f"kernel {kernel_in_use()}, products {gemm.route()}, {options.threads} threads")
    for name in options.rows.split(","):
        clock = time.process_time if options.threads == 1 else time.perf_counter
        print(measure(name, options.rounds, options.per_edge, clock), flush=True)


if __name__ == "__main__":
    main()
