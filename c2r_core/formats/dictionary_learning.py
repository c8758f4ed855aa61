"""SAEs in the format of dictionary_learning: a folder with `config.json` and `ae.pt`.

Read in the code of dictionary_learning 0.1.0. Encode and decode are those of the dictionary that
its `load_dictionary` gives:

- `AutoEncoder` gets decoder columns of norm 1, their norms moved into the encoder;
- BatchTopK and Matryoshka dictionaries use their threshold, TopK its k;
- normalised training is folded into the biases before `ae.pt` is written, so all take raw
  activations.

`ae.pt` is a pickle in an archive. It is read with `weights_only=True`, so nothing in it can run. Before that,
the archive's checksums are compared, and a pickle that names anything but tensors is refused: it could ask
for any amount of memory.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from c2r_core.formats.inference import (
    Gated,
    InferenceSAE,
    JumpReLU,
    ReLU,
    TopK,
    as_numbers,
    take,
)

CONFIG, WEIGHTS = "config.json", "ae.pt"
UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What a damaged archive or pickle raises: it is a program, and the damage may be to any of its commands."""


NEEDED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}
STORAGES = {
    f"{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short")
}
"""With these, what the pickle of a state dict may name."""


def read(folder: Path, config: Mapping[str, Any]) -> tuple[InferenceSAE, str]:
    """The SAE of a dictionary_learning folder and the name of its class, as in its config.

    Raises ValueError if the class is unknown (the message lists the known ones), the file is damaged or holds
    anything but tensors, or the tensors do not fit the config or hold a NaN.
    """
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping) or "dict_class" not in trainer:
        raise ValueError(f"{folder / CONFIG} has no entry trainer.dict_class.")
    dict_class = trainer["dict_class"]
    if not isinstance(dict_class, str) or dict_class not in CLASSES:
        raise ValueError(f"dict_class is {dict_class!r}; this code reads {', '.join(CLASSES)}.")
    try:
        _check_archive(folder / WEIGHTS)
        # In the mapped file a tensor cannot be larger than its numbers; else torch takes memory for it.
        file = str(folder / WEIGHTS)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{folder / WEIGHTS} is damaged, or holds more than tensors, which would run code when "
            f"read ({repr(error).splitlines()[0]})."
        ) from error
    if not isinstance(tensors, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError(f"{folder / WEIGHTS} is no state dict: expected tensors by name.")
    sae = _built(dict_class, tensors, trainer)
    said = (trainer.get("activation_dim"), trainer.get("dict_size"))
    if None not in said and said != tuple(sae.W_enc.shape):
        raise ValueError(
            f"{CONFIG} says (activation_dim, dict_size) = {said}; {WEIGHTS} has "
            f"{tuple(sae.W_enc.shape)}."
        )
    return sae, dict_class


def write(sae: InferenceSAE, folder: Path, stated: Mapping[str, Any]) -> None:
    """Both files of a dictionary that `load_dictionary` loads.

    Its class is one that changes nothing when it is loaded: `AutoEncoder`, which rescales latents, is not
    used. `b_dec` goes into the encoder's biases, or out of them, as the class wants it.
    """
    dict_class = WRITTEN_AS[type(sae.activation)]
    layout = CLASSES[dict_class]
    sae = sae.with_centred(layout.centred)
    activation, (d_in, d_sae) = sae.activation, sae.W_enc.shape
    biases = [getattr(activation, name) for name in activation.names]
    if isinstance(activation, JumpReLU):  # one for each latent there
        biases[1] = biases[1].expand(d_sae)
    matrices = [sae.W_enc, sae.W_dec]
    if layout.names[:2] == MATRICES:
        matrices = [matrix.T for matrix in matrices]
    tensors = dict(zip(layout.names, [*matrices, sae.b_dec, *biases], strict=True))
    trainer = {"dict_class": dict_class, "activation_dim": d_in, "dict_size": d_sae}
    if isinstance(activation, TopK):
        trainer["k"] = activation.k
        tensors |= {"k": torch.tensor(activation.k), "threshold": torch.tensor(-1.0)}
    trainer |= {
        name: stated[key]
        for name, key in (("lm_name", "model"), ("submodule_name", "hook_name"), ("layer", "layer"))
        if key in stated
    }
    torch.save(
        {name: t.cpu().contiguous().clone() for name, t in tensors.items()}, folder / WEIGHTS
    )
    content = json.dumps({"trainer": trainer, "buffer": {}}, indent=2)
    (folder / CONFIG).write_text(content + "\n", encoding="utf-8")


def _check_archive(file: Path) -> None:
    """Raise an error, one of UNREADABLE, unless the file is as `torch.save` writes a dictionary's tensors.

    The archive must be whole and hold its entries as they are: `torch.load` compares no checksums, and takes
    all the memory that it is told to.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("the archive is compressed")
        if sum(entry.file_size for entry in entries) > file.stat().st_size:
            raise ValueError("the archive unpacks to more than its own size")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} in the archive is wrong")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_names(archive.read(entry))


def _check_names(program: bytes) -> None:
    """Raise an error if a pickle names anything that a dictionary of tensors does not need."""
    for opcode, given, _ in pickletools.genops(program):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            module, _, name = str(given).partition(" ")
            if (module, name) not in NEEDED and not (module == "torch" and name in STORAGES):
                raise pickle.UnpicklingError(f"it names {given}, which is no part of a tensor")


def stated(config: Mapping[str, Any]) -> dict[str, str]:
    """What the config says about the model and the place in it."""
    trainer = config.get("trainer") or {}
    names = {
        "model": trainer.get("lm_name"),
        "hook_name": trainer.get("submodule_name"),
        "layer": trainer.get("layer"),
    }
    return {name: str(value) for name, value in names.items() if value is not None}


class Layout(NamedTuple):
    """How a class of dictionary is stored and read."""

    names: tuple[str, ...]
    """Of the encoder, the decoder, the decoder's bias, and what the activation takes, in its order."""
    activation: Callable[..., nn.Module]
    centred: bool = True
    """As in `InferenceSAE`."""
    unused: tuple[str, ...] = ()
    """Tensors that the file may hold beside these, with no part in encode and decode."""


MATRICES = ("encoder.weight", "decoder.weight")
PLAIN = ("W_enc", "W_dec", "b_dec", "b_enc", "threshold")
CLASSES = {
    "AutoEncoder": Layout((*MATRICES, "bias", "encoder.bias"), ReLU),
    "AutoEncoderNew": Layout((*MATRICES, "decoder.bias", "encoder.bias"), ReLU, centred=False),
    # TopK's threshold is kept for another way of encoding; older files lack it.
    "AutoEncoderTopK": Layout(
        (*MATRICES, "b_dec", "encoder.bias"), TopK, unused=("k", "threshold")
    ),
    "BatchTopKSAE": Layout(
        (*MATRICES, "b_dec", "encoder.bias", "threshold"), JumpReLU, unused=("k",)
    ),
    "GatedAutoEncoder": Layout(
        (*MATRICES, "decoder_bias", "gate_bias", "r_mag", "mag_bias"), Gated
    ),
    "JumpReluAutoEncoder": Layout(PLAIN, JumpReLU, centred=False),
    # All groups are active when a Matryoshka dictionary is loaded.
    "MatryoshkaBatchTopKSAE": Layout(PLAIN, JumpReLU, unused=("k", "group_sizes")),
}
WRITTEN_AS = {
    ReLU: "AutoEncoderNew",
    TopK: "AutoEncoderTopK",
    JumpReLU: "JumpReluAutoEncoder",
    Gated: "GatedAutoEncoder",
}


def _built(dict_class: str, tensors: dict[str, Tensor], trainer: Mapping[str, Any]) -> InferenceSAE:
    layout = CLASSES[dict_class]
    if "k" in layout.unused:
        in_file = _whole_number(tensors["k"]) if "k" in tensors else None
        k = trainer.get("k", in_file)
        if in_file not in (None, k):
            raise ValueError(f"{CONFIG} says k = {k}; {WEIGHTS} says {in_file}.")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in layout.unused}
    chosen = take(tensors, *layout.names, file=WEIGHTS)
    numbers = as_numbers(dict(zip(layout.names, chosen, strict=True)), WEIGHTS)
    encoder, decoder, b_dec, *rest = numbers.values()
    if layout.names[:2] == MATRICES:
        for name in MATRICES:
            if numbers[name].ndim != 2:
                raise ValueError(
                    f"{name} in {WEIGHTS} has shape {tuple(numbers[name].shape)}; expected a matrix."
                )
        encoder, decoder = encoder.T, decoder.T
    if layout.activation is TopK:
        rest.append(k)
    sae = InferenceSAE(encoder, decoder, b_dec, layout.activation(*rest), centred=layout.centred)
    if dict_class == "AutoEncoder":
        norms = sae.W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1.0)  # a row of zeros cannot get norm 1
        if not torch.allclose(norms, torch.ones_like(norms)):
            sae.divide_decoder(norms)
    return sae


def _whole_number(tensor: Tensor) -> int:
    if tensor.numel() != 1 or tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"k in {WEIGHTS} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected an integer."
        )
    return int(tensor)
