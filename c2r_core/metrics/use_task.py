"""Samples of concepts, and a model that is asked which concept a sample holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from c2r_core.data.forward import answer_log_probs, make_prompts
from c2r_core.data.precision import Precision
from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.errors import NotEvaluable
from c2r_core.metrics.letter_probes import letter_splits

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from c2r_core.metrics.inputs import Inputs

PER_LETTER = 60
TEMPLATE = "{subject} has the first letter:"


@dataclass(frozen=True, eq=False)
class UseTask:
    """Samples of concepts, and a model that answers which concept a sample holds."""

    names: tuple[str, ...]
    """The concepts."""
    samples: tuple[str, ...]
    """Each of the n as a reader knows it."""
    activations: Tensor
    """Raw, where the SAE reads, (n, d_in)."""
    concepts: Tensor
    """The one concept that each sample holds: int, (n,)."""
    for_picking: Tensor
    """The half on which latents are picked, bool, (n,); they are used on the other."""
    respond: Callable[[Tensor, Tensor | None], Tensor]
    """`respond(rows, replacements)`: the model's log-probabilities (len(rows), n_concepts + 1) of each
    concept's answer and of all other answers together, for samples `rows`, with their activations replaced by
    `replacements` (len(rows), d_in), or untouched where that is None.
    """
    kept_before: Tensor | None = None
    """`before`, where it is known already; no SAE changes it."""

    @cached_property
    def before(self) -> Tensor:
        """Answers to the untouched samples of the using half, (n, n_concepts + 1); else NaN."""
        if self.kept_before is not None:
            return self.kept_before
        using = (~self.for_picking).nonzero()[:, 0]
        answers = self.respond(using, None)
        before = torch.full((len(self.concepts), answers.shape[1]), torch.nan)
        before[using] = answers
        return before

    def is_right(self) -> Tensor:
        """Samples of the using half whose likeliest concept is the one that they hold."""
        return (self.before[:, :-1].argmax(1) == self.concepts) & ~self.for_picking

    def means(self, concept: int) -> tuple[Tensor, Tensor]:
        """Mean activation of the picking half's samples with and without the concept."""
        holds = self.concepts == concept
        with_it = self.activations[self.for_picking & holds].mean(0)
        return with_it, self.activations[self.for_picking & ~holds].mean(0)


def letters_to_use(inputs: Inputs) -> UseTask:
    """`letter_use_task` on the words that assignment consistency does not score.

    The model answers them untouched once for all SAEs. Errors are those of `letter_use_task`.
    """
    words = letter_splits(inputs)[0].task  # assignment consistency scores its test words
    task = letter_use_task(
        inputs.language_model, words, precision=inputs.precision, seed=inputs.seed
    )

    def build(folder: Path) -> None:
        save_file({"before": task.before}, folder / "before.safetensors")

    settings = {"words": inputs.lm.first_letter_words, "seed": inputs.seed}
    folder = inputs.kept("use_before", settings, build, code=[__name__])
    return replace(task, kept_before=load_file(folder / "before.safetensors")["before"])


def letter_use_task(
    model: TransformerBridge,
    task: FirstLetterTask,
    *,
    precision: Precision = "float32",
    per_letter: int = PER_LETTER,
    seed: int = 0,
) -> UseTask:
    """First letters: the model is asked to complete "{word} has the first letter:".

    The answer is a letter's token with a leading space, as in the examples of the prompt. Words are those
    that are not `task.is_test`, on which other metrics score the same SAE: a random half of them, drawn with
    the seed, is picked on, the other used. The model answers all words of the using half, which keeps
    `per_letter` of a letter at most, the most frequent. `precision` is that of the model's matrix products.

    Raises NotEvaluable if the tokenizer has no single token for a letter, or the words do not keep their
    tokens.
    """
    tokenizer = model.tokenizer
    ids = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in LETTERS]
    long = [letter for letter, tokens in zip(LETTERS, ids, strict=True) if len(tokens) != 1]
    if long:
        raise NotEvaluable(
            f"The letters {', '.join(long)} behind a space are several tokens each in this tokenizer, "
            "so there is no one answer to look for."
        )
    answers = [tokens[0] for tokens in ids]
    free = (~task.is_test).nonzero()[:, 0]
    words = [task.words[i] for i in free]
    prompts, kept = make_prompts(tokenizer, task.prefix, words, TEMPLATE)
    half = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))
    for_picking = (half < len(free) // 2)[kept]
    letter_of = task.letters[free[kept]]
    rank = torch.zeros(len(kept), dtype=torch.long)  # among the using half's words of the letter
    for letter in range(len(LETTERS)):
        rows = ((letter_of == letter) & ~for_picking).nonzero()[:, 0]
        rank[rows] = torch.arange(len(rows))
    wanted = (for_picking | (rank < per_letter)).nonzero()[:, 0]
    prompts = prompts.chosen(wanted)

    def respond(rows: Tensor, replacements: Tensor | None) -> Tensor:
        known = answer_log_probs(
            model,
            prompts.chosen(rows),
            task.hook_name,
            replacements,
            answers=answers,
            precision=precision,
        )
        rest = torch.log1p(-known.double().exp().sum(1).clamp(max=1 - 1e-9)).float()
        return torch.cat([known, rest[:, None]], dim=1)

    return UseTask(
        names=tuple(LETTERS),
        samples=tuple(words[kept[i]] for i in wanted),
        activations=task.activations[free[kept][wanted]],
        concepts=letter_of[wanted],
        for_picking=for_picking[wanted],
        respond=respond,
    )
