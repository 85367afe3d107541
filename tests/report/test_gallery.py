"""The panels of held-out examples."""

import base64
import io
import wave
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.evaluators.retrieval import recall
from mmjax.modalities.base import Input
from mmjax.modalities.image import Image, ImageInput
from mmjax.objectives.base import Embeds
from mmjax.report.gallery import Candidates, answers, gallery, read_candidates
from mmjax.report.html import text
from mmjax.report.panel import credit_line, task_section

Parse = Callable[[str], Any]
EVIL = "<script>alert(1)</script>"
QUOTES = "\"'><img src=x onerror=alert(2)>&amp;\x00\x1b[2J\ud800"


class _Examples(list[Any]):
    description, credits = "made", ("By <i>someone</i>.",)

    def __getitem__(self, index: Any) -> Any:
        example = super().__getitem__(index)
        if example is None:
            raise ValueError("corrupt")
        return example


class _Objective(Embeds):
    """Embeds two modalities."""

    def __init__(self, pair: tuple[str, str]) -> None:
        self._pair = pair

    def embeds(self) -> tuple[str, ...]:
        return self._pair

    def embed(self, model: Any, modality: str, arrays: Any, relative_to: str = "") -> Any:
        raise AssertionError("the model is a stand-in")


def _task(pair: tuple[str, str]) -> Any:
    """Return a task that embeds two modalities, of which nothing but their values is known."""
    inputs = {
        m: Input(m, SimpleNamespace(raw=lambda v: v, preprocess=lambda s, v, r: {}, sample_rate=8000,
                                    arrays=lambda s: {}), SimpleNamespace(field=m))
        for m in pair
    }  # fmt: skip
    return SimpleNamespace(name=EVIL, inputs=inputs, objective=_Objective(pair))


def _one_hot_model(pair: tuple[str, str], size: int) -> Any:
    """Give every value the vector of its place; so each finds itself first."""

    def embed(task: str, **values: list[Any]) -> np.ndarray:
        ((_, items),) = values.items()
        return np.eye(size)[np.arange(len(items)) % size]

    return SimpleNamespace(embed=embed)


def test_sounds_with_hostile_words(parse: Parse) -> None:
    sounds = [np.sin(np.arange(800) * (0.1 + 0.01 * i)) for i in range(20)]
    examples = _Examples(
        {"sound": s, "text": f"{EVIL} {QUOTES} {i}", "concept": i} for i, s in enumerate(sounds)
    )
    examples.insert(5, None)
    task = _task(("sound", "text"))
    candidates = read_candidates(examples, task, "concept")
    assert candidates.unreadable == 1 and len(candidates.concept) == 20
    panel = gallery(_one_hot_model(("sound", "text"), 256), task, candidates, EVIL, "text", 12)
    made = task_section(text(EVIL), [panel]) + (credit_line([panel, panel]) or "")
    page = parse(made)
    page.assert_is_harmless()
    assert EVIL not in made
    players = page.all("audio")
    assert len(players) == 12 + 12 * 5
    assert all(EVIL in p["aria-label"] and "controls" in p for p in players)
    data = base64.b64decode(players[0]["src"].removeprefix("data:audio/wav;base64,"))
    with wave.open(io.BytesIO(data)) as file:
        assert file.getframerate() == 8000
    spectra = [p for p in page.all("img") if p.get("class") == "spectrum"]
    assert len(spectra) == len(players) and len({p["src"] for p in spectra}) > 10
    # Each finds itself, first.
    assert "12 of 12 have a right one among the 5 nearest of 20." in page.text
    assert f"{EVIL}: 21 held-out examples; 1 could not be read" in page.text
    assert page.text.count("By <i>someone</i>.") == 1


def test_an_odd_held_out_example_is_counted_and_ends_no_report() -> None:
    good = {"image": np.zeros((8, 8, 3), np.uint8), "text": "t", "concept": 1}
    odd = [
        {"image": np.zeros((8, 8, 2), np.uint8)},
        {"concept": 2.5},
        {"concept": None},
        {"concept": 2**40},
    ]
    examples = _Examples([good, *({**good, **change} for change in odd), good])
    task = _task(("text", "image"))
    task.inputs["image"] = Input("image", Image(), ImageInput())
    candidates = read_candidates(examples, task, "concept")  # type: ignore[arg-type]
    assert candidates.unreadable == 4 and candidates.concept.tolist() == [1, 1]


def test_heavy_panels_show_fewer(parse: Parse) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, (12, 48_000))
    values = {"sound": list(noise), "text": [f"noise {i}" for i in range(12)]}
    candidates = Candidates(values, np.arange(12), 0, 12, ())
    made = gallery(
        _one_hot_model(("sound", "text"), 256), _task(("sound", "text")), candidates, "t", "", 12
    ).body
    count = len(parse(made).all("audio"))
    # A sound is 128 kB in base64: 12 queries fit into 2 MB; of the texts with five sounds each, 2.
    assert count == 12 + 2 * 5 and len(made) < 4_500_000


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.booleans(), st.booleans())
def test_answers_are_the_nearest_and_agree_with_the_recall(
    seed: int, count: int, has_ties: bool, has_nan: bool
) -> None:
    rng = np.random.default_rng(seed)
    concept = rng.integers(0, max(count // 2, 1), count)
    queries, candidates = rng.normal(size=(2, count, 3))
    if has_ties:
        queries, candidates = queries.round(), candidates.round()
    if has_nan:
        queries[0] = np.nan
    every = list(range(count))
    made = answers(queries, candidates, every, every, concept)
    similarity = queries @ candidates.T
    for i, answer in enumerate(made):
        assert answer.query == i and len(answer.ranking) == min(5, count) == len(
            set(answer.ranking)
        )
        if np.isnan(similarity[i]).any():
            continue
        worst = min(similarity[i, j] for j in answer.ranking)
        assert all(similarity[i, j] <= worst for j in every if j not in answer.ranking)
        assert answer.right == [bool(concept[i] == concept[j]) for j in answer.ranking]
    positive = concept[:, None] == concept[None, :]
    for k, wanted in zip((1, 5, 10), recall(similarity, positive, (1, 5, 10)), strict=True):
        assert np.mean([(a.place or 10**9) <= k for a in made]) == pytest.approx(wanted)
