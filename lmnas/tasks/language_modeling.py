"""Language modelling: predict the next token of a text, with truncated BPTT and carried hidden state.

The model around a searched body is that of AWD-LSTM as ENAS and DARTS use it (Merity et al., 2018, arXiv 1708.02182;
Liu et al., 2019, appendix A.1.2): embedding with dropout of whole words -> locked dropout -> body -> locked dropout ->
tied linear layer with a bias; activation regularisation (AR) on the dropped and temporal AR (TAR) on the raw outputs.

Shapes: T time, B batch, H width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lmnas.core.contracts import (
    Batch,
    Body,
    Choice,
    Loss,
    Masks,
    Model,
    Objective,
    Score,
    SoftmaxModel,
    State,
    Stream,
    Task,
    UsualModel,
)
from lmnas.core.errors import UserError
from lmnas.core.files import write_json
from lmnas.core.nests import detach
from lmnas.core.seeds import rng
from lmnas.nn.kernels import linear_cross_entropy
from lmnas.nn.ops.dropout import draw_mask
from lmnas.tasks.data.corpora import Corpus, open_corpus

Rate = Annotated[float, Field(ge=0, lt=1)]
LONGEST_OVER_BASE = 20
"""Tokens by which a segment of random length may exceed its base."""

EVALUATION_TOKENS = 1024
"""Tokens of a segment in evaluation: no gradient runs through time there, and long segments are faster."""


@dataclass(kw_only=True)
class ModelSettings:
    """Sizes and regularisation of a language model."""

    width: Annotated[int, Field(ge=1)]
    """Number of units of the embedding and of the body (tied, so one number)."""
    init_range: Annotated[float, Field(gt=0)] = 0.04
    """Bound of the uniform distribution of the initial weights around zero."""
    dropout_embedding: Rate = 0.0
    """Probability that a word of the vocabulary is dropped from the embedding; 0: none."""
    dropout_input: Rate = 0.0
    """Rate of locked dropout on the embedded words; 0: none."""
    dropout_x: Rate = 0.0
    """Dropout rate on the input inside the body, one mask a segment; 0: none."""
    dropout_hidden: Rate = 0.0
    """Dropout rate on hidden states inside the body, one mask a segment; 0: none."""
    dropout_output: Rate = 0.0
    """Rate of locked dropout on the body's output; 0: none."""
    dropout_weight: Rate = 0.0
    """Rate of DropConnect on recurrent weights, for bodies that have it (AWD-LSTM); 0: none."""
    ar: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the mean square of the output after dropout, added to the loss; 0: none."""
    tar: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of the mean squared difference of successive outputs before dropout, added to the loss; 0: none."""
    decoder_bias: bool = True
    """Give the output layer a bias for each word (DARTS has one, ENAS none)."""


@dataclass(kw_only=True)
class BatchSettings:
    """Settings of the batches of a text."""

    batch_size: Annotated[int, Field(ge=1)]
    """Number of parallel streams of text in training."""
    bptt: Annotated[int, Field(ge=1)] = 35
    """Base length of a segment, in tokens."""
    length_std: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of random lengths around the base, in tokens; 0: constant. Lengths: 5 to base + 20."""
    short_probability: Rate = 0.0
    """Probability that the base length of a segment is halved; 0: never."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 10
    """Number of parallel streams in validation."""
    test_batch_size: Annotated[int, Field(ge=1)] = 1
    """Number of parallel streams in testing; 1 predicts every token but the first."""
    max_train_tokens: Annotated[int, Field(ge=1)] | None = None
    """Number of tokens at the beginning of the training split to train on, a low fidelity for search; null: all."""


