"""Perplexity of `torch.nn.LSTM` on Penn Treebank in a plain script: a check that lmnas' training code is sound.

Nothing here comes from lmnas: text split at blanks, nn.LSTM, nn.functional.dropout, SGD with clipping, fixed segments.
Compare with the `lstm` rows of the small recipes (docs/results.md).

    python benchmarks/plain_lstm.py PTB_FOLDER --width 68 --epochs 2 --seed 0
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


def read(folder: Path) -> tuple[dict[str, torch.Tensor], int]:
    """Token ids of the three splits and the size of the vocabulary."""
    words = {s: (folder / f"{s}.txt").read_text().replace("\n", " <eos> ").split() for s in ("train", "valid", "test")}
    index = {word: i for i, word in enumerate(dict.fromkeys(words["train"]))}
    return {split: torch.tensor([index[w] for w in text]) for split, text in words.items()}, len(index)


class Model(nn.Module):
    def __init__(self, vocabulary: int, width: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width)
        self.decoder = nn.Linear(width, vocabulary)
        self.decoder.weight = self.embedding.weight
        self.dropout = dropout
        nn.init.uniform_(self.embedding.weight, -0.04, 0.04)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens, state):
        x = F.dropout(self.embedding(tokens), self.dropout, self.training)
        h, state = self.lstm(x, state)
        return self.decoder(F.dropout(h, self.dropout, self.training)), state


def columns(tokens: torch.Tensor, batch_size: int) -> torch.Tensor:
    rows = len(tokens) // batch_size
    return tokens[: rows * batch_size].view(batch_size, rows).t().contiguous()


@torch.no_grad()
def perplexity(model: Model, tokens: torch.Tensor, bptt: int) -> float:
    model.eval()
    data, state, total = columns(tokens, 10), None, 0.0
    for start in range(0, len(data) - 1, bptt):
        end = min(start + bptt, len(data) - 1)
        logits, state = model(data[start:end], state)
        total += F.cross_entropy(logits.flatten(0, 1), data[start + 1 : end + 1].flatten(), reduction="sum").item()
    return math.exp(total / ((len(data) - 1) * 10))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=68)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    splits, vocabulary = read(options.folder)
    model = Model(vocabulary, options.width, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0, weight_decay=8e-7)
    data, bptt, began = columns(splits["train"], 20), 35, time.monotonic()
    for epoch in range(options.epochs):
        model.train()
        state = None
        for start in range(0, len(data) - 1, bptt):
            end = min(start + bptt, len(data) - 1)
            logits, state = model(data[start:end], state)
            state = tuple(s.detach() for s in state)
            loss = F.cross_entropy(logits.flatten(0, 1), data[start + 1 : end + 1].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()
        seconds = time.monotonic() - began
        print(f"epoch {epoch + 1}: valid {perplexity(model, splits['valid'], bptt):.2f}, {seconds:.0f} s", flush=True)
    n = sum(p.numel() for p in model.parameters())
    print(f"seed {options.seed}: test {perplexity(model, splits['test'], bptt):.2f}, {n:,} parameters")


if __name__ == "__main__":
    main()
