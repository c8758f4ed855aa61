"""First-letter splitting and absorption: does "starts with S" live in one latent, or is it scattered?

A word's first letter is a feature with perfect labels that a language model uses. Linear probes find
its direction in the model's activations; the SAE's best latents for it are compared with the probe word
by word. A word is *absorbed* when the probe sees the letter, the letter's latents do not fire,
and another latent that points the letter's way carries it instead.

    words = letter_words(model.tokenizer, corpus, limit=9000)
    task = harvest_words(model, words, "blocks.4.hook_resid_post")     # once per model and hook
    probes = train_letter_probes(task)                                 # once per task
    report = evaluate_first_letter(sae, task, probes)                  # for each SAE

Method: "A is for Absorption" (arXiv 2409.14507), with the steps and constants of SAEBench 0.6.0.
Where this file differs:

- All words share one fixed few-shot prefix (SAEBench draws 10 examples anew for each word), so that the
  prefix runs once and its keys and values are reused.
- Decoder rows may have any norm: f ‖w‖ and w / ‖w‖ stand for f and w everywhere, so scores do not change
  when a latent's scale moves between its activation and its decoder row.
- Probes start at zero, so a latent that never fires keeps a weight of exactly zero, and only latents of
  positive weight can be a letter's own.
- A letter that cannot be measured stays in the report, with the reason.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.language_models import Precision, check_hook_name, run_to_hook

if TYPE_CHECKING:
    from scipy.sparse import csr_array
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

    from c2r_core.data.text import Corpus

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DEFAULT_SHOTS = ("cat", "mother", "river", "sun")

# Constants of SAEBench 0.6.0.
GOOD_PROBE_F1 = 0.6
MAX_SPLIT_SIZE = 10
SPLIT_F1_GAIN = 0.03
ABSORBER_MIN_COSINE = 0.1
MAX_ABSORBERS = 3
MIN_EXPLAINED_SHARE = 0.4
FULL_ABSORBER_MIN_COSINE = 0.025
PROBE_EPOCHS = 50

# Ours: below this a letter's probe or its score says nothing.
MIN_TRAIN_WORDS = 20
MIN_TEST_WORDS = 5

_FORMAT_VERSION = 1


class AnySAE(Protocol):
    """What is asked of an SAE: raw activations in, decoder rows [d_sae, d_in]."""

    W_dec: Tensor

    def encode(self, x: Tensor) -> Tensor: ...


# -- words and their activations ----------------------------------------------------------------


class LetterWords(NamedTuple):
    """Words of one token each, and which of them are kept for testing.

    Attributes
    ----------
    words : tuple of str
        As their tokens decode, with the leading space if there is one.
    token_ids : Tensor of int, shape (n_words,)
    is_test : Tensor of bool, shape (n_words,)
    """

    words: tuple[str, ...]
    token_ids: Tensor
    is_test: Tensor


def letter_words(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus | None = None,
    *,
    limit: int | None = None,
    test_share: float = 0.2,
    seed: int = 0,
) -> LetterWords:
    """Tokens that are words: ASCII letters with an optional leading space.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    corpus : Corpus, optional
        Keep only tokens that occur in it, the most frequent first (ties: the lower token id). Without
        it the whole vocabulary is used, in a seeded random order.
    limit : int, optional
        Keep at most so many: the first ones of that order.
    test_share : float in (0, 1)
        Share of words, drawn at random, that probes are tested and absorption is measured on.
    seed : int
        Of the order without a corpus and of the split.

    Raises
    ------
    ValueError
        If no word remains, or if `limit` or `test_share` is out of range.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected a positive number of words, or None for all.")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}; expected a share between 0 and 1.")
    generator = torch.Generator().manual_seed(seed)
    words = _alphabetic_tokens(tokenizer)
    if corpus is not None:
        counts = _token_counts(tokenizer, corpus)
        ids = sorted((i for i in words if counts[i]), key=lambda i: (-counts[i], i))
    else:
        ids = [list(words)[i] for i in torch.randperm(len(words), generator=generator)]
    ids = ids[:limit]
    if not ids:
        source = f"corpus {corpus.name!r}" if corpus else "the tokenizer's vocabulary"
        raise ValueError(
            f"No token of {source} consists of ASCII letters only; the first-letter task needs a "
            "tokenizer with whole-word tokens and a text in the Latin alphabet."
        )
    is_test = torch.zeros(len(ids), dtype=torch.bool)
    is_test[torch.randperm(len(ids), generator=generator)[: round(test_share * len(ids))]] = True
    return LetterWords(tuple(words[i] for i in ids), torch.tensor(ids), is_test)


