"""Tokenizer loading, incremental detokenization, stop strings."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import CORPUS, write_tokenizer
from deinfer.tokenizer import (
    IncrementalDetokenizer,
    find_stop,
    has_tokenizer,
    held_length,
    load_tokenizer,
)


@pytest.fixture(scope="module")
def byte_level(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Llama 2's kind: metaspace, bytes as `<0x41>` tokens, a stripped leading space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *(f"▁{word}" for word in CORPUS.split()), *"abcdefghij.,!", "你", "好"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    path = tmp_path_factory.mktemp("byte_fallback")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )
    return load_tokenizer(path)


def detokenize(tokenizer: Any, ids: list[int], skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return pieces


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens_give_the_same_text_as_decode(
    kind: str, skip: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    numbers = random.Random(0)
    for _ in range(300):
        ids = numbers.choices(range(len(tokenizer)), k=numbers.randrange(0, 60))
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        assert "".join(detokenize(tokenizer, ids, skip)) == text


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_text_with_wide_characters_never_shows_half_of_one(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    text = "héllo 你好世界 😀👩‍👩‍👧 Ω"
    ids = [
        token_id
        for byte in text.encode()
        for token_id in (
            tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>"])
            if kind == "byte_fallback"
            else tokenizer.convert_tokens_to_ids([_byte_character(byte)])
        )
    ]
    pieces = detokenize(tokenizer, ids, True)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def _byte_character(byte: int) -> str:
    """GPT-2's printable stand-in for a byte."""
    from tokenizers import decoders, pre_tokenizers

    decoder = decoders.ByteLevel()
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if byte < 128:
        return pieces.pre_tokenize_str(chr(byte))[0][0]
    # No string has a lone high byte; take the character from one that contains it.
    for code in (*range(0x80, 0x3000), *range(0x4E00, 0x9FFF), *range(0x1F300, 0x1FAFF), 0x200D):
        encoded = chr(code).encode()
        if byte in encoded:
            character = pieces.pre_tokenize_str(chr(code))[0][0][encoded.index(byte)]
            assert decoder.decode([character])
            return character
    raise AssertionError(byte)


def test_text_arrives_with_its_token(byte_level: Any) -> None:
    ids = byte_level("The quick brown fox")["input_ids"]
    pieces = detokenize(byte_level, ids, True)
    assert all(pieces[:-1]) and pieces[-1] == ""


def test_skipped_special_tokens_do_not_pile_up(byte_level: Any) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, skip_special_tokens=True)
    for token_id in [*byte_level("The sky")["input_ids"], *[1] * 1000]:
        detokenizer.push(token_id)
    assert len(detokenizer._token_ids) < 10
    assert detokenizer.text == "The sky"


def test_special_tokens_are_kept_on_request(byte_level: Any) -> None:
    ids = [*byte_level("sky")["input_ids"], 2]
    assert "".join(detokenize(byte_level, ids, False)) == "sky<|im_end|>"
    assert "".join(detokenize(byte_level, ids, True)) == "sky"


def test_a_lasting_run_of_broken_bytes_is_shown_in_the_end(byte_level: Any) -> None:
    (broken,) = byte_level.convert_tokens_to_ids([_byte_character(0xE4)])
    ids = [broken] * 100
    assert "".join(detokenize(byte_level, ids, True)) == byte_level.decode(ids)


def test_a_decomposed_checkpoint_loads_without_torch(lowrank_model: Path) -> None:
    """`lowrank_llama` is unknown to transformers; see also test_cli's import test."""
    tokenizer = load_tokenizer(lowrank_model)
    assert tokenizer.decode(tokenizer("The sky")["input_ids"]) == "The sky"
    assert tokenizer.chat_template


def test_missing_tokenizer(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}'])
def test_broken_tokenizer(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_chat_template_in_its_own_file(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    assert not load_tokenizer(tmp_path).chat_template
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert load_tokenizer(tmp_path).chat_template


@pytest.mark.parametrize(
    ("text", "start", "stops", "expected"),
    [
        ("abc", 0, ["c"], (2, "c")),
        ("abc", 0, ["x"], None),
        ("abcd", 3, ["bcd"], (1, "bcd")),  # spans the old and the new text
        ("xab", 0, ["b", "ab"], (1, "ab")),  # the earliest wins
        ("ab ab", 3, ["ab"], (3, "ab")),  # what was searched before is left alone
    ],
)
def test_find_stop(
    text: str, start: int, stops: list[str], expected: tuple[int, str] | None
) -> None:
    assert find_stop(text, start, stops) == expected


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("ab", [], 0),
        ("ab", ["bcd"], 1),
        ("abc", ["bcd", "abcd"], 3),
        ("", ["a"], 0),
        ("a", ["a"], 0),
    ],
)
def test_held_length(text: str, stops: list[str], expected: int) -> None:
    assert held_length(text, stops) == expected
