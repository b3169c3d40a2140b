"""The frozen language model divided among processes (FSDP2): what `accelerate launch --use_fsdp` means here.

Of a mostly frozen network the frozen layers are what fills a card. Their matrices are cut in pieces, one a
process, gathered layer by layer where they are used (forward, and again backward), and let go. The adapter
moves and is small: every process holds it whole, and its gradients are summed as without FSDP. So a run's
losses, states and adapter are those of plain data parallelism (Zhao et al. 2023, PyTorch FSDP).

Embeddings stay whole too: the fused loss reads them as the vocabulary projection, outside of any layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from torch import nn

from vlm.errors import ConfigError
from vlm.model import VLM
from vlm.train.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def shard(model: VLM, config: TrainConfig, accelerator: Accelerator) -> bool:
    """Divides the language model's layers where accelerate was told to; returns whether it did.

    From then on every process must make the same number of passes through the language model.

    Raises:
        ConfigError: FSDP1, or a recipe that reads the layers in another way than pass by pass.
    """
    plugin = _plugin(accelerator)
    if plugin is None or accelerator.num_processes == 1 or config.objective == "words":
        return False
    _check(plugin, config)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": plugin.reshard_after_forward}
    settings["offload_policy"] = plugin.cpu_offload
    language = model.language
    for layer in language.layers:
        fully_shard(layer, ignored_params=_small(layer), **settings)
    # The body holds its layers together, so that the next one is gathered while this one computes.
    inside = {p for layer in language.layers for p in layer.parameters()}
    outside = {p for p in language.body.parameters() if p not in inside}
    fully_shard(language.body, ignored_params=outside | _small(language.body), **settings)
    return True


def _plugin(accelerator: Accelerator) -> Any:
    """How accelerate was told to shard, or None."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # On CPUs accelerate passes over the wish, though torch can.
        from accelerate import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
    return plugin


def _small(module: nn.Module) -> set[nn.Parameter]:
    """Norms and biases: not worth a message, and in another precision than the matrices may be."""
    return {p for p in module.parameters() if p.ndim < 2}


def _check(plugin: Any, config: TrainConfig) -> None:
    if plugin.fsdp_version != 2:
        raise ConfigError("FSDP1 cannot divide a network that is partly frozen: give --fsdp_version 2")
    fast = config.fast
    wrong = {
        f"objective={config.objective}": config.objective != "likelihood",
        "dev": config.dev > 0,
        "fast.lower_cache": fast.lower_cache > 0,
        "fast.int8": fast.int8,
        "fast.compile": bool(fast.compile),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(f"{name} does not go with FSDP: leave one of them out")
