"""Nothing mixes devices: the whole model runs on a pretended GPU, with the values that a CPU gives.

A pretended tensor says that it lies on `cuda`, holds its values on the CPU, and refuses to meet a tensor
that really lies on the CPU, as the hardware would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from vlm.answering import shown
from vlm.conversation import Conversation

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

Draw = Callable[..., "Image.Image"]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COPIES = {"_to_copy", "copy_", "to"}


class OnGPU(torch.Tensor):
    """Values on the CPU behind the face of a CUDA tensor."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> OnGPU:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=GPU,
            requires_grad=False,
        )
        made.inside = inside
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        """Copies to the CPU by itself, as a CUDA tensor's does."""
        return self.inside.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("used outside of the pretence")


class PretendedGPU(TorchDispatchMode):
    """Runs every operation on the CPU and keeps account of where its results would lie."""

    def __init__(self) -> None:
        super().__init__()
        # Torch looks for a driver before the first CUDA tensor, unless the mode is of this kind.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        torch._C._ensureCUDADeviceGuardSet()

    def __enter__(self) -> Any:
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) passes by here too
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.before)
        super().__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._fused_sdp_choice.default:
            return 0  # the plain form of attention
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, OnGPU)]
        # A number of no axes may come from the CPU; anything else may not.
        strangers = [x for x in tensors if not isinstance(x, OnGPU) and x.ndim > 0]
        index = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
        if (
            there
            and strangers
            and func.overloadpacket.__name__ not in COPIES
            and not (index and isinstance(args[0], OnGPU))
        ):
            raise RuntimeError(
                f"{func} mixes devices: {[(type(x).__name__, tuple(x.shape)) for x in tensors]}"
            )
        named = [x for x in flat if isinstance(x, torch.device)]
        on_gpu = any(x.type == "cuda" for x in named) if named else bool(there)
        if func is torch.ops.aten.copy_.default:
            on_gpu = isinstance(args[0], OnGPU)
        bare = tree_map(_bare, (args, kwargs))
        out = func(*bare[0], **bare[1])
        if func._schema.is_mutable:
            return args[0] if isinstance(out, Tensor) else out
        if not on_gpu:
            return out
        return tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, out)


def _bare(x: Any) -> Any:
    if isinstance(x, torch.device):
        return CPU
    return x.inside if isinstance(x, OnGPU) else x


def move(module: nn.Module) -> None:
    """Every parameter and buffer to the pretended GPU."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(OnGPU(parameter.detach()), parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = OnGPU(buffer)


def values(tensor: Tensor) -> Tensor:
    """What a pretended tensor holds."""
    found = tensor.detach()
    assert isinstance(found, OnGPU), "this would lie on the CPU"
    return found.inside


@pytest.fixture
def pretended() -> Iterator[PretendedGPU]:
    with PretendedGPU() as mode:
        yield mode


@pytest.fixture(params=["flamingo", "qformer", "qformer-asked"])
def pair(request: pytest.FixtureRequest, make_tiny: Callable[..., VLM]) -> tuple[VLM, VLM]:
    """Two models of one seed, one of which moves."""
    adapter, _, asked = request.param.partition("-")
    sizes = {"question_aware": True} if asked else {}
    return make_tiny(adapter, **sizes), make_tiny(adapter, **sizes)


def asks(draw: Draw) -> list[Conversation]:
    return [
        Conversation.ask([draw(1), draw(2)], "what is it?"),
        Conversation.ask([], "hello"),
        Conversation.ask([draw(3)], "where?"),
    ]


def test_the_pretence_notices(pretended: PretendedGPU) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.device == GPU
    with pytest.raises(RuntimeError, match="mixes devices"):
        here + there
    with pytest.raises(RuntimeError, match="mixes devices"):
        torch.where(there > 0, there, here)
    assert torch.equal(values(there + there), torch.full((3,), 2.0))
    assert torch.equal(there.cpu() + here, torch.full((3,), 2.0))
    there.mul_(3)
    assert there.tolist() == [3, 3, 3]


def test_forward_and_loss(pair: tuple[VLM, VLM], draw: Draw) -> None:
    """The fused loss takes its gradient on the way; autograd's own engine wants a real device."""
    here, there = pair
    rows, parts = [], []
    for ask, answer in zip(asks(draw), ("a dog", "no", "on the grass"), strict=True):
        row, part = shown(here, ask, [answer])
        rows.append(row)
        parts.append(part)
    batch = here.processor.batch(rows)
    features = torch.cat(parts)
    logits = here(batch, features)
    loss, weight = here.loss(batch, features, 0.1)
    with PretendedGPU():
        move(there)
        assert there.device == GPU
        moved, seen = batch.to(there.device), features.to(there.device)
        torch.testing.assert_close(values(there(moved, seen)), logits, atol=1e-3, rtol=1e-3)
        for there.fused_loss in (True, False):
            other, other_weight = there.loss(moved, seen, 0.1)
            torch.testing.assert_close(values(other), loss.detach(), atol=1e-3, rtol=1e-3)
            assert float(other_weight) == float(weight)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0, "seed": 1, "top_p": 0.9}, {"num_beams": 3}],
    ids=["greedy", "sampled", "beams"],
)
def test_generation(options: dict[str, Any], pair: tuple[VLM, VLM], draw: Draw) -> None:
    here, there = pair
    expected = here.ask_batch(asks(draw), max_new_tokens=5, **options)
    with PretendedGPU(), torch.inference_mode():
        move(there)
        answers = there.ask_batch(asks(draw), max_new_tokens=5, **options)
        if "num_beams" not in options:
            pieces = list(there.stream(asks(draw)[0], max_new_tokens=5, **options))
            assert "".join(pieces) == expected[0].text
    for mine, theirs in zip(expected, answers, strict=True):
        assert theirs.text == mine.text
        assert theirs.logprob == pytest.approx(mine.logprob, abs=1e-2)


def test_scores_and_batches_that_rows_join(pair: tuple[VLM, VLM], draw: Draw) -> None:
    from vlm.generation import DecodeBatch, DecodeRequest

    here, there = pair
    candidates = [["a dog", "no"]] * 3
    expected = here.score(asks(draw), candidates)
    with PretendedGPU(), torch.inference_mode():
        move(there)
        found = there.score(asks(draw), candidates)
        batch = DecodeBatch(there)
        for ask in asks(draw):
            batch.add([DecodeRequest(*shown(there, ask))])
            assert len(batch.step()) == len(batch)
        batch.remove(1)
        assert {event.slot for event in batch.step()} == {0, 2}
    for mine, theirs in zip(expected, found, strict=True):
        assert theirs == pytest.approx(mine, abs=1e-2)
