"""One evaluation: an SAE, a model and held-out documents in, a checked report out."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from c2r_core.artefacts.fields import from_json
from c2r_core.artefacts.files import whole_file
from c2r_core.artefacts.fingerprints import fingerprint, has_source
from c2r_core.artefacts.profiles import load_profile
from c2r_core.artefacts.results import provenance
from c2r_core.data.forward import check_hook_name
from c2r_core.data.text import SPLIT_SEED, Corpus
from c2r_core.errors import NotEvaluable
from c2r_core.evaluate.report import (
    Evaluated,
    ModelDescription,
    NotEvaluated,
    Report,
    SAEDescription,
    Settings,
    TextDescription,
    checked_record,
    checked_report,
)
from c2r_core.formats import OpenedSAE, open_sae
from c2r_core.metrics import METRICS, chosen_metrics, standard_metrics
from c2r_core.metrics.inputs import Inputs, Options
from c2r_core.saes import SAE, fold_norm_factor
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_log = logging.getLogger(__name__)


def evaluate(
    sae: AnySAE | str | Path,
    *,
    model: str | TransformerBridge | None = None,
    hook_name: str | None = None,
    corpus: str | Path | Corpus | None = None,
    metrics: str | Iterable[str] | None = None,
    options: Options = Options(),  # noqa: B008
) -> Report:
    """Measure an SAE on held-out documents.

    Read are the documents that the project's split holds out, and no others: no SAE that was trained
    here, with the same `held_out_share` in its profile, has seen them. A metric that this SAE, model
    or corpus does not allow becomes a record with the reason, and the others go on; any error that is
    not `NotEvaluable` is raised.

    Parameters
    ----------
    sae : AnySAE, str or Path
        A folder of any format that `open_sae` reads; or an object with encode, decode and W_dec of
        shape (d_sae, d_in) that takes raw activations (an SAE of this package gets its normalising
        factor folded in).
    model : str or TransformerBridge, optional
        As `load_language_model` takes it, or a loaded one. None is that of the profile, as below.
    hook_name : str, optional
        Where the SAE reads, such as `blocks.4.hook_resid_post`.
    corpus : str, Path or Corpus, optional
        As `load_corpus` takes it, or a loaded one.
    metrics : str or iterable of str
        Groups ("core", "absorption", …) or single metrics (keys of METRICS); a string may name
        several, separated by commas. None measures all that need nothing else, and those whose needs
        are given.
    options : Options
        The profile of sizes, seed, device, and what some metrics need.

    Raises FileNotFoundError or ValueError if there is nothing to measure or to measure on: no such SAE,
    model, hook, corpus, profile or metric; if the SAE was trained on the very documents that are held out
    here; or if a folder or a link is in the place of `Options.keep`.
    """
    return prepare(sae, model, hook_name, corpus, metrics, options).measure()


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and on what: checked, and ready to be measured."""

    opened: OpenedSAE
    inputs: Inputs
    names: list[str]
    profile: str
    model: ModelDescription | None
    text: TextDescription | None

    def measure(self, tell: Callable[[str], object] = _log.info) -> Report:
        """Measure one metric after the other; `Options.keep` takes those whose code is in a file.

        `tell` gets a line when a metric is finished.
        """
        options = self.inputs.options
        kept = _Kept(options.keep, self._identity()) if options.keep else None
        records = {}
        for name in self.names:
            record = kept.records.get(name) if kept else None
            if record is None:
                started = time.monotonic()
                record = _record(name, self.inputs)
                tell(f"{name}: {time.monotonic() - started:.1f} s")
                if kept and has_source(METRICS[name].measure.__module__):
                    kept.add(name, record)
            else:
                tell(f"{name}: kept from before")
            records[name] = record
        made = provenance(profile="", seed=0, device=options.device, seconds=0.0)
        # These would differ between equal runs, or are settings.
        unwanted = ("seconds", "profile", "seed")
        return checked_report(
            Report(
                sae=self._sae(),
                model=self.model,
                text=self.text,
                settings=self._settings(),
                metrics=records,
                provenance={key: value for key, value in made.items() if key not in unwanted}
                | {"code": self._code()},
            )
        )

    def _sae(self) -> SAEDescription:
        d_sae, d_in = self.opened.sae.W_dec.shape
        return SAEDescription(
            format=self.opened.format,
            architecture=self.opened.architecture,
            d_in=d_in,
            d_sae=d_sae,
            weights_sha256=self.opened.weights_sha256,
            stated=_stated(self.opened),
        )

    def _settings(self) -> Settings:
        lm = self.inputs.lm
        return Settings(
            profile=self.profile,
            metrics=self.names,
            seed=self.inputs.seed,
            context_size=lm.context_size,
            held_out_tokens=lm.held_out_tokens,
            drop_norm_ratio=lm.drop_norm_ratio,
            precision=self.inputs.precision,
            cross_entropy_contexts=lm.cross_entropy_contexts,
            first_letter_words=lm.first_letter_words,
        )

    def _code(self) -> str:
        """A hash of the code that the metrics asked for rest on; of a plugin, its file."""
        modules = {METRICS[name].measure.__module__ for name in self.names}
        in_files = filter(has_source, modules)
        return fingerprint({"c2r_core.evaluate.evaluation", *in_files})

    def _identity(self) -> str:
        """A hash of all that decides the records."""
        options, lm = self.inputs.options, self.inputs.lm
        train, against = options.train_store, options.against
        decides = {
            "sae": _weights(self.opened.sae),
            "against": None if against is None else _weights(against),
            "train": None if train is None else train.manifest.text_fingerprint,
            "endpoint": None if options.endpoint is None else options.endpoint.model,
            "ravel": str(options.ravel),
            "model": None if self.model is None else self.inputs.model_content,
            "text": None if self.text is None else self.text.fingerprint,
            "lm": lm.model_dump(mode="json"),
            "sizes": self.inputs.sizes.model_dump(mode="json"),
            "seed": options.seed,
            "device": options.device,
            "code": self._code(),
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def prepare(
    sae: AnySAE | str | Path,
    model: str | TransformerBridge | None,
    hook_name: str | None,
    corpus: str | Path | Corpus | None,
    metrics: str | Iterable[str] | None,
    options: Options,
) -> Evaluation:
    """The evaluation that `evaluate` makes, not yet measured; parameters and errors are the same."""
    if options.keep:
        _check_place(Path(options.keep))  # now, and not when it is written
    given = [name for name, value in vars(options).items() if value is not None]
    names = chosen_metrics(standard_metrics(given) if metrics is None else metrics)
    profile = load_profile(options.profile) if isinstance(options.profile, str) else options.profile
    named = {
        "model": model if isinstance(model, str) else None,
        "hook_name": hook_name,
        "corpus": str(corpus) if isinstance(corpus, str | Path) else None,
    }
    lm = profile.language_model.model_copy(
        update={key: value for key, value in named.items() if value is not None}
    )
    opened = _open(sae, options.device)
    if options.against is not None:
        options = replace(options, against=_open(options.against, options.device).sae)
    inputs = Inputs(
        opened.sae,
        lm,
        profile.evaluation,
        options,
        language_model=None if isinstance(model, str) else model,
        corpus=corpus if isinstance(corpus, Corpus) else None,
    )
    read = None, None
    if any(METRICS[name].reads_model for name in names):
        check_hook_name(inputs.language_model, lm.hook_name)
        name = lm.model if model is None or isinstance(model, str) else model.cfg.model_name
        read = ModelDescription(name, lm.hook_name), _text(inputs, _stated(opened))
    return Evaluation(opened, inputs, names, profile.name, *read)


def _record(name: str, inputs: Inputs) -> Evaluated | NotEvaluated:
    try:
        if len(inputs.sae.W_dec) == 0:
            raise NotEvaluable("The dictionary is empty: W_dec has no rows.")
        record = Evaluated(METRICS[name].measure(inputs))
    except NotEvaluable as error:
        record = NotEvaluated(str(error))
    except Exception as error:
        error.add_note(f"while measuring {name!r}")
        raise
    return checked_record(name, record)


class _Kept:
    """Finished metrics in a file: a line that says of what, then a line for each.

    A line that is damaged is left out, and its metric is measured again; a warning says so.
    """

    def __init__(self, file: str | Path, identity: str) -> None:
        self.file, self.identity, self.records = Path(file), identity, {}
        _check_place(self.file)
        content = self.file.read_bytes() if self.file.exists() else b""
        first, *lines = content.rstrip(b"\n").split(b"\n")
        if first == identity.encode():
            n_damaged = sum(not self._take(line) for line in lines)
            if n_damaged:
                _log.warning(
                    "%s: %d of %d records are damaged; what they held is measured again",
                    *(self.file, n_damaged, len(lines)),
                )
        elif first:
            _log.warning("%s is of another evaluation, or damaged; it is begun anew", self.file)
        self._write()

    def add(self, name: str, record: Evaluated | NotEvaluated) -> None:
        self.records[name] = record
        self._write()

    def _take(self, line: bytes) -> bool:
        """Whether a line is whole; the record of a metric that is not known here is left out."""
        try:
            name, record = from_json(line)
            if name in METRICS:
                self.records[name] = checked_record(name, record)
        except (ValueError, TypeError, RecursionError):
            return False
        return True

    def _write(self) -> None:
        """All of it, beside what is there and then in its place: a link is not written through."""
        lines = [json.dumps([n, asdict(r)], ensure_ascii=False) for n, r in self.records.items()]
        with whole_file(self.file) as part:
            part.write_bytes("\n".join([self.identity, *lines, ""]).encode())


def _check_place(file: Path) -> None:
    """Raise a ValueError if what finished metrics are kept in is a folder or a link, or the like."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise ValueError(
            f"{file} is no file, but a link or a folder; finished metrics would be kept there. Remove it, or "
            "give another name."
        )


def _open(sae: AnySAE | str | Path, device: str) -> OpenedSAE:
    if isinstance(sae, str | Path):
        opened = open_sae(sae, device)
    else:
        missing = [name for name in ("encode", "decode", "W_dec") if not hasattr(sae, name)]
        if missing:
            raise ValueError(
                f"A {type(sae).__name__} has no {' and no '.join(missing)}. Give the folder of an SAE, or "
                "an object with encode, decode and W_dec of shape (d_sae, d_in)."
            )
        folded = fold_norm_factor(sae) if isinstance(sae, SAE) else sae
        architecture = getattr(sae, "architecture", type(sae).__name__)
        opened = OpenedSAE(folded, "in memory", architecture, weights_sha256=None)
    _check_shapes(opened.sae)
    return opened


@torch.no_grad()
def _check_shapes(sae: AnySAE) -> None:
    if sae.W_dec.ndim != 2:
        raise ValueError(
            f"W_dec has shape {tuple(sae.W_dec.shape)}; expected (d_sae, d_in). Measure the SAEs of a "
            "stack one by one."
        )
    d_sae, d_in = sae.W_dec.shape
    if d_sae == 0:
        return  # every metric says so
    x = torch.zeros(2, d_in, device=sae.W_dec.device)
    try:
        found = tuple(sae.encode(x).shape)
        fault = f"encode gives shape {found}"
    except Exception as error:
        found, fault = None, f"encode fails ({error})"
    if found != (2, d_sae):
        raise ValueError(
            f"W_dec has shape ({d_sae}, {d_in}), which is read as (d_sae, d_in), but for activations of "
            f"shape (2, {d_in}) {fault}; expected (2, {d_sae}). Is W_dec transposed?"
        )


def _stated(opened: OpenedSAE) -> dict[str, str]:
    """What an SAE's own record says of its training."""
    stated = {**opened.stated, **(getattr(opened.sae, "trained_on", None) or {})}
    return {name: str(value) for name, value in stated.items()}


def _text(inputs: Inputs, stated: dict[str, str]) -> TextDescription:
    documents, trained_on = inputs.documents, stated.get("text_fingerprint")
    if trained_on == documents.corpus.fingerprint:
        raise ValueError(
            "The SAE was trained on the very documents that are held out here: its record names text "
            f"{trained_on[:12]}…. Evaluate it on another corpus."
        )
    known = "not known" if trained_on is None else "another text"
    if trained_on == documents.training_fingerprint:
        known = "the other documents of this split"
    return TextDescription(
        corpus=documents.corpus.name.removesuffix("/held-out"),
        fingerprint=documents.corpus.fingerprint,
        n_documents=len(documents.corpus),
        n_repeated=documents.n_repeated,
        training_fingerprint=documents.training_fingerprint,
        split_seed=SPLIT_SEED,
        held_out_share=inputs.lm.held_out_share,
        sae_trained_on=known,
    )


@torch.no_grad()
def _weights(sae: AnySAE) -> str:
    """A hash of what an SAE holds, or, where it does not show that, of what it answers."""
    if hasattr(sae, "state_dict"):
        tensors = [tensor for _, tensor in sorted(sae.state_dict().items())]
    else:
        x = torch.randn(64, sae.W_dec.shape[1], generator=torch.Generator().manual_seed(0))
        acts = sae.encode(x.to(sae.W_dec.device))
        tensors = [sae.W_dec, acts, sae.decode(acts)]
    digest = hashlib.sha256(type(sae).__name__.encode())
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