class LanguageModel(SoftmaxModel):
    """A body between a tied embedding and softmax. Calling it gives the loss of one batch.

    The embedding is (V, H) and serves both ends.
    """

    def __init__(self, body: Body, vocabulary: int, settings: ModelSettings):
        super().__init__()
        self.settings = settings
        self.embedding = nn.Parameter(torch.empty(vocabulary, settings.width))
        if settings.decoder_bias:
            self.bias = nn.Parameter(torch.zeros(vocabulary))
        else:
            self.register_parameter("bias", None)
        self.body = body

    def initialise(self, generator: torch.Generator) -> None:
        """Embedding uniform in ±init_range, bias zero, body as it sees fit."""
        scale = self.settings.init_range
        nn.init.uniform_(self.embedding, -scale, scale, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.body.initialise(generator, scale)

    def draw_masks(self, batch: Batch, generator: torch.Generator, progress: float = 0.0) -> Masks:
        """One segment's dropout masks: `embedding` (V, 1), `input` and `output` (B, H), and the body's own."""
        s, like = self.settings, self.embedding
        batch_size = batch.inputs.shape[1]
        masks = dict[str, Tensor]()
        if s.dropout_embedding > 0:
            masks["embedding"] = draw_mask((like.shape[0], 1), s.dropout_embedding, generator, like)
        for name, rate in (("input", s.dropout_input), ("output", s.dropout_output)):
            if rate > 0:
                masks[name] = draw_mask((batch_size, s.width), rate, generator, like)
        rates = {"x": s.dropout_x, "hidden": s.dropout_hidden, "weight": s.dropout_weight}
        return masks | dict(self.body.draw_masks(batch_size, rates, generator))

    def forward(self, batch: Batch, masks: Masks, choice: Choice = None, penalised: bool = True) -> Loss:
        """Mean negative log-likelihood of a segment in nats, plus AR and TAR if `penalised`.

        Args:
            batch: inputs and targets of (T, B) token ids.
        """
        s = self.settings
        raw, state = self.body(self.embedded(batch, masks), self.state_before(batch), masks, choice)
        dropped = raw * masks["output"] if "output" in masks else raw
        loss = linear_cross_entropy(dropped.flatten(0, 1), self.embedding, self.bias, batch.targets.flatten())
        if penalised and s.ar > 0:
            loss = loss + s.ar * dropped.square().mean()
        if penalised and s.tar > 0 and len(raw) > 1:
            loss = loss + s.tar * (raw[1:] - raw[:-1]).square().mean()
        return Loss(loss, detach(state))

    def state_before(self, batch: Batch) -> State:
        """The body's state before the segment: the carried one, else its initial one."""
        return self.body.initial_state(batch.inputs.shape[1]) if batch.state is None else batch.state

    def features(self, batch: Batch, choice: Choice = None) -> Tensor:
        """(T B, H)."""
        return self.body(self.embedded(batch, {}), self.state_before(batch), {}, choice)[0].flatten(0, 1)

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        return self.embedding, self.bias

    def embedded(self, batch: Batch, masks: Masks) -> Tensor:
        """(T, B, H), the body's input."""
        embedded = F.embedding(batch.inputs, self.embedding)
        if "embedding" in masks:
            embedded = embedded * masks["embedding"][batch.inputs]
        if "input" in masks:
            embedded = embedded * masks["input"]
        return embedded


class Segments(Stream):
    """A text as B parallel streams, cut into segments along time; the training stream of `Task`.

    The B columns are contiguous parts of the text; what does not fill a row is left out. At the end of a pass the
    cursor and the carried state start anew. A segment at the end may be shorter; `scale` is its length over the
    base (DARTS scales by the drawn length even where the text ends sooner).
    """

    def __init__(self, tokens: Tensor, settings: BatchSettings, seed: int, purpose: str):
        rows = len(tokens) // settings.batch_size
        if rows < 2:
            raise UserError(
                f"batch_size {settings.batch_size}: split {purpose!r} has only {len(tokens)} tokens, "
                f"expected at least two per stream"
            )
        if settings.bptt >= rows:
            raise UserError(
                f"bptt {settings.bptt}: longer than the {rows - 1} predictions per stream that split {purpose!r} has "
                f"at batch_size {settings.batch_size}"
            )
        self.columns = tokens[: rows * settings.batch_size].view(settings.batch_size, rows)
        self.settings = settings
        self.seed = seed
        self.purpose = purpose
        self.position = 0
        self.drawn = 0
        self.epoch = 0
        self.carry: State = None

    @property
    def rows(self) -> int:
        return self.columns.shape[1]

    @property
    def steps_per_epoch(self) -> int:
        s = self.settings
        return max(1, round((self.rows - 1) / (s.bptt * (1 - s.short_probability / 2))))

    def _length(self) -> int:
        """The length to draw next; fresh for every index, so a cursor is all the state there is."""
        s = self.settings
        draws = rng(self.seed, "bptt", self.purpose, self.drawn)
        base = s.bptt / 2 if draws.random() < s.short_probability else s.bptt
        if s.length_std == 0:
            return max(1, int(base))
        return min(max(5, int(draws.gauss(base, s.length_std))), s.bptt + LONGEST_OVER_BASE)

    def next(self) -> Batch:
        if self.position == 0:
            self.carry = None
        length = min(self._length(), self.rows - 1 - self.position)
        window = self.columns[:, self.position : self.position + length + 1].t().long()
        self.position += length
        self.drawn += 1
        if self.position >= self.rows - 1:
            self.position = 0
            self.epoch += 1
        scale = length / self.settings.bptt
        return replace(segment(window), scale=scale, state=self.carry)

    def keep(self, state: State) -> None:
        self.carry = state

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "drawn": self.drawn, "epoch": self.epoch, "carry": self.carry}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.drawn, self.epoch = state["position"], state["drawn"], state["epoch"]
        self.carry = state["carry"]


