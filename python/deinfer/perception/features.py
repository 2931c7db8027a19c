"""What a prompt's text says about its answer: TF-IDF of words and pairs of words, and counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_WORD = re.compile(r"\w\w+")
_MAX_TERMS = 6000
_MIN_DOCUMENTS = 2


def terms(text: str) -> list[str]:
    """Words of at least two letters and pairs of neighbours, in lower case."""
    words = _WORD.findall(text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class TfIdf:
    """Term frequencies weighted by rarity; rows have length 1.

    Attributes:
        vocabulary: Terms.
        idf: Their weights [terms].
    """

    vocabulary: list[str]
    idf: Floats

    @classmethod
    def fit(cls, texts: Sequence[str]) -> TfIdf:
        """Take the most frequent terms that at least two of the texts have."""
        documents: Counter[str] = Counter()
        total: Counter[str] = Counter()
        for text in texts:
            found = terms(text)
            total.update(found)
            documents.update(set(found))
        known = [term for term, count in documents.items() if count >= _MIN_DOCUMENTS]
        known = sorted(sorted(known, key=lambda term: (-total[term], term))[:_MAX_TERMS])
        counts = np.array([documents[term] for term in known], np.float64)
        return cls(known, np.log((1 + len(texts)) / (1 + counts)) + 1)

    def transform(self, texts: Sequence[str]) -> Floats:
        """Features of texts [n, terms]."""
        place = {term: i for i, term in enumerate(self.vocabulary)}
        rows = np.zeros((len(texts), len(self.vocabulary)))
        for row, text in zip(rows, texts, strict=True):
            for term in terms(text):
                if term in place:
                    row[place[term]] += 1
        rows *= self.idf
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.asarray(rows / np.maximum(norms, 1e-12))


def lexical(texts: Sequence[str]) -> Floats:
    """Count what can be counted.

    Args:
        texts: Prompts.

    Returns:
        [n, 11]: logarithms of characters, words, lines and sentences; mean length of a word; shares
        of digits, capitals and punctuation; whether it asks, holds code, or wants a list.
    """
    rows = []
    for text in texts:
        size = max(len(text), 1)
        words = text.split()
        rows.append(
            [
                np.log1p(len(text)),
                np.log1p(len(words)),
                np.log1p(text.count("\n")),
                np.log1p(len(re.findall(r"[.!?](\s|$)", text))),
                len(text) / max(len(words), 1),
                sum(c.isdigit() for c in text) / size,
                sum(c.isupper() for c in text) / size,
                sum(not c.isalnum() and not c.isspace() for c in text) / size,
                float("?" in text),
                float(bool(re.search(r"[{}<>=]|def |\(\)", text))),
                float(
                    bool(re.search(r"\b(list|steps?|ideas|examples?|tips|write)\b", text.lower()))
                ),
            ]
        )
    return np.array(rows, np.float64)
