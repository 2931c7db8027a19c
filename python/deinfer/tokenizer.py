"""Tokenizer loading, incremental detokenization and stop strings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF = "\N{REPLACEMENT CHARACTER}"  # what decoders make of an incomplete UTF-8 character
_PATIENCE = 32  # tokens that may be held back for a character that never becomes complete
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def has_tokenizer(path: Path) -> bool:
    """Tell whether a directory holds a tokenizer.

    Args:
        path: Model or tokenizer directory.

    Returns:
        Whether one of the usual vocabulary files is there.
    """
    return any((path / name).is_file() for name in _FILES)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a Hugging Face tokenizer from a directory; nothing is fetched from a network.

    tokenizer.json is loaded as it is, without looking at the model's config.json: that spares the
    import of torch (seconds) and works for model types that transformers does not know, such as
    those of decomposed checkpoints.

    Args:
        path: Model or tokenizer directory.

    Returns:
        The tokenizer, with its chat template if it has one.

    Raises:
        FileNotFoundError: The directory holds no tokenizer.
        ValueError: Its files cannot be read.
    """
    path = Path(path)
    if not has_tokenizer(path):
        raise FileNotFoundError(f"no tokenizer in {str(path)!r}: none of {', '.join(_FILES)}")
    import transformers

    is_fast = (path / "tokenizer.json").is_file()
    loader = transformers.PreTrainedTokenizerFast if is_fast else transformers.AutoTokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(
            str(path), local_files_only=True
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"cannot load the tokenizer in {str(path)!r}: {error}") from error
    except Exception as error:  # the Rust library raises bare Exception
        if type(error) is not Exception:
            raise
        raise ValueError(f"cannot load the tokenizer in {str(path)!r}: {error}") from error
    return tokenizer


def decode(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], *, skip_special_tokens: bool
) -> str:
    """Decode tokens to text, as one `str` for one sequence.

    Args:
        tokenizer: Hugging Face tokenizer.
        token_ids: Tokens [length].
        skip_special_tokens: Leave special tokens out.

    Returns:
        The text; incomplete characters become U+FFFD.
    """
    text = tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
    return text if isinstance(text, str) else "".join(text)


class IncrementalDetokenizer:
    """Turns tokens into text as they come, in constant time per token.

    What it has emitted never ends in half a character, and `finish` completes it to exactly
    `tokenizer.decode(all tokens)`.

    Only a window of the last tokens is decoded: from the token before the last clean boundary, so
    that decoders which treat the first token differently (a stripped leading space) see it in
    context. Byte tokens (`<0xE4>`) are held back until their run has ended, because one invalid
    byte changes how the whole run is decoded.

    Args:
        tokenizer: Hugging Face tokenizer.
        skip_special_tokens: Leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True
    ) -> None:
        """Start with no tokens; see the class."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._token_ids: list[int] = []
        self._context = 0  # first token of the window
        self._done = 0  # tokens before it are emitted
        self._context_text = ""  # of tokens [context, done)
        self.text = ""

    def _decode(self, token_ids: Sequence[int]) -> str:
        return decode(self._tokenizer, token_ids, skip_special_tokens=self._skip)

    def push(self, token_id: int) -> str:
        """Add one token.

        Args:
            token_id: The next token.

        Returns:
            The new text, "" while a character is incomplete.
        """
        if self._is_skipped(token_id):
            return ""
        self._token_ids.append(token_id)
        if self._is_byte(token_id):
            return ""
        window = self._decode(self._token_ids[self._context :])
        if len(window) <= len(self._context_text):
            return ""
        if window.endswith(_HALF) and len(self._token_ids) - self._done < _PATIENCE:
            return ""
        new = window[len(self._context_text) :]
        self._context, self._done = self._done, len(self._token_ids)
        self._context_text = self._decode(self._token_ids[self._context : self._done])
        self.text += new
        return new

    def finish(self) -> str:
        """Emit what was held back.

        Returns:
            The rest of the text; incomplete characters become U+FFFD.
        """
        emitted = self.text
        self.text = self._decode(self._token_ids)
        return self.text[len(emitted) :]

    def _is_skipped(self, token_id: int) -> bool:
        """Whether decoding drops the token (not if it has no text of its own either way)."""
        return self._skip and bool(
            not self._decode([token_id])
            and decode(self._tokenizer, [token_id], skip_special_tokens=False)
        )

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return isinstance(token, str) and len(token) == 6 and token.startswith("<0x")


def find_stop(text: str, start: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """Find the first stop string.

    Args:
        text: Text so far.
        start: Characters before it were searched already.
        stops: Non-empty stop strings.

    Returns:
        Where the earliest one begins and which it is, or None. Of several at one place, the first
        in `stops`.
    """
    found: tuple[int, str] | None = None
    for stop in stops:
        at = text.find(stop, max(0, start - len(stop) + 1))
        if at >= 0 and (found is None or at < found[0]):
            found = at, stop
    return found


def held_length(text: str, stops: Sequence[str]) -> int:
    """Count the characters at the end of a text that may turn out to begin a stop string.

    Args:
        text: Text so far, without a stop string in it.
        stops: Stop strings.

    Returns:
        Length of the longest suffix of `text` that a stop string begins with.
    """
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
