"""Study `performance`: from text to an evaluation, the speed of a harvest and the memory of each stage.

Memory is that of a process of its own, beyond the language model, the weights and what else is there before.
Pages of a store that are mapped into memory count too, although the system may take them back at any time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from c2r_core.artefacts.profiles import PerformanceProfile
from c2r_core.data.forward import activations
from c2r_core.data.harvest import cut_contexts, harvest, harvest_config
from c2r_core.data.streaming import StreamedBatches, TextStream
from c2r_core.data.text import Corpus
from c2r_core.experiments.language_model import Sources, language_model, training_corpus
from c2r_core.experiments.timing import in_turn, peak_memory, seconds
from c2r_core.metrics.inputs import Inputs, Options
from c2r_core.metrics.reconstruction import measure_reconstruction
from c2r_core.saes import BatchTopKSAE
from c2r_core.training import TrainConfig, train

if TYPE_CHECKING:
    from torch import nn
    from transformer_lens.model_bridge import TransformerBridge

_CONTEXTS_PER_PASS = 32  # as in `harvest`
_CHARACTERS_A_TOKEN = 6  # more than English has, so that some text is left over


def measure_harvest(
    sizes: PerformanceProfile, sources: Sources, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """A harvest, beside the bare Hugging Face model that ends behind the hook's block, on the same tokens.

    Timed besides: the same model with the attention that transformer_lens needs ("eager"), and of the harvest
    the passes through the language model alone, without tokeniser, statistics and disk ("passes").
    """
    model = language_model(sources.lm.model, device)
    corpus = some_text(training_corpus(sources.lm), sizes.harvest_tokens)
    config = harvest_config(sources.lm, sizes.harvest_tokens, device)
    texts = [document.text for document in corpus.documents]
    by_document = list(cut_contexts(model.tokenizer, texts, config.context_size))
    contexts = torch.cat([torch.from_numpy(part) for part in by_document])
    tokens = contexts[: sizes.harvest_tokens // config.context_size]
    fast, eager = (bare_model(model, config.hook_name, kind) for kind in ("sdpa", "eager"))

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return seconds(lambda: harvest(model, corpus, config, Path(folder) / "store"), device)

    def passes() -> None:
        for part in tokens.split(_CONTEXTS_PER_PASS):
            activations(model, part, config.hook_name, precision=config.precision)

    def bare(reference: nn.Module) -> Callable[[], None]:
        is_bfloat16 = config.precision == "bfloat16"

        def run() -> None:
            kind = torch.device(device).type
            with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=is_bfloat16):
                for part in tokens.split(_CONTEXTS_PER_PASS):
                    reference(part.to(device, torch.long), use_cache=False)

        return run

    runs = {
        "ours": ours,
        "reference": lambda: seconds(bare(fast), device),
        "eager": lambda: seconds(bare(eager), device),
        "passes": lambda: seconds(passes, device),
    }
    return {"n_tokens": tokens.numel()} | in_turn(runs, sizes.pairs)


def measure_harvest_memory(
    n_tokens: int, sources: Sources, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """What a harvest of so many tokens takes: one pass through the model, whatever the length of the text."""
    return {"peak_memory_ours": _plain_peak(_harvest_once, n_tokens, sources)}


def measure_streaming_memory(
    sizes: PerformanceProfile, sources: Sources, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """What `StreamedBatches` and two training steps on them take, beyond the SAE's weights.

    That is a block of activations, and what a step takes: gradients, Adam's moments, activations.
    """
    return {"peak_memory_ours": _plain_peak(_streaming_once, sizes, sources, seeds[0])}


def measure_evaluation_memory(
    n_tokens: int, sizes: PerformanceProfile, sources: Sources, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """What the metric `reconstruction` takes on so many held-out tokens.

    The SAE is untrained: about half of its latents fire, so a sparse one takes no more.
    """
    sources = sources.with_lm(held_out_tokens=n_tokens)
    width = language_model(sources.lm.model).cfg.d_model
    arguments = (width, sizes, sources, seeds[0])
    _ = _held_out(*arguments).activations  # harvested here, read there
    return {"peak_memory_ours": _plain_peak(_evaluation_once, *arguments)}


def _plain_peak(run: Callable[..., object], *arguments: Any) -> float:
    """`peak_memory` under the allocator's own settings: the Makefile's keep freed memory, how much varies."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    for name in settings:
        del os.environ[name]
    try:
        return peak_memory(run, *arguments)
    finally:
        os.environ.update(settings)


