"""Dataclasses of tensors and JSON's values that are written to a folder and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from c2r_core.artefacts.fields import from_json, from_values
from c2r_core.artefacts.files import whole_folder
from c2r_core.errors import NotEvaluable

_FORMAT_VERSION = 1


class Record:
    """Base of a dataclass whose fields are tensors, numbers, texts, or tuples of the latter two."""

    FILES: ClassVar[str]
    """Name of its two files, without their endings."""

    def save(self, folder: Path | str) -> None:
        """Write FILES.safetensors and FILES.json into a folder, replacing it as a whole.

        NotEvaluable, and nothing is written, if a number outside of tensors is NaN or infinite: `load` would
        refuse it.
        """
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        others = {name: value for name, value in vars(self).items() if name not in tensors}
        for name, value in others.items():
            try:
                json.dumps(value, allow_nan=False)
            except ValueError as error:
                raise NotEvaluable(
                    f"{type(self).__name__}.{name} is {value}; expected a number, not NaN or infinite. "
                    "Check what it was computed from: are the language model's weights sound?"
                ) from error
        text = json.dumps({"format_version": _FORMAT_VERSION, **others})
        with whole_folder(folder) as part:
            save_file(tensors, part / f"{self.FILES}.safetensors")
            (part / f"{self.FILES}.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read what `save` wrote.

        FileNotFoundError if the folder lacks one of the files, ValueError if they are in another format,
        cannot be read, or do not hold the fields, each of its type; the message names the file or folder.
        """
        tensors, others = (
            Path(folder) / f"{cls.FILES}{kind}" for kind in (".safetensors", ".json")
        )
        for file in (others, tensors):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{folder} has no {file.name}; expected a folder written by {cls.__name__}.save."
                )
        file = others
        try:
            values = dict(from_json(others.read_bytes()))
            file = tensors
            values |= load_file(tensors)
        except (ValueError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"{file} is damaged ({error}). Delete {folder} and make it anew."
            ) from error
        version = values.pop("format_version", None)
        if version != _FORMAT_VERSION:
            raise ValueError(
                f"{folder} holds a {cls.__name__} of format {version}; this code reads {_FORMAT_VERSION}. "
                "Make it anew."
            )
        try:
            return from_values(cls, values)
        except ValueError as error:
            raise ValueError(
                f"{folder} does not hold a whole {cls.__name__} ({error}). Delete it and make it anew."
            ) from error
