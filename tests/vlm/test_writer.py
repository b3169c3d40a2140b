"""The writer: text comes in whole characters, stop texts are held back, and pieces make up the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from helpers import mixed
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm.config import GenerationConfig
from vlm.generation import Writer

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]


def write(
    model: VLM, ids: list[int], stop: tuple[str, ...] = (), longest: int = 1000
) -> tuple[Writer, list[str]]:
    writer = Writer(model, GenerationConfig(stop=stop, max_new_tokens=longest))
    pieces = []
    for token in [*ids, model.language.frame.end]:
        pieces.append(writer.push(token, -0.5))
        if writer.finish_reason:
            break
    return writer, pieces


TEXTS = st.text(st.sampled_from("ab \n\té世🙂\u0301\ufeff."), max_size=14)


@settings(max_examples=300, deadline=None)
@given(
    text=TEXTS,
    stop=st.lists(st.text(st.sampled_from("ab é世🙂."), max_size=3), max_size=3),
    cut=st.integers(1, 40),
)
@example(text="né", stop=["né"], cut=40)  # a stop text that begins before half a character
@example(text="a🙂b", stop=["🙂"], cut=2)  # cut in the middle of a character
@example(text="  \n", stop=[], cut=40)
@example(text="ab a b", stop=["ab", "ab", "b"], cut=40)
def test_pieces_together_are_the_answer(text: str, stop: list[str], cut: int, speaker: VLM) -> None:
    """Whatever the text, the stop texts, and the tokens that they fall into."""
    for ids in (speaker.language.encode_text(text), single_bytes(speaker, text)):
        writer, pieces = write(speaker, ids, tuple(stop), cut)
        assert "".join(pieces) == writer.text
        assert writer.text == writer.text.strip()
        assert not any(mark in writer.text for mark in stop if mark)
        assert writer.count == len(writer.ids) + (
            writer.finish_reason == "stop" and writer.count > len(writer.ids)
        )
        assert writer.logprob == pytest.approx(-0.5 * writer.count)
        assert [t.logprob for t in writer.tokens] == [-0.5] * len(writer.ids)
        whole = speaker.language.decode(writer.ids)
        assert "".join(t.text for t in writer.tokens) == whole
        stops = [mark for mark in stop if mark and mark in whole]
        first = min((whole.index(mark) for mark in stops), default=len(whole))
        assert writer.text == whole[:first].strip()
        if stops:
            assert writer.finish_reason == "stop"
        elif len(writer.ids) < cut:
            assert (writer.finish_reason, whole) == ("stop", text)
        else:
            assert writer.finish_reason == "length"


def single_bytes(model: VLM, text: str) -> list[int]:
    """The text as one token for each byte: characters and stop texts come in pieces."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = bytes_to_unicode()
    return [model.language.tokenizer.convert_tokens_to_ids(table[byte]) for byte in text.encode()]


def test_a_character_comes_when_it_is_whole(speaker: VLM) -> None:
    writer, pieces = write(speaker, single_bytes(speaker, "é🙂!"))
    assert pieces == ["", "é", "", "", "", "🙂", "!", ""]
    assert [t.text for t in writer.tokens] == ["", "é", "", "", "", "🙂", "!"]


def test_what_may_become_a_stop_text_is_held_back(speaker: VLM) -> None:
    writer, pieces = write(speaker, single_bytes(speaker, "one. two. END"), (". END",))
    assert pieces[:5] == ["o", "n", "e", "", ""]
    assert pieces[5] == ". t"
    assert writer.text == "one. two"
    assert writer.finish_reason == "stop"
    # No end token was said: twelve tokens and the one that completed the stop text.
    assert writer.count == len("one. two. END")


def test_half_a_character_at_the_end_is_shown_as_such(speaker: VLM) -> None:
    writer, pieces = write(speaker, single_bytes(speaker, "a🙂")[:-1])
    assert "".join(pieces) == writer.text == "a\ufffd"
    assert writer.finish_reason == "stop"


def test_streaming_equals_asking(tiny_model: VLM, draw: Draw) -> None:
    """Random weights say random bytes: many characters come in halves."""
    halves = 0
    for ask in mixed(draw):
        for stop in ((), ("a", "a", "rt", "\x12")):
            whole = tiny_model.ask_batch([ask], max_new_tokens=20, stop=stop)[0]
            pieces = list(tiny_model.stream(ask, max_new_tokens=20, stop=stop))
            assert "".join(pieces) == whole.text
            assert all(pieces)
            halves += "\ufffd" in whole.text
    assert halves > 2
