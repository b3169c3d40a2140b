"""The frozen decoder language model: embeddings, layers, head, and its chat template's own pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import WeightsError
from vlm.packed import PackedLinear

BeforeLayer = Callable[[int, Tensor], Tensor]
_BYTE = re.compile("<0x([0-9A-F]{2})>")
"""How vocabularies of text spell a byte that none of their pieces covers."""


@dataclass(frozen=True)
class ChatFrame:
    """Token ids that stand around the turns; `end` closes an answer and is the stop token."""

    start: tuple[int, ...]
    user_open: tuple[int, ...]
    user_close: tuple[int, ...]
    assistant_open: tuple[int, ...]
    assistant_close: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.assistant_close[0]


class LanguageModel(nn.Module):
    """Any decoder-only `transformers` model, frozen.

    Shapes: B rows, T new tokens, S tokens seen (cached ones and new ones), D hidden width.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.body = model.base_model
        self.layers = _decoder_layers(self.body, model.config.num_hidden_layers)
        self.frame = chat_frame(tokenizer)
        self.width: int = model.config.hidden_size
        self.max_positions: int = getattr(model.config, "max_position_embeddings", 1 << 20)
        self._plain = _without_added_tokens(tokenizer)
        self.added_ids = tuple(i for i in tokenizer.added_tokens_decoder if i != self.frame.end)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
        """Loads weights and tokenizer from a local folder (safetensors only, no remote code)."""
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as problem:
            raise WeightsError(f"{folder} holds no usable language model: {problem}") from problem
        finally:
            if bars:
                logging.enable_progress_bar()
        if report["missing_keys"]:  # transformers would make them up
            name = sorted(report["missing_keys"])[0]
            raise WeightsError(f"{folder} holds no usable language model: {name} is missing")
        return cls(model, tokenizer)

    def train(self, mode: bool = True) -> LanguageModel:
        """Stays in evaluation mode: a frozen part has no dropout."""
        return super().train(False)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, which may be more than the tokenizer has tokens."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def encode_text(self, text: str) -> list[int]:
        """Ids of literal text: no added token is ever recognised in it.

        Halves of characters (lone surrogates, as a terminal may pass them) become question marks.
        """
        return self._plain(text.encode("utf-8", "replace").decode("utf-8"))

    @cached_property
    def longest_token(self) -> int:
        """Characters of the vocabulary's longest piece: no token stands for more of a text."""
        return max(map(len, self.tokenizer.get_vocab()))

    def never_said(self) -> Tensor:
        """(V,) bool: added tokens other than the end, and rows of the embedding that no token has."""
        banned = torch.zeros(self.vocabulary, dtype=torch.bool)
        if self.vocabulary > len(self.tokenizer):
            banned[:] = True
            banned[[i for i in self.tokenizer.get_vocab().values() if i < self.vocabulary]] = False
        banned[[i for i in self.added_ids if i < self.vocabulary]] = True
        return banned

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, which may be a part of a character."""
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if token in self.tokenizer.added_tokens_decoder:
            return piece.encode()
        if self._letters:
            return b"".join(self._letters.get(letter, letter.encode()) for letter in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode()

    @cached_property
    def _letters(self) -> dict[str, bytes]:
        """The byte behind each letter of a byte-level vocabulary; empty where the vocabulary holds text."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        decoder = self.tokenizer.backend_tokenizer.decoder
        if decoder is None or b"ByteLevel" not in decoder.__getstate__():
            return {}
        return {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}

    @property
    def embeddings(self) -> Tensor:
        """(V, D) of all tokens."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def embed(self, ids: Tensor) -> Tensor:
        """(..., ) ids -> (..., D)."""
        embedded = self.model.get_input_embeddings()(ids)
        assert isinstance(embedded, Tensor)
        return embedded

    def forward(
        self,
        embeddings: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Any = None,
        before_layer: BeforeLayer | None = None,
        at_layers: tuple[int, ...] = (),
    ) -> Tensor:
        """Runs the decoder.

        Args:
            embeddings: (B, T, D).
            mask: (B, T, S) bool, true where a token may look.
            positions: (B, T) position of each token in its own sequence.
            cache: a `transformers` cache to read and extend, or None.
            before_layer: maps (layer index, hidden states) to the hidden states that the layer reads.
            at_layers: the layers that `before_layer` is called for.

        Returns:
            (B, T, D) hidden states after the final norm.
        """
        dtype = embeddings.dtype
        additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        additive.masked_fill_(~mask, torch.finfo(dtype).min)
        with _hooked(self.layers, at_layers, before_layer):
            hidden = self.body(
                inputs_embeds=embeddings,
                attention_mask=additive[:, None],
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        assert isinstance(hidden, Tensor)
        return hidden

    @property
    def head_weight(self) -> Tensor | None:
        """(V, D) vocabulary projection, or None where it has a bias or its logits are bent afterwards."""
        head = self.model.get_output_embeddings()
        bent = any(
            getattr(self.model.config, name, None) not in (None, 1.0)
            for name in ("final_logit_softcapping", "logits_scaling", "logit_scale")
        )
        if type(head) not in (nn.Linear, PackedLinear) or head.bias is not None or bent:
            return None
        return head.weight

    def halve(self, attention: str = "eager") -> None:
        """Keeps the linear layers' weights in bfloat16, for training under autocast.

        On a processor with AVX-512 BF16 their products then take half the time or less; the residual
        stream and the norms stay in float32.
        """
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach().bfloat16(), requires_grad=False)
        self.model.set_attn_implementation(attention)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V) in float32."""
        logits = self.model.get_output_embeddings()(hidden)
        assert isinstance(logits, Tensor)
        return logits.float()