@dataclass(frozen=True, eq=False)
class FirstLetterTask:
    """Words, their first letters, and the model's activations at their tokens.

    Attributes
    ----------
    words : tuple of str
    activations : Tensor of float32, shape (n_words, d_in)
        Raw: as the model computes them.
    letters : Tensor of int, shape (n_words,)
        0 for A to 25 for Z.
    is_test : Tensor of bool, shape (n_words,)
    hook_name : str
    prefix : str
        The text before each word.
    n_dropped : int
        Words left out because the tokenizer splits or merges them in the template, or because they
        are among the examples of the prefix.
    """

    words: tuple[str, ...]
    activations: Tensor
    letters: Tensor
    is_test: Tensor
    hook_name: str
    prefix: str
    n_dropped: int

    def save(self, folder: Path | str) -> None:
        """Write `task.safetensors` and `task.json` into a folder, made if needed."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "activations": self.activations,
            "letters": self.letters,
            "is_test": self.is_test,
        }
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "task.safetensors")
        description = {
            "format_version": _FORMAT_VERSION,
            "hook_name": self.hook_name,
            "prefix": self.prefix,
            "n_dropped": self.n_dropped,
            "words": self.words,
        }
        (folder / "task.json").write_text(json.dumps(description, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> FirstLetterTask:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError
            If the folder holds no task.
        ValueError
            If the two files do not belong together or are of another format.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in ("task.json", "task.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}; expected a folder written by FirstLetterTask.save."
                )
        description = json.loads((folder / "task.json").read_text(encoding="utf-8"))
        version = description.pop("format_version", None)
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"{folder} holds a first-letter task of format {version}; this code reads format "
                f"{_FORMAT_VERSION}. Harvest the words again."
            )
        tensors = load_file(folder / "task.safetensors")
        words = tuple(description.pop("words"))
        if len(words) != len(tensors["activations"]):
            raise ValueError(
                f"{folder}: task.json lists {len(words)} words, task.safetensors holds "
                f"{len(tensors['activations'])} activations. Harvest the words again."
            )
        return cls(words=words, **tensors, **description)


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
    """Activations at each word's token in the prompt "cat has the first letter: C\\n... {word}".

    The full template goes on with " has the first letter:"; attention is causal, so nothing behind
    the word's token can change its activation and none of it is run. A beginning-of-text token is put
    first if the tokenizer does so by itself.

    Parameters
    ----------
    model : TransformerBridge
    words : LetterWords
        From `letter_words`.
    hook_name : str
        Such as `blocks.4.hook_resid_post`.
    shots : sequence of str
        Example words of the prefix, the same for all words; empty for none.
    batch_size : int
        Words per forward pass.
    key_value_cache : bool
        Run the prefix once and only the word's token after it, an order of magnitude faster. Set it to
        False for models without attention caches.
    precision : "float32" or "bfloat16"
        As in `run_to_hook`.

    Raises
    ------
    ValueError
        If the hook does not exist, or if no word is a single token in the template.
    """
    check_hook_name(model, hook_name)
    prefix = "".join(f"{shot} has the first letter: {shot[0].upper()}\n" for shot in shots)
    prefix_ids, kept = _place_words(model.tokenizer, words, prefix, shots)
    if not kept:
        raise ValueError(
            f"None of {len(words.words)} words, such as {words.words[0]!r}, is a single token "
            f"after {prefix[-30:]!r} under this tokenizer. Try other `shots`."
        )
    kept = torch.tensor(kept)
    prefix_tokens = torch.tensor(prefix_ids)
    batches = words.token_ids[kept].split(batch_size)
    if key_value_cache and prefix_ids:
        activations = _read_with_cache(model, prefix_tokens, batches, hook_name, precision)
    else:
        activations = (
            run_to_hook(model, _behind(prefix_tokens, ids), hook_name, precision)[:, -1]
            for ids in batches
        )
    kept_words = tuple(words.words[i] for i in kept)
    return FirstLetterTask(
        words=kept_words,
        activations=torch.cat([batch.float().cpu() for batch in activations]),
        letters=torch.tensor([LETTERS.index(word.strip()[0].upper()) for word in kept_words]),
        is_test=words.is_test[kept],
        hook_name=hook_name,
        prefix=prefix,
        n_dropped=len(words.words) - len(kept),
    )


# -- step 1: ground-truth probes ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LetterProbes:
    """One linear probe a letter; positive scores mean "starts with it".

    Attributes
    ----------
    weights : Tensor, shape (26, d_in)
    biases : Tensor, shape (26,)
        Zero, like the weights, for letters without a probe.
    f1 : tuple of float or None
        On the test words; None for letters without a probe.
    not_evaluable : tuple of str or None
        Why a letter cannot be evaluated; None if it can.
    """

    weights: Tensor
    biases: Tensor
    f1: tuple[float | None, ...]
    not_evaluable: tuple[str | None, ...]


def train_letter_probes(task: FirstLetterTask, *, seed: int = 0) -> LetterProbes:
    """26 one-vs-rest logistic probes on raw activations, trained as one matrix.

    SAEBench's recipe: binary cross-entropy with positives weighted by (negatives / positives), Adam
    with weight decay 1e-4, learning rate 1e-2 falling to 1e-5 exponentially over 50 epochs of batches of
    4096. Do not rescale the activations: the learning rate fits raw ones.

    A letter is evaluable with at least 20 training words, 5 test words and a test F1 above 0.6.
    """
    is_letter = _one_hot(task.letters)
    x = task.activations.cpu().numpy()
    train, test = (~task.is_test).numpy(), task.is_test.numpy()
    weights, biases = _fit_probes(x[train], is_letter[train], weight_decay=1e-4, l1=0.0, seed=seed)
    scores = x[test] @ weights + biases

    f1, reasons = [], []
    for i, letter in enumerate(LETTERS):
        n_train, n_test = int(is_letter[train, i].sum()), int(is_letter[test, i].sum())
        if n_train < MIN_TRAIN_WORDS or n_test < MIN_TEST_WORDS:
            weights[:, i], biases[i] = 0, 0
            f1.append(None)
            reasons.append(
                f"{n_train} training and {n_test} test words begin with {letter}; "
                f"at least {MIN_TRAIN_WORDS} and {MIN_TEST_WORDS} are needed"
            )
            continue
        f1.append(_f1(scores[:, i] > 0, is_letter[test, i]))
        poor = f1[-1] <= GOOD_PROBE_F1
        reasons.append(f"probe F1 {f1[-1]:.2f} is not above {GOOD_PROBE_F1}" if poor else None)
    return LetterProbes(
        torch.from_numpy(weights.T.copy()), torch.from_numpy(biases), tuple(f1), tuple(reasons)
    )


# -- steps 2 and 3: the letter's own latents ----------------------------------------------------


class SplitLatents(NamedTuple):
    """The latents that a letter is split over.

    Attributes
    ----------
    latents : tuple of int
        Empty if no latent has a positive selector weight.
    f1 : tuple of float
        Test F1 of a logistic regression on the first 1, 2, ... of the ranked latents, up to the first
        one too many.
    """

    latents: tuple[int, ...]
    f1: tuple[float, ...]


def split_latents(
    feature_acts: csr_array,
    letters: Tensor,
    is_test: Tensor,
    *,
    only: Sequence[int] = tuple(range(len(LETTERS))),
    seed: int = 0,
) -> dict[int, SplitLatents]:
    """Which latents detect each letter: as many as F1 on test words asks for.

    A logistic probe on all latents, trained as in `train_letter_probes` with weight decay 1e-6 and
    an L1 penalty of 0.01 · mean over letters of Σ|w|, ranks a letter's latents by signed weight. A logistic
    regression (balanced classes) is refitted on the first k = 1, 2, ... 10 of them, as long as its
    F1 grows by more than 0.03 over the last accepted set.

    Parameters
    ----------
    feature_acts : scipy.sparse.csr_array, shape (n_words, d_sae)
        Activations times decoder norms.
    letters : Tensor of int, shape (n_words,)
    is_test : Tensor of bool, shape (n_words,)
    only : sequence of int
        The letters to do.
    seed : int
        Of the order in which the selector sees the words.
    """
    is_letter = _one_hot(letters)
    train, test = (~is_test).numpy(), is_test.numpy()
    acts_train, acts_test = feature_acts[train], feature_acts[test]
    weights, _ = _fit_probes(acts_train, is_letter[train], weight_decay=1e-6, l1=0.01, seed=seed)
    splits = {}
    for i in only:
        ranked = np.argsort(-weights[:, i], kind="stable")[:MAX_SPLIT_SIZE]
        ranked = ranked[weights[ranked, i] > 0]
        f1 = []
        best, size = -np.inf, 0
        dense_train, dense_test = acts_train[:, ranked].toarray(), acts_test[:, ranked].toarray()
        for k in range(1, len(ranked) + 1):
            f1.append(
                _refit_f1(
                    dense_train[:, :k], is_letter[train, i], dense_test[:, :k], is_letter[test, i]
                )
            )
            if f1[-1] <= best + SPLIT_F1_GAIN:
                break
            best, size = f1[-1], k
        splits[i] = SplitLatents(tuple(int(latent) for latent in ranked[:size]), tuple(f1))
    return splits


# -- step 4: absorption -------------------------------------------------------------------------


class Absorption(NamedTuple):
    """Absorption of one letter, word by word.

    Attributes
    ----------
    fraction : Tensor, shape (n_words,), float64, in [0, 1]
        Share of the letter that other latents carry in place of the letter's own.
    full : Tensor, shape (n_words,), bool
        The letter's latents are silent and a single other latent stands in for them.
    """

    fraction: Tensor
    full: Tensor


def absorption(
    activations: Tensor,
    feature_acts: Tensor,
    W_dec: Tensor,
    probe: Tensor,
    split_latents: Sequence[int] | Tensor,
) -> Absorption:
    """How far each word's first letter is carried by latents other than the letter's own.

    With unit decoder rows w_i, c_i = cos(probe, w_i), p_i = f_i c_i and P = x·probe / ‖probe‖:
    M is the sum of p over `split_latents`, S the sum of the three largest positive p among the other
    latents with c ≥ 0.1.

    - fraction: 0 if M ≥ P or S < 0.4 P; 1 if M ≤ 0; else t / (t + M) with t = min(S, P − M).
    - full: every split latent is silent, and the latent of largest p has c ≥ 0.025 and p ≥ 0.4 P, P ≥ 0.

    Parameters
    ----------
    activations : Tensor, shape (n_words, d_in)
        Raw model activations x; meant for words of the letter that its probe recognises.
    feature_acts : Tensor, shape (n_words, d_sae)
    W_dec : Tensor, shape (d_sae, d_in)
        Decoder rows of any norm; see the head of this file. Zero rows carry nothing.
    probe : Tensor, shape (d_in,)
        Direction of the letter's probe (without bias).
    split_latents : sequence of int
        The letter's own latents.
    """
    own = torch.as_tensor(split_latents, dtype=torch.long)
    x, f, W = activations.double(), feature_acts.double(), W_dec.double()
    direction = probe.double() / probe.double().norm()
    norms = W.norm(dim=1)
    cosine = (W @ direction) / norms.clamp_min(torch.finfo(torch.float64).tiny)

    total = x @ direction
    projection = f * (norms * cosine)
    from_own = projection[:, own].sum(1)

    is_absorber = cosine >= ABSORBER_MIN_COSINE
    is_absorber[own] = False
    others = (projection * is_absorber).clamp_min(0)
    from_others = others.topk(min(MAX_ABSORBERS, len(cosine)), dim=1).values.sum(1)

    compensated = torch.minimum(from_others, total - from_own)
    fraction = torch.where(from_own <= 0, 1.0, compensated / (compensated + from_own))
    is_absorbed = (from_own < total) & (total > 0) & (from_others >= MIN_EXPLAINED_SHARE * total)
    fraction = torch.where(is_absorbed, fraction, 0.0)

    largest, carrier = projection.max(dim=1)
    full = (
        (f[:, own] == 0).all(1)
        & (cosine[carrier] >= FULL_ABSORBER_MIN_COSINE)
        & (total >= 0)
        & (largest > 0)
        & (largest >= MIN_EXPLAINED_SHARE * total)
    )
    return Absorption(fraction, full)


# -- step 5: the report -------------------------------------------------------------------------


@dataclass(frozen=True)
class LetterRow:
    """One letter of a first-letter report. What was not reached is None.

    Attributes
    ----------
    letter : str
    probe_f1 : float
        Of the ground-truth probe, on test words.
    n_true_positives : int
        Test words of the letter that the probe recognises; absorption is a mean over these.
    split_latents : tuple of int
        The letter's own latents, best first.
    split_size : int
        How many they are; 1 means no splitting.
    split_f1 : tuple of float
        See `SplitLatents`.
    absorption_fraction : float in [0, 1]
        Mean share of the letter that other latents carry.
    full_absorption : float in [0, 1]
        Share of words on which all the letter's latents are silent and another latent stands in.
    not_evaluable : str
        The reason, if there are no scores.
    """

    letter: str
    probe_f1: float | None = None
    n_true_positives: int | None = None
    split_latents: tuple[int, ...] | None = None
    split_size: int | None = None
    split_f1: tuple[float, ...] | None = None
    absorption_fraction: float | None = None
    full_absorption: float | None = None
    not_evaluable: str | None = None


@dataclass(frozen=True)
class FirstLetterReport:
    """First-letter splitting and absorption of one SAE.

    Means and standard deviations (n − 1) are over the evaluated letters; None where too few are.

    Attributes
    ----------
    letters : tuple of LetterRow
        A to Z, the letters that could not be evaluated included.
    n_evaluated : int
        Letters with scores.
    n_good_probes : int
        Letters whose probe has a test F1 above 0.6; SAEBench wants 20 or more.
    """

    letters: tuple[LetterRow, ...]
    n_evaluated: int
    n_good_probes: int
    mean_absorption_fraction: float | None
    sd_absorption_fraction: float | None
    mean_full_absorption: float | None
    sd_full_absorption: float | None
    mean_split_size: float | None
    sd_split_size: float | None


def evaluate_first_letter(
    sae: AnySAE,
    task: FirstLetterTask,
    probes: LetterProbes,
    *,
    seed: int = 0,
    chunk_size: int = 256,
) -> FirstLetterReport:
    """Splitting and absorption of every letter that has a good probe.

    Feature activations are kept sparse: memory grows with the active entries (8 bytes each), besides
    `chunk_size` dense rows of d_sae.

    Parameters
    ----------
    sae : any object with `encode` and `W_dec` (d_sae, d_in)
        Takes raw activations (see `fold_norm_factor`).
    task : FirstLetterTask
    probes : LetterProbes
        Trained on the same task.
    seed : int
        Of the selector's batches; the only chance in here.
    chunk_size : int
        Words encoded at a time.

    Raises
    ------
    ValueError
        If the SAE's input width is not the task's, or if it returns NaN or infinite activations.
    """
    W_dec = sae.W_dec.detach().float()
    if W_dec.ndim != 2 or W_dec.shape[1] != task.activations.shape[1]:
        raise ValueError(
            f"The SAE's W_dec has shape {tuple(W_dec.shape)}; expected (d_sae, "
            f"{task.activations.shape[1]}), the width of the activations at {task.hook_name!r}."
        )
    norms = W_dec.norm(dim=1)
    unit_rows = (W_dec / norms.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).cpu()
    feature_acts = _encode_sparse(sae, norms, task.activations, chunk_size)
    evaluable = [i for i, reason in enumerate(probes.not_evaluable) if reason is None]
    splits = split_latents(feature_acts, task.letters, task.is_test, only=evaluable, seed=seed)

    rows = []
    for i, letter in enumerate(LETTERS):
        row = {"letter": letter, "probe_f1": probes.f1[i]}
        if i not in evaluable:
            rows.append(LetterRow(**row, not_evaluable=probes.not_evaluable[i]))
            continue
        recognised = (
            task.is_test
            & (task.letters == i)
            & (task.activations @ probes.weights[i] + probes.biases[i] > 0)
        ).nonzero()[:, 0]
        split = splits[i]
        row |= {"n_true_positives": len(recognised), "split_f1": split.f1}
        if not split.latents:
            reason = "no latent has a positive weight in the selector"
            rows.append(LetterRow(**row, not_evaluable=reason))
            continue
        fraction, full = [], []
        for words in recognised.split(chunk_size):
            scores = absorption(
                task.activations[words],
                torch.from_numpy(feature_acts[words.numpy()].toarray()),
                unit_rows,
                probes.weights[i],
                split.latents,
            )
            fraction.append(scores.fraction)
            full.append(scores.full)
        rows.append(
            LetterRow(
                **row,
                split_latents=split.latents,
                split_size=len(split.latents),
                absorption_fraction=float(torch.cat(fraction).mean()),
                full_absorption=float(torch.cat(full).double().mean()),
            )
        )
    return _summarise(tuple(rows))


# -- helpers ------------------------------------------------------------------------------------


def _summarise(rows: tuple[LetterRow, ...]) -> FirstLetterReport:
    evaluated = [row for row in rows if row.not_evaluable is None]
    moments = {}
    for name in ("absorption_fraction", "full_absorption", "split_size"):
        values = [getattr(row, name) for row in evaluated]
        moments[f"mean_{name}"] = fmean(values) if values else None
        moments[f"sd_{name}"] = stdev(values) if len(values) > 1 else None
    return FirstLetterReport(
        letters=rows,
        n_evaluated=len(evaluated),
        n_good_probes=sum(
            row.probe_f1 is not None and row.probe_f1 > GOOD_PROBE_F1 for row in rows
        ),
        **moments,
    )


def _alphabetic_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    special = set(tokenizer.all_special_ids)
    words = {}
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))):
        # A leading space is Ġ in byte-level vocabularies, ▁ in SentencePiece; decoding would lose the
        # latter. ASCII letters stand for themselves in both.
        text = (token or "").replace("Ġ", " ").replace("▁", " ")
        word = text.removeprefix(" ")
        if word.isascii() and word.isalpha() and i not in special:
            words[i] = text
    return words


def _token_counts(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> Counter[int]:
    counts: Counter[int] = Counter()
    for document in corpus.documents:
        # `verbose`: no warning that a document is longer than the model's context.
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        counts.update(ids)
    return counts


def _place_words(
    tokenizer: PreTrainedTokenizerBase, words: LetterWords, prefix: str, shots: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Token ids in front of the word, and indices of the words that are one token behind them."""
    prompts = [prefix + word + " has the first letter:" for word in words.words]
    ids = tokenizer([prefix, *prompts], add_special_tokens=False)["input_ids"]
    in_front, prompt_ids = ids[0], ids[1:]
    examples = {shot.lower() for shot in shots}
    kept = [
        i
        for i, word in enumerate(words.words)
        if prompt_ids[i][: len(in_front) + 1] == [*in_front, int(words.token_ids[i])]
        and word.strip().lower() not in examples
    ]
    if tokenizer.bos_token_id is not None:
        in_front = [tokenizer.bos_token_id, *in_front]
    return in_front, kept


