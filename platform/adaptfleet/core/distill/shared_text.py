"""Where two tokenizations of one text begin a token at the same place: the pieces that models of different tokenizers can be compared on.

Shapes: N labelled tokens of the student's row, M of the teacher's.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptfleet.contracts.errors import ModelError

_WORD_START = "▁"
"""What SentencePiece writes for a space."""


class TokenBytes:
    """The bytes that each token stands for; None: it stands for no text, as the end of a turn."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        """ModelError: the tokenizer's tokens are not pieces of the text, as those of byte-level BPE and of SentencePiece are."""
        spelled = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"], ensure_ascii=False)
        if '"ByteLevel"' in spelled:
            spell = _byte_level
        elif _WORD_START in spelled or '"Metaspace"' in spelled:
            spell = _sentence_piece
        else:
            raise ModelError(
                f"the tokenizer of {name!r} is neither byte-level BPE nor SentencePiece, so its tokens cannot be laid over another's. "
                f"Train on the teacher's answers as rows (jobs/finetune.py)."
            )
        added = {i: None if token.special else token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
        vocabulary = {i: spell(token) for token, i in tokenizer.get_vocab().items() if i not in added}
        self._bytes: dict[int, bytes | None] = vocabulary | added

    def __call__(self, token: int) -> bytes | None:
        return self._bytes.get(token)


@dataclass(frozen=True)
class SharedPieces:
    """Of each labelled token the number of its piece, from 0; -1: in no piece that both rows have."""

    mine_N: npt.NDArray[np.int64]
    theirs_M: npt.NDArray[np.int64]
    count: int


def shared_pieces(mine: Any, theirs: Any, my_bytes: TokenBytes, their_bytes: TokenBytes) -> SharedPieces:
    """Of one example in two tokenizations (`Encoded` or `TokenRow`), perhaps by two chat templates.

    Answers are laid over each other one by one. A piece is the least run of tokens of each side that stand for the same bytes; the end of
    an answer is one where both label it. Where the answers' texts part (a row that was cut, a template that adds to it) the pieces end.
    """
    mine_N, theirs_M = (np.full(int(np.count_nonzero(row.label_mask)), -1, dtype=np.int64) for row in (mine, theirs))
    count = 0
    for my_run, their_run in zip(_runs(mine, my_bytes), _runs(theirs, their_bytes), strict=False):
        if my_run.begins_with_space != their_run.begins_with_space:
            # SentencePiece writes a space before a text that has none
            my_run, their_run = my_run.without_space(), their_run.without_space()
        same = _common_bytes(my_run.text, their_run.text)
        my_ends, their_ends = my_run.ends(), their_run.ends()
        places = np.intersect1d(my_ends, their_ends)
        places = places[(places > 0) & (places <= same)]
        for numbers, run, ends in ((mine_N, my_run, my_ends), (theirs_M, their_run, their_ends)):
            piece = np.searchsorted(places, ends)
            numbers[run.first : run.first + len(ends)] = np.where(piece < len(places), count + piece, -1)
        count += len(places)
        if my_run.has_end and their_run.has_end and my_run.text == their_run.text:
            mine_N[my_run.first + len(my_ends)] = theirs_M[their_run.first + len(their_ends)] = count
            count += 1
    return SharedPieces(mine_N, theirs_M, count)


@dataclass(frozen=True)
class _Run:
    """Neighbouring labelled tokens: an answer."""

    first: int
    """Of all labelled tokens of the row."""
    pieces: list[bytes]
    """Up to the first token that is no text."""
    has_end: bool

    @property
    def text(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def begins_with_space(self) -> bool:
        return self.text.startswith(b" ")

    def without_space(self) -> "_Run":
        if not self.begins_with_space:
            return self
        first, *others = self.pieces
        return replace(self, pieces=[first[1:], *others])

    def ends(self) -> npt.NDArray[np.int64]:
        """Bytes up to the end of each token."""
        return np.cumsum([len(piece) for piece in self.pieces], dtype=np.int64)


def _runs(row: Any, token_bytes: TokenBytes) -> Iterator[_Run]:
    mask_T = np.concatenate([[False], np.asarray(row.label_mask, dtype=bool), [False]])
    edges = np.flatnonzero(mask_T[1:] != mask_T[:-1])
    first = 0
    for start, end in edges.reshape(-1, 2).tolist():
        found = [token_bytes(int(token)) for token in row.input_ids[start:end]]
        pieces = list(itertools.takewhile(lambda piece: piece is not None, found))
        yield _Run(first, [piece for piece in pieces if piece is not None], len(pieces) < len(found))
        first += end - start


def _common_bytes(a: bytes, b: bytes) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(np.frombuffer(a[:length], np.uint8) != np.frombuffer(b[:length], np.uint8))
    return int(different[0]) if len(different) else length


def _byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself where it can be seen, else one from U+0100 on, in order."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(seen)]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    if not _ALPHABET.keys() >= set(token):
        return token.encode()  # in the vocabulary as it is, made by no merge
    return bytes(_ALPHABET[character] for character in token)


def _sentence_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_WORD_START, " ").encode()
