"""Words for the first-letter metric, and a model's activations at them.

All words share one few-shot prompt (SAEBench draws 10 examples anew for each word):

    cat has the first letter: C
    ...
    WORD has the first letter:

Attention is causal, so the text behind the word cannot change its activation and is not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from c2r_core.artefacts.records import Record
from c2r_core.data.forward import Precision, activations_at, make_prompts
from c2r_core.errors import NotEvaluable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

    from c2r_core.data.text import Corpus

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DEFAULT_SHOTS = ("cat", "mother", "river", "sun")


class LetterWords(NamedTuple):
    """Words that are one token each, and which of them are kept for testing."""

    words: tuple[str, ...]
    """With the leading space, if the token has one."""
    token_ids: Tensor
    """Int, (n_words,)."""
    is_test: Tensor
    """Bool, (n_words,)."""


def letter_words(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus | None = None,
    *,
    limit: int | None = None,
    test_share: float = 0.2,
    seed: int = 0,
) -> LetterWords:
    """Tokens that are words: ASCII letters with an optional leading space.

    With a corpus, only tokens that occur in it, the most frequent first (ties: the lower token id); without
    it, the whole vocabulary in a random order. `limit` keeps the first of that order. `test_share` is the
    share of the words, drawn at random, on which probes and SAEs are scored. ValueError if one of these two
    is out of range, NotEvaluable if no word remains.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected a positive number, or None for all words.")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}; expected a share between 0 and 1.")
    generator = torch.Generator().manual_seed(seed)
    words = _alphabetic_tokens(tokenizer)
    if corpus is None:
        ids = list(words)
        ids = [ids[i] for i in torch.randperm(len(ids), generator=generator)]
    else:
        counts: Counter[int] = Counter()
        for text in (document.text for document in corpus.documents):
            counts.update(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        ids = sorted((i for i in words if counts[i]), key=lambda i: (-counts[i], i))
    ids = ids[:limit]
    if not ids:
        source = "the tokenizer's vocabulary" if corpus is None else f"corpus {corpus.name!r}"
        raise NotEvaluable(
            f"No token of {source} consists of ASCII letters. The first-letter task needs whole "
            "words as tokens, in the Latin alphabet."
        )
    is_test = torch.zeros(len(ids), dtype=torch.bool)
    n_test = round(test_share * len(ids))
    is_test[torch.randperm(len(ids), generator=generator)[:n_test]] = True
    return LetterWords(tuple(words[i] for i in ids), torch.tensor(ids), is_test)


@dataclass(frozen=True, eq=False)
class FirstLetterTask(Record):
    """Words, their first letters, and the model's activations at their tokens."""

    FILES: ClassVar[str] = "task"

    words: tuple[str, ...]
    activations: Tensor
    """Float32, (n_words, d_in); raw, as the model computes them."""
    letters: Tensor
    """Int, (n_words,): 0 for A to 25 for Z."""
    is_test: Tensor
    """Bool, (n_words,)."""
    hook_name: str
    prefix: str
    """The text in front of each word."""
    n_dropped: int
    """Words left out, because they are not one token behind the prefix or are examples in it."""


def harvest_words(
    model: TransformerBridge,
    words: LetterWords,
    hook_name: str,
    *,
    shots: Sequence[str] = DEFAULT_SHOTS,
    batch_size: int = 256,
    key_value_cache: bool = True,
    precision: Precision = "float32",
) -> FirstLetterTask:
    """Activations at each word's token, in the prompts shown above.

    The word is located by tokenising the whole prompt. The prompt starts with the tokenizer's BOS token,
    if it has one. ValueError if `activations_at` refuses the hook or the precision, NotEvaluable if no
    word is a single token behind the prefix.

    `shots` are the example words of the prefix, the same for all words; there may be none. A batch is so many
    words. With `key_value_cache` the prefix is run only once, which is much faster; False is for models
    without such a cache. `precision` is that of `forward.activations`.
    """
    prefix = "".join(f"{shot} has the first letter: {shot[0].upper()}\n" for shot in shots)
    examples = {shot.lower() for shot in shots}
    prompts, found = make_prompts(
        model.tokenizer, prefix, words.words, "{subject} has the first letter:"
    )
    is_one_token = (prompts.position == 0) & (prompts.tails[:, 0] == words.token_ids[found])
    is_example = torch.tensor([words.words[i].strip().lower() in examples for i in found])
    chosen = is_one_token & ~is_example
    kept = torch.tensor(found)[chosen]
    if len(kept) == 0:
        raise NotEvaluable(
            f"None of the {len(words.words)} words (the first is {words.words[0]!r}) is a single "
            f"token behind {prefix[-30:]!r} in this tokenizer. Try other shots."
        )
    prompts = prompts.chosen(chosen)
    kept_words = tuple(words.words[i] for i in kept)
    return FirstLetterTask(
        words=kept_words,
        activations=activations_at(
            model,
            prompts if key_value_cache else prompts.without_prefix(),
            hook_name,
            batch_size=batch_size,
            precision=precision,
        ),
        letters=torch.tensor([LETTERS.index(word.strip()[0].upper()) for word in kept_words]),
        is_test=words.is_test[kept],
        hook_name=hook_name,
        prefix=prefix,
        n_dropped=len(words.words) - len(kept),
    )


def _alphabetic_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    special = set(tokenizer.all_special_ids)
    words = {}
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        # Byte-level vocabularies write a leading space as Ġ, SentencePiece as ▁ (and drops it when
        # decoding); ASCII letters stand for themselves in both.
        text = token.replace("Ġ", " ").replace("▁", " ")
        word = text.removeprefix(" ")
        if word.isascii() and word.isalpha() and i not in special:
            words[i] = text
    return words
