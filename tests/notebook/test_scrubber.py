"""A slider over the steps of a record, and what there is without the library that draws it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.replay.test_replay import recorded
from trio_llm.notebook.scrubber import scrub, view
from trio_llm.replay import Replay


@pytest.fixture
def replay(tmp_path: Path) -> Replay:
    """Open the record of a random run."""
    return Replay.open(recorded().save(tmp_path / "a.record"))


def test_the_slider_moves_the_replay(replay: Replay) -> None:
    """It goes from the start to the last step, and shows the step where it is."""
    scrubber = scrub(replay)
    slider, shown = scrubber.children
    assert (slider.min, slider.max, slider.value) == (replay.first_step - 1, replay.last_step, replay.step)
    assert scrubber._repr_mimebundle_()["text/html"] == shown.value
    slider.value = replay.last_step - 3
    assert replay.step == replay.last_step - 3
    assert f"after step {replay.step}," in shown.value and "<svg" in shown.value and "BlockGrant" in shown.value


def test_without_the_library_the_step_is_shown(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain figure takes the place of the slider, and a line where there is no HTML."""
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    replay.at(5)
    plain = scrub(replay)
    assert plain._repr_html_() == view(replay).html and "<svg" in plain._repr_html_()
    assert repr(plain).startswith("<after step 5, at ")
