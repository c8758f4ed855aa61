"""What a profile's SAEs on a language model need of this machine, and would cost: asked before a run.

Nothing is trained and nothing fetched. Costs are counted, not measured: the operations of every product over
the rate at which this machine multiplies, of which a training reaches about half.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from c2r_core.artefacts.paths import cache_dir, data_dir
from c2r_core.artefacts.profiles import LanguageModelProfile, Profile
from c2r_core.data.language_models import EMBEDDED_MODELS, RANDOM
from c2r_core.data.text import EMBEDDED_CORPORA, load_corpus
from c2r_core.experiments.language_model import standard_arms

REACHED = 0.5
"""Share of the rate of a large product that a training reaches, about."""
GIB = 2**30
BYTES_A_TOKEN = 4
"""Of English text, about."""
A_DAY = 24
"""Hours beyond which a processor is no place for a training."""


class Line(NamedTuple):
    """One thing that is needed."""

    ok: bool
    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = "ok     " if self.ok else "MISSING"
        return f"[{mark}] {self.what}: {self.found}" + (f". {self.remedy}" if not self.ok else "")


class ModelSize(NamedTuple):
    """What a language model's configuration says."""

    d_in: int
    n_layers: int

    @property
    def n_parameters(self) -> int:
        """Of its blocks, about."""
        return 12 * self.n_layers * self.d_in**2


PUBLISHED = {RANDOM: ModelSize(64, 2), "google/gemma-2-2b": ModelSize(2304, 26)}
"""Sizes of models that need not be here to be planned with."""


def plan(profile: Profile, device: str = "cpu") -> list[Line]:
    """Model, text, disk, memory and time, in that order; `ok` is False for what is not there."""
    lm = profile.language_model
    here, size = _size_of_model_here(lm), model_size(lm)
    lines = [_model_line(lm, here is not None), _corpus_line(lm)]
    if size is None:
        unknown = Line(False, "disk, memory and time", "unknown", "Fetch the model first")
        return [*lines, unknown]
    return [*lines, _disk_line(lm, size), *_memory_and_time(lm, size, device)]


def model_size(lm: LanguageModelProfile) -> ModelSize | None:
    """Of the profile's language model: of the one that is here, or as published; None if neither is known."""
    return _size_of_model_here(lm) or PUBLISHED.get(lm.model)


def _size_of_model_here(lm: LanguageModelProfile) -> ModelSize | None:
    from transformers import AutoConfig

    if lm.model == RANDOM:
        return PUBLISHED[RANDOM]
    source = data_dir() / lm.model if lm.model in EMBEDDED_MODELS else lm.model
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    config = getattr(config, "text_config", config)
    return ModelSize(config.hidden_size, config.num_hidden_layers)


def _model_line(lm: LanguageModelProfile, is_here: bool) -> Line:
    remedy = "Run `make data`"
    if lm.model not in EMBEDDED_MODELS:
        remedy = f"Accept its licence on the Hugging Face hub, log in, then: hf download {lm.model}"
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            remedy += " (with HF_HUB_OFFLINE=0)"
    found = "here" if is_here else "not on this machine"
    return Line(is_here, f"language model {lm.model}", found, remedy)


def _corpus_line(lm: LanguageModelProfile) -> Line:
    if lm.corpus in EMBEDDED_CORPORA:
        n_bytes = sum(len(document.text) for document in load_corpus(lm.corpus).documents)
    else:
        n_bytes = sum(file.stat().st_size for file in Path(lm.corpus).expanduser().glob("*.txt"))
    tokens, wanted = n_bytes / BYTES_A_TOKEN, lm.train_tokens + lm.held_out_tokens
    found = f"about {tokens:,.0f} tokens; {wanted:,} are read"
    if 0 < tokens < wanted and lm.streamed:
        found += ", so each document is read several times"
    remedy = f"Put UTF-8 texts, one document a .txt file, into the folder {lm.corpus}"
    return Line(n_bytes > 0, f"text {lm.corpus}", found, remedy)


def _disk_line(lm: LanguageModelProfile, size: ModelSize) -> Line:
    stored = lm.held_out_tokens + (lm.held_out_tokens if lm.streamed else lm.train_tokens)
    parameters = 2 * lm.d_sae * size.d_in
    n_bytes = 2 * size.d_in * stored + 4 * parameters * (len(standard_arms(lm)) + 2 * 3)
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    found = (
        f"{n_bytes / GIB:,.0f} GiB for activations and SAEs, {free / GIB:,.0f} GiB free in {folder}"
    )
    return Line(free >= n_bytes, "disk", found, "Set C2R_CACHE to a folder on a larger disk")


def _memory_and_time(lm: LanguageModelProfile, size: ModelSize, device: str) -> Iterator[Line]:
    parameters = 2 * lm.d_sae * size.d_in
    # Weights, gradients and Adam's two moments; pre-activations of a batch, and what is chosen of them.
    n_bytes = 4 * (4 * parameters + 3 * lm.batch_size * lm.d_sae + 2 * size.n_parameters)
    there = _memory(device)
    found = f"{n_bytes / GIB:,.1f} GiB, about; {there / GIB:,.0f} GiB on {device}"
    yield Line(there >= n_bytes, "memory", found, "Take a device with more, or a smaller d_sae")

    arms, rate = standard_arms(lm).values(), product_rate(device)
    total = sum(sum(operations(lm, size, arm.d_sae, arm.c2r_strength)) for arm in arms)
    hours = total / (REACHED * rate) / 3600
    found = f"{hours:,.1f} hours for {len(arms)} SAEs, at {rate / 1e12:.2f} TFLOP/s"
    found += "; measuring them comes on top"
    yield Line(device != "cpu" or hours < A_DAY, "time", found, "Take a GPU: --device cuda")


class Operations(NamedTuple):
    """Additions and multiplications of one SAE's training, by what they are for."""

    model: float
    """The language model, up to the hook."""
    encoder: float
    search: float
    """C²R's search for neighbours."""


def operations(
    lm: LanguageModelProfile, size: ModelSize, d_sae: int, c2r_strength: float
) -> Operations:
    """Of the large products of one SAE's training; a strength of 0 searches for no neighbours."""
    tokens = lm.steps * lm.batch_size
    block = re.search(r"blocks\.(\d+)\.", lm.hook_name)  # what is behind the hook is not run
    share = (int(block[1]) + 1) / size.n_layers if block else 1
    compared = min(lm.chunk_size or d_sae, d_sae)
    searches = lm.steps / lm.penalty_every if c2r_strength else 0
    return Operations(
        model=2 * share * size.n_parameters * (tokens if lm.streamed else lm.train_tokens),
        encoder=2 * d_sae * size.d_in * tokens,
        search=searches * d_sae * compared * size.d_in,
    )


def product_rate(device: str) -> float:
    """Operations a second of a product of large matrices in float32, the best of a few."""
    a = torch.randn(1024, 1024, device=device)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(times)


def _memory(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