def segment(window: Tensor) -> Batch:
    """Every token of a window (T + 1, B) but the last predicts the next one."""
    inputs, targets = window[:-1].contiguous(), window[1:].contiguous()
    return Batch(inputs, targets, targets.numel())


class LanguageModeling(Task):
    """The task: a corpus, the model above, perplexity per token (bits per character at character level)."""

    name = "language-modeling"
    takes = frozenset({"sequence", "causal"})
    kernels = frozenset({"fused"})
    model_settings = ModelSettings
    batch_settings = BatchSettings

    def __init__(
        self,
        *,
        data: str = "pydoc",
        level: Literal["word", "char"] = "word",
        tokenizer: Literal["whitespace", "words"] | None = None,
        min_count: Annotated[int, Field(ge=1)] | None = None,
        max_vocabulary: Annotated[int, Field(ge=4)] | None = None,
    ):
        """
        Args:
            data: `pydoc` (embedded), `ptb`, `wikitext-2`, `wikitext-103`, or the path of a text file or a folder with
                train, valid and test files.
            level: tokens are words or characters.
            tokenizer: `whitespace` for text that is tokenised already, `words` for raw text; default by corpus.
            min_count: words rarer than this in the training split become <unk>; default by corpus.
            max_vocabulary: largest number of words kept, the most frequent ones.
        """
        self.corpus: Corpus = open_corpus(
            data,
            level=level,
            tokenizer=tokenizer,
            min_count=min_count,
            max_vocabulary=max_vocabulary,
        )
        self.level = level
        if level == "word":
            self.objective = Objective("perplexity", "per word", "minimize")
        else:
            self.objective = Objective("bits", "per character", "minimize")

    @classmethod
    def usual_model(cls, genotype: str, given: Mapping[str, Any]) -> UsualModel:
        usual = UsualModel(**given)
        words, bias = usual.vocabulary or 0, bool(usual.decoder_bias)
        settings = ModelSettings(width=usual.width, decoder_bias=bias)
        return replace(
            usual,
            build=lambda body: LanguageModel(body, words, settings),
            words=f"{{model:,}} as a language model of width {usual.width} and {words:,} words "
            f"({'with' if bias else 'without'} an output bias), {{body:,}} in the cell",
        )

    def data(self) -> dict[str, Any]:
        return self.corpus.info()

    @property
    def vocabulary(self) -> list[str]:
        return self.corpus.vocabulary

    def model(self, body: Body, settings: ModelSettings) -> LanguageModel:
        return LanguageModel(body, len(self.corpus.vocabulary), settings)

    def stream(self, split: str, settings: BatchSettings, seed: int) -> Segments:
        tokens = self.corpus.splits[split]
        if split == "train":
            tokens = tokens[: settings.max_train_tokens]
        return Segments(tokens, settings, seed, split)

    def largest_batch(self, settings: BatchSettings) -> Batch:
        """The longest segment that `Segments` draws, of zeros, from which memory is forecast."""
        length = settings.bptt + (LONGEST_OVER_BASE if settings.length_std > 0 else 0)
        tokens = torch.zeros(length, settings.batch_size, dtype=torch.long)
        return Batch(tokens, tokens, tokens.numel())

    def value(self, nats: float) -> float:
        """The metric of a mean negative log-likelihood."""
        if self.level == "char":
            return nats / math.log(2)
        return math.exp(nats) if nats < 700 else math.inf

    @torch.no_grad()
    def score_batch(self, model: Model, batch: Batch, choice: Choice = None) -> Score:
        """The metric on one batch from zero state without dropout: a reward."""
        loss, _ = model(replace(batch, state=None), {}, choice, penalised=False)
        return Score(self.value(loss.item()), "valid", batch.n_targets)

    @torch.no_grad()
    def evaluate(
        self,
        model: Model,
        split: str,
        settings: BatchSettings,
        choice: Choice = None,
        tick: Callable[[float], None] | None = None,
        max_segments: int | None = None,
    ) -> Score:
        """The metric over a whole split, state carried, divided by the number of predictions made.

        Args:
            tick: called with the fraction done.
            max_segments: number of segments after which to stop (cheap proxies).
        """
        batch_size = settings.test_batch_size if split == "test" else settings.eval_batch_size
        device = next(model.parameters()).device
        columns = self._columns(self.corpus.splits[split], batch_size)
        total, count, state = torch.zeros((), dtype=torch.float64, device=device), 0, None
        length = max(settings.bptt, EVALUATION_TOKENS // batch_size) if max_segments is None else settings.bptt
        for number, batch in enumerate(self._segments(columns, length)):
            if max_segments is not None and number >= max_segments:
                break
            batch = replace(batch.to(device), state=state)
            loss, state = model(batch, {}, choice, penalised=False)
            total += loss.double() * batch.n_targets
            count += batch.n_targets
            if tick:
                tick(count / (columns.numel() - batch_size))
        return Score(self.value(total.item() / count), split, count)

    @torch.no_grad()
    def score_text(self, model: Model, text: str) -> Score:
        """The metric on new text, the first token given.

        Raises:
            UserError: fewer than two tokens.
        """
        tokens = self.corpus.encode(text).long()
        if len(tokens) < 2:
            raise UserError(f"text to score: expected at least two tokens, got {len(tokens)}")
        batch = segment(tokens.to(next(model.parameters()).device)[:, None])
        loss, _ = model(batch, {}, penalised=False)
        return Score(self.value(loss.item()), "given", len(tokens) - 1)

    @staticmethod
    def _columns(tokens: Tensor, batch_size: int) -> Tensor:
        # a split too short for that number of streams is read in fewer
        batch_size = min(batch_size, len(tokens) // 2)
        rows = len(tokens) // batch_size
        return tokens[: rows * batch_size].view(batch_size, rows)

    @staticmethod
    def _segments(columns: Tensor, bptt: int) -> Iterator[Batch]:
        rows = columns.shape[1]
        for start in range(0, rows - 1, bptt):
            window = columns[:, start : min(start + bptt, rows - 1) + 1].t().long()
            yield segment(window)

    def save_assets(self, directory: Path) -> None:
        """Write the files that the trained model needs besides its weights: the vocabulary in the order of the ids."""
        write_json(directory / "vocabulary.json", self.corpus.vocabulary)
