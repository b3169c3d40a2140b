"""Packed layers compute what plain ones do, and stand aside where a gradient or another type is asked for."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from vlm.conversation import Conversation
from vlm.packed import PackedLinear, pack

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM


@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (2, 7), (96, 1), (0, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_equals_plain(rows: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 96, bias=bias)
    packed = PackedLinear(plain)
    x = torch.randn(*rows, 48)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x), atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), plain(x), atol=1e-5, rtol=1e-5)


def test_wide_layers_only_and_weights_stay_where_they_were() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 9)), nn.Linear(8, 8))
    before = deepcopy(net.state_dict())
    names = [name for name, _ in net.named_parameters()]
    assert pack(net) == 2
    assert [name for name, _ in net.named_parameters()] == names
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert pack(net) == 0  # a second time finds nothing left


def test_half_precision_is_left_alone() -> None:
    assert pack(nn.Sequential(nn.Linear(8, 16)).bfloat16()) == 0


def test_gradients_go_through_the_plain_weight() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(8, 16)
    packed = PackedLinear(plain)
    x = torch.randn(3, 8, requires_grad=True)
    packed(x).square().sum().backward()
    mine, x.grad = x.grad, None
    plain(x).square().sum().backward()
    assert mine is not None
    assert x.grad is not None
    assert torch.equal(mine, x.grad)


def test_a_packed_model_answers_as_before(tiny_model: VLM, draw: Callable[..., Image.Image]) -> None:
    asked = [Conversation.ask([draw(i) for i in range(n)], "what colour is it?") for n in (1, 2, 1)]

    def answers(model: VLM) -> list[str]:
        return [a.text for n in (1, 3) for a in model.ask_batch(asked, max_new_tokens=6, num_beams=n)]

    def scores(model: VLM) -> torch.Tensor:
        return torch.tensor(model.score(asked, [["red", "a blue one"]] * 3))

    before, likely = answers(tiny_model), scores(tiny_model)
    model = tiny_model.pack()
    assert any(isinstance(module, PackedLinear) for module in model.language.modules())
    assert model.language.head_weight is not None
    assert answers(model) == before
    torch.testing.assert_close(scores(model), likely, atol=1e-4, rtol=0)