def _decoder_layers(body: nn.Module, count: int) -> nn.ModuleList:
    """The decoder's list of layers, whatever the family calls it."""
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise WeightsError(f"{type(body).__name__} has no list of {count} decoder layers")


@contextmanager
def _hooked(
    layers: nn.ModuleList, at_layers: tuple[int, ...], before_layer: BeforeLayer | None
) -> Iterator[None]:
    """Calls `before_layer` in front of the chosen layers for the length of one forward pass only."""
    handles = []
    if before_layer is not None:
        for index in at_layers:
            handles.append(
                layers[index].register_forward_pre_hook(_pre_hook(index, before_layer), with_kwargs=True)
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pre_hook(index: int, before_layer: BeforeLayer) -> Callable[..., tuple[Any, Any]]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (before_layer(index, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": before_layer(index, kwargs["hidden_states"])}

    return hook


def chat_frame(tokenizer: Any) -> ChatFrame:
    """The pieces that the tokenizer's chat template puts around user and assistant turns.

    They are read off rendered turns, each beginning where the turn before it ends, so that a default
    system turn never enters. A tokenizer without a template gets `User: ...` and `Assistant: ...` lines.

    Raises:
        WeightsError: a template that does not put the turns one after the other, or no end of sequence.
    """
    ids = lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    end = tokenizer.eos_token_id
    if tokenizer.chat_template:
        start, user_open, user_close, assistant_open, close = map(ids, _template_pieces(tokenizer))
        # Space or a line's end may stand before the mark that closes the turn: the mark is the end.
        marks = [i for i, token in enumerate(close) if token in tokenizer.added_tokens_decoder]
        if marks or end is not None:
            assistant_close = close[marks[0] :] if marks else (end, *close)
            return ChatFrame(start, user_open, user_close, assistant_open, assistant_close)
    if end is None:
        raise WeightsError(f"the tokenizer of {tokenizer.name_or_path} has no end of sequence")
    start = () if tokenizer.bos_token_id in (None, end) else (tokenizer.bos_token_id,)
    return ChatFrame(start, ids("User: "), ids("\n"), ids("Assistant:"), (end,))


def _template_pieces(tokenizer: Any) -> tuple[str, str, str, str, str]:
    """Texts before all turns, before and after a user's words, before and after the assistant's."""
    from jinja2 import TemplateError

    system, user, answer, again = (f"\u2402{word}\u2403" for word in ("system", "user", "answer", "again"))

    def render(*messages: tuple[str, str]) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    for first in ([("system", system)], []):  # not every template knows system turns
        try:
            head = render(*first) if first else ""
            asked = render(*first, ("user", user))
            whole = render(*first, ("user", user), ("assistant", answer))
            user_open, user_close = _after(head, asked).split(user)
            assistant_open, assistant_close = _after(asked, whole).split(answer)
            later_open = ""
            if not first:  # what stands before the first turn only is told apart by a second one
                longer = render(("user", user), ("assistant", answer), ("user", again))
                _, later = longer.split(again)[0].split(answer)
                later_open = later.removeprefix(assistant_close)
        except (TemplateError, ValueError, TypeError, KeyError):
            continue
        if system in user_open + user_close:
            continue
        if first:
            bos = tokenizer.bos_token
            begins = bool(bos) and head.startswith(bos) and not user_open.startswith(bos)
            return bos if begins else "", user_open, user_close, assistant_open, assistant_close
        start = user_open.removesuffix(later_open) if user_open.endswith(later_open) else ""
        return start, user_open.removeprefix(start), user_close, assistant_open, assistant_close
    raise WeightsError(
        f"the chat template of {tokenizer.name_or_path} does not put its turns one after the other"
    )


def _after(begin: str, text: str) -> str:
    if not text.startswith(begin):
        raise ValueError(begin)
    return text.removeprefix(begin)


def _without_added_tokens(tokenizer: Any) -> Callable[[str], list[int]]:
    """An encoder of literal text: the tokenizer's model and splitting rules, no added tokens at all."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise WeightsError(f"the tokenizer of {tokenizer.name_or_path} has no fast form (tokenizer.json)")
    plain = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(plain, part, getattr(backend, part))
    forbidden = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        while True:
            encoding = plain.encode(text, add_special_tokens=False)
            found = [
                begin
                for id_, (begin, _) in zip(encoding.ids, encoding.offsets, strict=True)
                if id_ in forbidden
            ]
            if not found:
                return [*ids, *encoding.ids]
            # A vocabulary that spells a special token as one piece (Unigram's may): break it after a letter.
            ids += [i for i in plain.encode(text[: found[0] + 1]).ids if i not in forbidden]
            text = text[found[0] + 1 :]

    return encode