def _behind(prefix: Tensor, ids: Tensor) -> Tensor:
    """Prompts [n_words, n_prefix + 1]: the prefix, then one word."""
    return torch.cat([prefix.long().expand(len(ids), -1), ids[:, None]], dim=1)


def _read_with_cache(
    model: TransformerBridge,
    prefix: Tensor,
    batches: Iterable[Tensor],
    hook_name: str,
    precision: Precision,
) -> Iterator[Tensor]:
    """Activation behind `prefix` [n_prefix] for each batch of token ids [n_words] in its place."""
    from transformer_lens.model_bridge.exceptions import StopAtLayerException
    from transformers import DynamicCache

    def stop(activation: Tensor, hook: object) -> None:
        raise StopAtLayerException(activation)  # which run_with_hooks returns

    def run(tokens: Tensor, cache: DynamicCache) -> Tensor:
        with torch.no_grad(), autocast:
            return model.run_with_hooks(
                tokens, fwd_hooks=[(hook_name, stop)], past_key_values=cache, use_cache=True
            )

    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    prefix_cache = DynamicCache(config=model.original_model.config)
    run(prefix[None].to(device), prefix_cache)
    for ids in batches:
        cache = copy.deepcopy(prefix_cache)
        cache.batch_repeat_interleave(len(ids))
        yield run(ids[:, None].to(device), cache)[:, -1]


