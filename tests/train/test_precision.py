"""`precision: auto`: bfloat16 where the processor multiplies it, else float32."""

from __future__ import annotations

import time

import pytest
import torch

from vlm.train.precision import in_bf16, multiplies_bf16

CPU = torch.device("cpu")


def test_what_a_recipe_names_is_obeyed() -> None:
    assert in_bf16("bf16", CPU)
    assert not in_bf16("float32", CPU)
    assert in_bf16("auto", CPU) == multiplies_bf16(CPU)


@pytest.mark.parametrize(
    "has, chosen",
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
    ],
)
def test_what_processors_say_of_themselves(
    has: dict[str, object], chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert in_bf16("auto", CPU) is chosen
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not in_bf16("auto", CPU), "torch's own bfloat16 products are slow"


def test_a_torch_that_cannot_tell_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not in_bf16("auto", CPU)


def test_the_choice_is_the_faster_one_here() -> None:
    """Products of the shipped language model's sizes in both: what is chosen is no slower."""
    seconds = {narrow: min(_product(narrow) for _ in range(5)) for narrow in (False, True)}
    chosen = in_bf16("auto", CPU)
    assert seconds[chosen] < 1.3 * seconds[not chosen], seconds


def _product(narrow: bool) -> float:
    kind = torch.bfloat16 if narrow else torch.float32
    states, weight = torch.randn(768, 576, dtype=kind), torch.randn(576, 1536, dtype=kind)
    began = time.perf_counter()
    (states @ weight) @ weight.T
    return time.perf_counter() - began
