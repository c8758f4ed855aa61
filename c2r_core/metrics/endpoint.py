"""Any OpenAI-compatible endpoint, asked at a bounded rate; every answer is kept on disk.

What was answered once is never asked again, so that a run that was killed goes on where it stopped, and
another run of the same evaluation costs nothing and gives the same report.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from c2r_core.artefacts.fields import from_json
from c2r_core.artefacts.files import whole_file
from c2r_core.artefacts.paths import cache_dir
from c2r_core.errors import NotEvaluable

if TYPE_CHECKING:
    from openai import OpenAI

KEY_VARIABLE = "C2R_API_KEY"
SHORTEST_KEY = 8
"""What is shorter is no secret, such as the "none" that a local server is given; it may well be an answer."""


class EndpointError(NotEvaluable):
    """The endpoint cannot be used: asking it again now would not help."""


@dataclass
class _Shared:
    """What all threads that ask one endpoint share, under one lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    next_turn: float = -float("inf")
    client: OpenAI | None = None


@dataclass(frozen=True)
class Endpoint:
    """A language model behind a URL.

    Parameters
    ----------
    url : str
        Such as `http://localhost:8000/v1`.
    model : str
        Its name there.
    requests_per_minute : float
        Requests begin no faster than this.
    parallel : int
        Requests on the way at the same time.
    timeout : float
        Seconds that one request may take.
    retries : int
        Further attempts at a request that failed for a passing reason.
    folder : Path, optional
        Where answers are kept; by default in the cache.
    clock, sleep : callable
        Of the pace; tests put in their own.

    The key is read from the environment variable C2R_API_KEY and written nowhere. A url that holds a user or
    a password is refused, since messages show it.
    """

    url: str
    model: str
    requests_per_minute: float = 60
    parallel: int = 4
    timeout: float = 60
    retries: int = 3
    folder: Path | None = None
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)
    # Made with the endpoint, before there are threads that could make two of it.
    _shared: _Shared = field(default_factory=_Shared, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"The endpoint is {self.url!r}; expected an address that starts with http."
            )
        if "@" in urlsplit(self.url).netloc:
            raise ValueError(
                f"The endpoint's address holds a user or a password; set {KEY_VARIABLE} instead."
            )
        if not self.model:
            raise ValueError(f"No model is named for the endpoint {self.url}; give its name there.")
        if min(self.requests_per_minute, self.parallel, self.timeout) <= 0 or self.retries < 0:
            raise ValueError(
                "requests_per_minute, parallel and timeout must be positive, and retries not negative: "
                f"{self}."
            )

    def ask(self, instruction: str, question: str, *, max_tokens: int = 200) -> str:
        """The model's answer at temperature 0; from disk if it was asked before.

        Raises
        ------
        EndpointError
            If the endpoint needs another key, has no such model, cannot be reached, or still fails after
            all retries. What was answered before is kept.
        OSError
            If the answer cannot be kept.
        """
        request = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": instruction},
                {"role": "user", "content": question},
            ],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        text = json.dumps({"url": self.url, **request}, sort_keys=True)
        address = hashlib.sha256(text.encode()).hexdigest()
        file = (self.folder or cache_dir() / "answers") / address[:2] / f"{address[2:24]}.json"
        if known := _kept_answer(file):
            return known
        self._wait_for_turn()
        # Without what UTF-8 cannot hold, and the key: a server may repeat it.
        answer = _without_key(self._request(request).encode(errors="replace").decode())
        if not answer:
            return answer  # not kept: another time it may have something to say
        kept = json.dumps(request | {"answer": answer}, indent=1, ensure_ascii=False)
        with whole_file(file) as part:
            part.write_text(kept, encoding="utf-8")
        return answer

    def _request(self, request: dict) -> str:
        import openai

        try:
            answer = self._client().chat.completions.create(**request).choices[0].message.content
            if not isinstance(answer or "", str):
                raise TypeError(f"the answer is a {type(answer).__name__}, not text")
            return answer or ""
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            known = "was refused" if _key() else "is missing"
            raise EndpointError(
                f"{self.url} wants a key, and the one in {KEY_VARIABLE} {known}. Set it and run again."
            ) from error
        except openai.APITimeoutError as error:
            raise EndpointError(
                f"{self.url} did not answer within {self.timeout:g} s, {self.retries + 1} times. Give it "
                "more time, or run again later: what was answered is kept."
            ) from error
        except openai.APIConnectionError as error:
            raise EndpointError(
                f"{self.url} cannot be reached ({_shortly(error.__cause__ or error)}). Is it running?"
            ) from error
        except openai.APIStatusError as error:
            raise EndpointError(
                f"{self.url} answered with status {error.status_code} for model {self.model!r}: "
                f"{_shortly(error)}. What was answered before is kept."
            ) from error
        except (
            openai.OpenAIError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:  # the client takes an answer as it comes
            raise EndpointError(
                f"{self.url} does not speak the chat-completions protocol ({type(error).__name__}: "
                f"{_shortly(error)}). Does the address end in /v1?"
            ) from error

    def _client(self) -> OpenAI:
        from openai import OpenAI

        with self._shared.lock:
            if self._shared.client is None:
                self._shared.client = OpenAI(
                    base_url=self.url,
                    api_key=_key() or "none",
                    timeout=self.timeout,
                    max_retries=self.retries,
                )
            return self._shared.client

    def _wait_for_turn(self) -> None:
        with self._shared.lock:
            now = self.clock()
            turn = max(now, self._shared.next_turn)
            self._shared.next_turn = turn + 60 / self.requests_per_minute
        if turn > now:
            self.sleep(turn - now)


def _kept_answer(file: Path) -> str:
    """What a file of an earlier answer holds; "" if there is none or it is damaged, to be asked again."""
    try:
        answer = from_json(file.read_bytes())["answer"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return answer if isinstance(answer, str) else ""


def _key() -> str:
    """The key, without the end of its line: an error about that would show it."""
    return os.environ.get(KEY_VARIABLE, "").strip()


def _without_key(text: str) -> str:
    key = _key()
    return text.replace(key, "***") if len(key) >= SHORTEST_KEY else text


def _shortly(error: BaseException) -> str:
    """The beginning of an error's text, without the key."""
    return _without_key(str(error))[:200]