def _one_hot(letters: Tensor) -> np.ndarray:
    return torch.nn.functional.one_hot(letters.cpu(), len(LETTERS)).bool().numpy()


def _fit_probes(
    inputs: np.ndarray | csr_array,
    is_letter: np.ndarray,
    *,
    weight_decay: float,
    l1: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (width, 26) and biases (26,) of one-vs-rest logistic probes; see `train_letter_probes`."""
    n_words, width = inputs.shape
    targets = torch.from_numpy(is_letter).float()
    positives = targets.sum(0)
    pos_weight = (n_words - positives) / positives.clamp_min(1)
    weights, biases = torch.zeros(width, len(LETTERS)), torch.zeros(len(LETTERS))
    optimiser = torch.optim.Adam([weights, biases], lr=1e-2, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.ExponentialLR(
        optimiser, (1e-5 / 1e-2) ** (1 / PROBE_EPOCHS)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(PROBE_EPOCHS):
        for rows in torch.randperm(n_words, generator=generator).split(4096):
            batch = inputs[rows.numpy()]
            logits = (torch.from_numpy(batch @ weights.numpy()) + biases).requires_grad_()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, targets[rows], pos_weight=pos_weight
            )
            (error,) = torch.autograd.grad(loss, logits)
            # By hand from here on, because `batch` may be sparse.
            weights.grad = torch.from_numpy(batch.T @ error.numpy())
            weights.grad += l1 / len(LETTERS) * weights.sign()
            biases.grad = error.sum(0)
            optimiser.step()
        schedule.step()
    return weights.numpy(), biases.numpy()


def _f1(predicted: np.ndarray, actual: np.ndarray) -> float:
    both = int((predicted & actual).sum())
    return 2 * both / max(1, int(predicted.sum()) + int(actual.sum()))


def _refit_f1(
    acts_train: np.ndarray, train: np.ndarray, acts_test: np.ndarray, test: np.ndarray
) -> float:
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(class_weight="balanced", max_iter=500).fit(acts_train, train)
    return _f1(classifier.decision_function(acts_test) > 0, test)


def _encode_sparse(sae: AnySAE, norms: Tensor, activations: Tensor, chunk_size: int) -> csr_array:
    """Feature activations times decoder norms."""
    from scipy.sparse import csr_array, vstack

    chunks = []
    with torch.no_grad():
        for x in activations.split(chunk_size):
            feature_acts = sae.encode(x.to(norms.device)).float() * norms
            if not feature_acts.isfinite().all():
                raise ValueError(
                    "The SAE's feature activations hold NaN or infinite values. Check its weights, and "
                    "that it takes raw activations."
                )
            chunks.append(csr_array(feature_acts.cpu().numpy()))
    return vstack(chunks, format="csr")
