"""The frozen language model: families, frames of many templates, literal text, what is never said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from vlm.conversation import Conversation
from vlm.errors import WeightsError
from vlm.language import ChatFrame, LanguageModel, chat_frame

if TYPE_CHECKING:
    from vlm.model import VLM

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|eot_id|>"]
MARKS += [
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<think>",
    "</think>",
]

# The essence of the templates that these families ship.
CHATML = "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
QWEN = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nBe Qwen.<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}" + CHATML + "{%- endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content + ' [/INST]' }}"
    "{% else %}{{ ' ' + content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)
THINKING = (
    "{%- for message in messages %}{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n' }}{%- else %}"
    + CHATML
    + "{%- endif %}{%- endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_parts: Any) -> Any:
    """A byte-level tokenizer that knows the marks of all these templates."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny_parts.language["llama"])
    loaded.add_special_tokens({"extra_special_tokens": MARKS})
    return loaded


def framed(tokenizer: Any, template: str, bos: str, eos: str) -> ChatFrame:
    tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token = template, bos, eos
    return chat_frame(tokenizer)


@pytest.mark.parametrize(
    ("template", "bos", "eos", "expected"),
    [
        (
            QWEN,
            "<|endoftext|>",
            "<|im_end|>",
            ("", "<|im_start|>user\n", "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        ),
        (
            LLAMA3,
            "<s>",
            "<|eot_id|>",
            (
                "<s>",
                "<|start_header_id|>user<|end_header_id|>\n\n",
                "<|eot_id|>",
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "<|eot_id|>",
            ),
        ),
        (LLAMA2, "<s>", "</s>", ("", "<s>[INST] ", " [/INST]", " ", "</s>")),
        (MISTRAL, "<s>", "</s>", ("<s>", "[INST] ", " [/INST]", "", "</s>")),
        (
            GEMMA,
            "<s>",
            "</s>",
            (
                "<s>",
                "<start_of_turn>user\n",
                "<end_of_turn>\n",
                "<start_of_turn>model\n",
                "<end_of_turn>\n",
            ),
        ),
        ("{{ messages[0]['content'] }}", "<s>", "</s>", None),
        ("{{ raise_exception('no') }}", "<s>", "</s>", None),
        (
            None,
            "<s>",
            "</s>",
            ("<s>", "User: ", "\n", "Assistant:", "</s>"),
        ),
        (None, "</s>", "</s>", ("", "User: ", "\n", "Assistant:", "</s>")),
    ],
    ids=["qwen", "llama3", "llama2", "mistral", "gemma", "no turns", "broken", "no template", "gpt2"],
)
def test_frames(template: str, bos: str, eos: str, expected: tuple[str, ...] | None, tokenizer: Any) -> None:
    if expected is None:
        with pytest.raises(WeightsError, match="does not put its turns"):
            framed(tokenizer, template, bos, eos)
        return
    frame = framed(tokenizer, template, bos, eos)
    pieces = (frame.start, frame.user_open, frame.user_close, frame.assistant_open, frame.assistant_close)
    assert tuple(tokenizer.decode(list(piece)) for piece in pieces) == expected
    assert frame.end in tokenizer.added_tokens_decoder
    assert frame.end == frame.assistant_close[0]


def test_a_template_that_thinks(tokenizer: Any) -> None:
    """Its last answer opens with an empty thought, which is what makes such a model answer at once."""
    frame = framed(tokenizer, THINKING, "<|endoftext|>", "<|im_end|>")
    opened = tokenizer.decode(list(frame.assistant_open))
    assert opened == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode([frame.end]) == "<|im_end|>"


def test_no_end_of_sequence(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.eos_token = None
    with pytest.raises(WeightsError, match="no end of sequence"):
        chat_frame(tokenizer)


# --- literal text ----------------------------------------------------------------------------------------


def test_a_vocabulary_that_spells_special_tokens_itself() -> None:
    """Unigram vocabularies hold their control tokens as ordinary pieces; typed text must not reach them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from vlm.language import _without_added_tokens

    letters = [(letter, -5.0) for letter in "<s>/imbapld\u2581"]
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), *dict(letters).items(), ("pad", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>"]) == [1, 2]
    assert 1 in backend.encode("a<s>", add_special_tokens=False).ids
    encode = _without_added_tokens(tokenizer)
    for text in ("<s>", "a<s>b</s>", "<s>" * 50, "pad <s> pad"):
        ids = encode(text)
        assert not {1, 2} & set(ids)
        assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("\u2581", "") == text.replace(" ", "")
    assert encode("z") == [encode("\u2581")[0], 0]  # an unknown letter stays unknown


def test_bytes_of_a_byte_level_vocabulary(make_tiny: Callable[..., VLM]) -> None:
    language = make_tiny("flamingo").language
    text = "the dog, 😀 猫\u00a0Ω\n"
    ids = language.encode_text(text)
    assert b"".join(map(language.token_bytes, ids)) == text.encode()
    assert b"\xf0" in map(language.token_bytes, ids)  # a quarter of a face


def test_bytes_of_a_vocabulary_of_text(
    make_tiny: Callable[..., VLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = {"<unk>": 0, "\u2581dog": 1, "<0xF0>": 2, "猫": 3}
    backend = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    language = make_tiny("flamingo").language
    monkeypatch.setattr(language, "tokenizer", PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [language.token_bytes(token) for token in (1, 2, 3)] == [b" dog", b"\xf0", "猫".encode()]


def test_a_tokenizer_without_a_fast_form() -> None:
    from vlm.language import _without_added_tokens

    class Slow:
        name_or_path = "slow"

    with pytest.raises(WeightsError, match="no fast form"):
        _without_added_tokens(Slow())


# --- families --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, make_tiny: Callable[..., VLM]) -> None:
    language = make_tiny("flamingo", family).language
    assert (language.num_layers, language.width, language.max_positions) == (4, 32, 256)
    assert not any(p.requires_grad for p in language.parameters())
    ids = torch.tensor([language.encode_text("a dog runs on the grass")])
    length = ids.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None]
    ours = language.logits(language(language.embed(ids), mask, torch.arange(length)[None]))
    torch.testing.assert_close(ours, language.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert language.head_weight is not None
    assert language.head_weight.shape == (language.vocabulary, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_before_layer_acts_where_it_is_told(family: str, make_tiny: Callable[..., VLM]) -> None:
    language = make_tiny("flamingo", family).language
    ids = torch.tensor([language.encode_text("a dog")])
    mask = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    positions = torch.arange(ids.shape[1])[None]
    seen: list[int] = []

    def note(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.shape == (1, ids.shape[1], 32)
        seen.append(layer)
        return hidden

    def replace(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden)

    plain = language(language.embed(ids), mask, positions)
    assert torch.equal(language(language.embed(ids), mask, positions, None, note, (0, 2)), plain)
    assert seen == [0, 2]
    changed = language(language.embed(ids), mask, positions, None, replace, (3,))
    assert not torch.allclose(changed, plain)
    # What fails inside leaves no hook behind.
    with pytest.raises(ZeroDivisionError):
        language(language.embed(ids), mask, positions, None, lambda layer, hidden: 1 / 0, (1,))
    assert torch.equal(language(language.embed(ids), mask, positions), plain)


def test_a_part_of_the_vocabulary_is_never_said(tiny_parts: Any, make_tiny: Callable[..., VLM]) -> None:
    language = make_tiny("flamingo").language
    banned = language.never_said().nonzero()[:, 0].tolist()
    assert banned == [0, 1, 3]  # <|endoftext|>, <|im_start|>, <image>; <|im_end|> ends an answer
    # Rows of the embedding beyond the tokenizer (Qwen's, for round numbers) stand for nothing.
    model = language.model
    model.resize_token_embeddings(language.vocabulary + 9)
    padded = LanguageModel(model, language.tokenizer)
    assert padded.never_said().nonzero()[:, 0].tolist() == [
        0,
        1,
        3,
        *range(len(language.tokenizer), padded.vocabulary),
    ]
    # And added tokens beyond the embedding cannot be said either.
    language.tokenizer.add_tokens([f"<extra{i}>" for i in range(20)])
    crowded = LanguageModel(model, language.tokenizer)
    assert crowded.never_said().shape == (padded.vocabulary,)


def test_rows_without_a_token_are_not_decoded(make_tiny: Callable[..., VLM]) -> None:
    model = make_tiny("flamingo")
    language = model.language
    language.model.resize_token_embeddings(language.vocabulary + 9)
    with torch.no_grad():  # as loud as can be
        language.model.lm_head.weight[-9:] = language.model.lm_head.weight[:-9].abs().sum(0) * 50
        language.model.lm_head.weight[0] = language.model.lm_head.weight[-1]
    for options in ({}, {"num_beams": 3}, {"temperature": 1.0, "seed": 0}):
        answer = model.ask([], "hello", max_new_tokens=6, **options)
        assert answer.text
        assert len(language.encode_text(answer.text)) > 0


@pytest.mark.parametrize("damage", ["no weights", "no tokenizer", "garbage", "half", "other sizes"])
def test_folders_that_hold_no_language_model(damage: str, tiny_parts: Any, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_parts.language["llama"], folder)
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif damage == "garbage":
        (folder / "model.safetensors").write_bytes(b"garbage" * 100)
    else:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        name = next(name for name in state if name.endswith("3.mlp.up_proj.weight"))
        state[name] = state[name][:-1].clone()
        if damage == "half":
            del state[name]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="holds no usable language model"):
        LanguageModel.load(folder)


# --- the real one ----------------------------------------------------------------------------------------


def test_the_first_words_are_transformers_own(real_model: VLM) -> None:
    """Without a picture and with its gates shut the whole path equals `generate` on the same prompt."""
    language, adapter = real_model.language, real_model.adapter
    question = "What is the capital of France?"
    prompt = real_model.processor.tokens(Conversation.ask([], question)).codes
    with torch.inference_mode():
        theirs = language.model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=language.frame.end
        )[0, len(prompt) :].tolist()
    gates = [p for name, p in adapter.named_parameters() if name.endswith("_gate")]
    kept = [gate.detach().clone() for gate in gates]
    try:
        with torch.no_grad():
            for gate in gates:
                gate.zero_()
        answer = real_model.ask([], question, max_new_tokens=12)
    finally:
        with torch.no_grad():
            for gate, value in zip(gates, kept, strict=True):
                gate.copy_(value)
    said = [token for token in theirs if token != language.frame.end]
    assert answer.text == language.decode(said).strip()
    assert "Paris" in answer.text