def bare_model(model: TransformerBridge, hook_name: str, attention: str) -> nn.Module:
    """The Hugging Face model as it was before it got hooks, up to the hook: no later block, norm or head.

    Its weights are those of `model`. It takes tokens (batch, context), and the `last_hidden_state` of what it
    returns is what `activations` gives at the hook. `attention` is an implementation of transformers.

    Raises
    ------
    ValueError
        If the hook is not the residual stream after a block, or the weights do not fit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    block, _, rest = hook_name.removeprefix("blocks.").partition(".")
    if rest != "hook_resid_post" or not block.isdigit():
        raise ValueError(
            f"hook_name is {hook_name!r}; expected blocks.n.hook_resid_post, behind which a model can end."
        )
    original = model.original_model
    config = AutoConfig.for_model(**original.config.to_dict())
    config.num_hidden_layers = int(block) + 1
    bare = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    weights = {
        name.replace("._original_component", ""): tensor
        for name, tensor in original.state_dict().items()
    }
    missing = bare.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise ValueError(f"{model.cfg.model_name!r} has no weights named {missing}.")
    bare = bare.base_model.to(next(original.parameters()).device).eval()
    bare.norm = torch.nn.Identity()
    return bare


def some_text(corpus: Corpus, n_tokens: int) -> Corpus:
    """The first documents of a corpus, as many as give so many tokens of English, and few more."""
    n_characters, chosen = 0, []
    for document in corpus.documents:
        if n_characters >= _CHARACTERS_A_TOKEN * n_tokens:
            break
        chosen.append(document)
        n_characters += len(document.text)
    return replace(corpus, documents=tuple(chosen))


def _harvest_once(n_tokens: int, sources: Sources) -> Callable[[], object]:
    model = language_model(sources.lm.model)
    corpus = some_text(training_corpus(sources.lm), n_tokens)
    config = harvest_config(sources.lm, n_tokens, "cpu")

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            harvest(model, corpus, config, Path(folder) / "store")

    return run


def _streaming_once(sizes: PerformanceProfile, sources: Sources, seed: int) -> Callable[[], object]:
    model, corpus = language_model(sources.lm.model), training_corpus(sources.lm)
    texts = TextStream(corpus.name, lambda: (document.text for document in corpus.documents))
    config = harvest_config(sources.lm, None, "cpu")

    def two_steps(sae: BatchTopKSAE, batch_size: int, buffer_tokens: int) -> None:
        how = {"batch_size": batch_size, "seed": seed, "buffer_tokens": buffer_tokens}
        batches = StreamedBatches(model, texts, config, **how)
        train(sae, batches, TrainConfig(steps=2), progress=False)

    d_in = model.cfg.d_model
    tiny = BatchTopKSAE(d_in, sizes.k, k=sizes.k)
    two_steps(tiny, 2, 2 * config.context_size)  # loads what a first step loads
    sae = _untrained(d_in, sizes, seed)
    return lambda: two_steps(sae, sizes.batch_size, sizes.buffer_tokens)


def _evaluation_once(
    d_in: int, sizes: PerformanceProfile, sources: Sources, seed: int
) -> Callable[[], object]:
    inputs = _held_out(d_in, sizes, sources, seed)
    return lambda: measure_reconstruction(inputs)


def _held_out(d_in: int, sizes: PerformanceProfile, sources: Sources, seed: int) -> Inputs:
    """An untrained SAE with the held-out documents; no language model is loaded unless it is read."""
    options = Options(profile=sources.profile)
    return Inputs(_untrained(d_in, sizes, seed), sources.lm, sources.profile.evaluation, options)


def _untrained(d_in: int, sizes: PerformanceProfile, seed: int) -> BatchTopKSAE:
    return BatchTopKSAE(d_in, sizes.memory_width, k=sizes.k, seed=seed)
