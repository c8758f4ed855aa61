"""What latents mean: the offline judge, AutoInterp against a small local server, meta-SAEs."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from scipy.sparse import csc_array

from c2r_core.errors import NotEvaluable
from c2r_core.metrics.auto_interp import measure_auto_interp
from c2r_core.metrics.detection import measure_detection
from c2r_core.metrics.endpoint import KEY_VARIABLE, Endpoint, EndpointError
from c2r_core.metrics.firings import Firings, drawn_latents
from c2r_core.metrics.meta_sae import measure_meta_sae

N_CONTEXTS, SIZE, VOCABULARY = 300, 24, 40
SECRET = "sk-not-to-be-found-anywhere"


@pytest.fixture(scope="module")
def firings():
    """Latent 0 fires on token 7, latent 1 behind token 5, 2 at random, 3 never, 4 seldom, 5 always."""
    generator = np.random.default_rng(0)
    contexts = generator.integers(VOCABULARY, size=(N_CONTEXTS, SIZE))
    kept = np.ones(contexts.shape, dtype=bool)
    kept[:, 0] = False
    acts = np.zeros((contexts.size, 6), dtype="float32")
    flat = contexts.ravel()
    acts[:, 0] = (flat == 7) * (1 + generator.random(flat.size))
    acts[1:, 1] = (flat[:-1] == 5) * (1 + generator.random(flat.size - 1))
    acts[:, 2] = (generator.random(flat.size) < 0.05) * 1.0
    acts[100:110, 4] = 1.0
    acts[:, 5] = 1.0
    place = np.flatnonzero(kept)
    return Firings(csc_array(acts[place]), contexts, place)


# -- the offline judge -------------------------------------------------------------------------


def test_words_predict_what_fires_on_words_and_nothing_else(firings):
    report = measure_detection(firings, n_latents=10)
    by_latent = {row.latent: row for row in report.latents}
    assert set(by_latent) == {0, 1, 2, 5}  # of 3 and 4 there are too few firings
    assert by_latent[0].score == 1.0 and by_latent[0].tokens[0] == 7
    assert by_latent[1].score > 0.75 and by_latent[1].tokens[0] == -1 - 5
    assert abs(by_latent[2].score - 0.5) < 0.2
    assert abs(by_latent[0].shuffled - 0.5) < 0.25
    assert "too close together or too many" in by_latent[5].not_evaluable
    assert report.n_evaluated == 3 and report.n_often_enough == 4
    assert report.low < report.mean_score < report.high


def test_scale_and_seed(firings):
    scaled = replace(firings, acts=csc_array(firings.acts * 7.5))
    assert measure_detection(scaled) == measure_detection(firings)
    assert measure_detection(firings, seed=1) != measure_detection(firings)


def test_the_numbering_of_latents_does_not_matter(firings):
    order = [5, 0, 4, 2, 1, 3]
    one = measure_detection(firings, n_latents=2)
    other = measure_detection(replace(firings, acts=firings.acts[:, order]), n_latents=2)
    assert [order[row.latent] for row in other.latents] == [row.latent for row in one.latents]
    assert other.mean_score == one.mean_score and other.mean_shuffled == one.mean_shuffled


def test_a_dead_dictionary_has_nothing_to_judge(firings):
    dead = replace(firings, acts=csc_array(firings.acts.shape))
    with pytest.raises(NotEvaluable, match="No latent fires on 30"):
        measure_detection(dead)
    assert len(drawn_latents(firings, 2, 30, seed=0)) == 2


# -- looking at a latent -----------------------------------------------------------------------


class Tokenizer:
    def decode(self, ids):
        return f" w{ids[0]}"


def test_examples_are_the_strongest_the_middle_and_the_near_misses(firings):
    acts = firings.acts.toarray()
    sevens = np.flatnonzero(firings.contexts.ravel()[firings.place] == 7)
    silent = sevens[:3]
    acts[silent, 0] = 0.0
    firings = replace(firings, acts=csc_array(acts))
    found = firings.examples(0, Tokenizer(), n=3)
    values = acts[:, 0][acts[:, 0] > 0]
    assert found.n_firings == len(sevens) - 3 and found.density == len(values) / len(acts)
    assert max(found.top[0].acts) == values.max()
    for context in (*found.top, *found.middle):
        assert context.tokens[context.position] == " w7" and context.acts[context.position] > 0
        assert "« w7»" in str(context) and len(context.tokens) <= 21
    assert found.middle[0].acts[found.middle[0].position] == pytest.approx(
        np.median(values), abs=0.1
    )
    assert 1 <= len(found.near_misses) <= 3
    for context in found.near_misses:
        assert context.tokens[context.position] == " w7" and context.acts[context.position] == 0
        assert "[ w7]" in str(context)
    assert str(found).count("\n") == 3 + len(found.top + found.middle + found.near_misses)


def test_a_latent_that_never_fires_has_no_examples(firings):
    found = firings.examples(3, Tokenizer())
    assert (found.n_firings, found.top, found.middle, found.near_misses) == (0, (), (), ())
    assert "fires on 0 tokens" in str(found)


# -- AutoInterp --------------------------------------------------------------------------------


def explain(question):
    """The word that is marked in every excerpt."""
    marked = [set(re.findall(r"« (w\d+)»", line)) for line in question.splitlines()]
    return "the word " + " or ".join(sorted(set.intersection(*marked))) if marked else ""


def judge(question):
    """The excerpts with that word."""
    word = re.search(r"the word (w\d+)", question)
    lines = question.split("\n\n")[1].splitlines()
    found = [line.split(".")[0] for line in lines if word and re.search(rf"\b{word[1]}\b", line)]
    return ", ".join(found) or "none"


class Server(ThreadingHTTPServer):
    """Plays explainer and judge; counts requests, and does what it is told instead of answering."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.keys, self.faults = [], [], []
        self.judge, self.key = judge, None
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        fault = self.server.faults.pop(0) if self.server.faults else None
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            fault = 401
        if fault == "hang":
            threading.Event().wait(1.5)
        if fault == "echo":
            said = json.dumps({"error": {"message": self.headers["Authorization"]}})
            return self.reply(400, said.encode())
        if isinstance(fault, int):
            return self.reply(fault, b'{"error": {"message": "no"}}')
        if fault == "not json":
            return self.reply(200, b"<html>hello</html>", "text/html")
        system, user = (message["content"] for message in body["messages"])
        text = explain(user) if "Say in one short line" in system else self.server.judge(user)
        choice = {"index": 0, "finish_reason": "stop"}
        choice["message"] = {"role": "assistant", "content": text}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        self.reply(200, json.dumps(answer | {"choices": [choice]}).encode())

    def reply(self, status, content, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def endpoint(server, tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return Endpoint(server.url, "m", 1e6, parallel=1, retries=0, folder=tmp_path / "answers")


def only(firings, *latents):
    """The same text, with these latents alone."""
    return replace(firings, acts=firings.acts[:, list(latents)])


def interpret(firings, endpoint):
    return measure_auto_interp(firings, Tokenizer(), endpoint, n_latents=10)


def test_a_latent_that_fires_on_a_word_is_explained_and_predicted(firings, endpoint, server):
    report = interpret(only(firings, 0), endpoint)
    (row,) = report.latents
    assert row.explanation == "the word w7" and row.score == 1.0
    assert len(server.requests) == 2 and report.autointerp_score == 1.0
    to_explain, to_judge = (body["messages"][1]["content"] for body in server.requests)
    assert len(to_explain.splitlines()) == 15 and "«" not in to_judge
    assert len(to_judge.split("\n\n")[1].splitlines()) == 14
    shown = {
        line.split(". ", 1)[1].replace("«", "").replace("»", "") for line in to_explain.splitlines()
    }
    assert not shown & {line.split(". ", 1)[1] for line in to_judge.split("\n\n")[1].splitlines()}


def test_saying_none_is_right_where_it_does_not_fire(firings, endpoint, server):
    server.judge = lambda question: "None."
    (row,) = interpret(only(firings, 0), endpoint).latents
    assert row.score <= 10 / 14


def test_nonsense_is_a_record_and_others_go_on(firings, endpoint, server):
    server.judge = lambda q: "I like turtles" if "w7" in q.partition("\n")[0] else "none"
    report = interpret(only(firings, 0, 2), endpoint)
    (row,) = (row for row in report.latents if row.latent == 0)
    assert "turtles" in row.not_evaluable and row.score is None
    assert report.num_latents == len(report.latents) - 1
    for i, nonsense in enumerate(("1, 99", "I found 3 of them", "", "1 2 3 none")):
        server.judge = lambda q, answer=nonsense: answer
        fresh = replace(endpoint, model=f"another {i}")
        with pytest.raises(NotEvaluable, match="None of the 1 latents.*neither numbers nor none"):
            interpret(only(firings, 0), fresh)


def test_seldom_latents_are_not_asked_about(firings, endpoint, server):
    report = interpret(only(firings, 5), endpoint)
    assert report.num_latents == 1  # always on: excerpts are there, though they say nothing
    with pytest.raises(NotEvaluable, match="No latent fires on 19"):
        interpret(only(firings, 4), endpoint)


def test_what_was_answered_is_not_asked_again(firings, endpoint, server):
    first = interpret(only(firings, 0, 1), endpoint)
    n = len(server.requests)
    assert interpret(only(firings, 0, 1), endpoint) == first and len(server.requests) == n
    interpret(only(firings, 0, 1), replace(endpoint, model="another"))
    assert len(server.requests) == 2 * n


def test_a_run_that_broke_off_goes_on_where_it_stopped(firings, endpoint, server):
    server.faults = [None, None, 500]
    with pytest.raises(EndpointError, match="status 500"):
        interpret(only(firings, 0, 1), endpoint)
    assert len(server.requests) == 3
    report = interpret(only(firings, 0, 1), endpoint)
    assert len(server.requests) == 5 and report.num_latents == 2


def test_a_passing_fault_is_tried_again(firings, endpoint, server):
    server.faults = [503]
    report = interpret(only(firings, 0), replace(endpoint, retries=1))
    assert report.num_latents == 1 and len(server.requests) == 3


def test_the_key_is_sent_and_kept_nowhere(firings, endpoint, server, monkeypatch):
    server.key = SECRET
    with pytest.raises(EndpointError, match=f"{KEY_VARIABLE} is missing"):
        interpret(only(firings, 0), endpoint)
    monkeypatch.setenv(KEY_VARIABLE, "wrong")
    with pytest.raises(EndpointError, match="was refused") as caught:
        interpret(only(firings, 0), replace(endpoint))
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    assert interpret(only(firings, 0), replace(endpoint)).num_latents == 1
    assert server.keys[-1] == f"Bearer {SECRET}"
    files = [file for file in endpoint.folder.rglob("*") if file.is_file()]
    assert len(files) == 2 and all(SECRET not in file.read_text() for file in files)
    assert SECRET not in repr(endpoint)
    server.faults = ["echo"]
    with pytest.raises(EndpointError, match=r"\*\*\*") as caught:
        interpret(only(firings, 1), replace(endpoint))
    assert SECRET not in str(caught.value)


def test_what_does_not_answer_or_does_not_exist(firings, endpoint, server):
    server.faults = ["hang"]
    with pytest.raises(EndpointError, match=r"did not answer within 0.3 s, 1 times"):
        interpret(only(firings, 0), replace(endpoint, timeout=0.3))
    with pytest.raises(EndpointError, match="cannot be reached"):
        interpret(only(firings, 0), replace(endpoint, url="http://127.0.0.1:9/v1"))
    server.faults = [404]
    with pytest.raises(EndpointError, match="status 404 for model 'm'"):
        interpret(only(firings, 0), endpoint)
    server.faults = ["not json"]
    with pytest.raises(EndpointError, match="does not speak the chat-completions protocol"):
        interpret(only(firings, 0), endpoint)
    assert interpret(only(firings, 0), endpoint).num_latents == 1  # no blank was kept
    with pytest.raises(ValueError, match="starts with http"):
        Endpoint("localhost", "m")
    with pytest.raises(ValueError, match="No model is named"):
        Endpoint(server.url, "")


def test_requests_keep_their_pace(firings, endpoint):
    now, slept = [0.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    paced = replace(endpoint, requests_per_minute=30, clock=lambda: now[0], sleep=sleep)
    interpret(only(firings, 0, 1), paced)
    assert slept == pytest.approx([2.0, 2.0, 2.0])  # four requests, two seconds apart


@pytest.mark.parametrize(
    "wrong", [{"requests_per_minute": 0}, {"parallel": 0}, {"timeout": 0}, {"retries": -1}]
)
def test_a_pace_that_is_not_positive_is_refused(wrong):
    with pytest.raises(ValueError, match="parallel and timeout must be positive"):
        Endpoint("http://localhost", "m", **wrong)


def test_threads_share_one_pace(endpoint, server):
    """Requests that start together leave one after the other."""
    server.judge = lambda question: "none"
    slept, lock = [], threading.Lock()

    def sleep(seconds):
        with lock:
            slept.append(seconds)

    paced = replace(endpoint, requests_per_minute=30, clock=lambda: 0.0, sleep=sleep, parallel=8)
    threads = [threading.Thread(target=paced.ask, args=("", f"{i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slept) == pytest.approx([2.0 * i for i in range(1, 8)])
    assert isinstance(EndpointError("no"), NotEvaluable), "an endpoint that fails is a record"


# -- meta-SAE ----------------------------------------------------------------------------------


def test_composed_rows_are_rebuilt_and_random_ones_no_better_than_random():
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator), dim=1)
    chosen = torch.rand(512, 40, generator=generator).topk(3, dim=1).indices
    composed = atoms[chosen].sum(1)
    report = measure_meta_sae(composed, steps=400)
    assert (report.n_rows, report.d_meta) == (512, 128)
    assert report.explained_variance > 0.85
    assert report.explained_variance > report.random_explained_variance + 0.2
    isotropic = measure_meta_sae(torch.randn(512, 64, generator=generator), steps=400)
    assert abs(isotropic.explained_variance - isotropic.random_explained_variance) < 0.05


def test_meta_sae_of_rescaled_rows_and_bad_rows():
    rows = torch.randn(128, 32, generator=torch.Generator().manual_seed(0))
    scaled = rows * torch.linspace(0.1, 9, 128)[:, None]
    one, other = (measure_meta_sae(r, steps=30) for r in (rows, scaled))
    assert one.explained_variance == pytest.approx(other.explained_variance, abs=1e-3)
    assert measure_meta_sae(rows, steps=30) == one
    with pytest.raises(NotEvaluable, match="10 decoder rows are not zero"):
        measure_meta_sae(torch.cat([rows[:10], torch.zeros(200, 32)]))
    with pytest.raises(NotEvaluable, match="NaN"):
        measure_meta_sae(torch.full((128, 32), torch.nan))
