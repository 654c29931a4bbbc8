"""A tokenizer in which text from a record never becomes a control token, and spans survive.

The codec is a copy of the tokenizer whose control tokens are spelled with Unicode noncharacters
(an alias each, same id). `protect` marks control strings inside content, `seal` turns the
template's own ones into aliases, so `<|im_end|>` typed by a user is encoded as the ten characters
that it is. START, END and CUT are extra tokens that end up in no output: they tell where answers
lie and keep merges from crossing the place where generation starts, so that a prompt's ids are a
prefix of the trained ids.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tuneloom.data.hub import only_local
from tuneloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALIAS_OPEN, ALIAS_CLOSE, GUARD = "\ufdd0", "\ufdd1", "\ufdd5"
START, END, CUT = "\ufdd2", "\ufdd3", "\ufdd4"
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
PIPED = re.compile(r"<[|｜].*[|｜]>")
"""Looks like control: guarded even where the tokenizer does not call it special (<|tool|>)."""


def load_tokenizer(path: str, revision: str | None = None) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a folder or hub id; DataError when it has none or cannot be reached."""
    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        raise DataError(f"{path}: no tokenizer files; copy tokenizer.json of the base model there")
    local = only_local(path)
    try:
        tokenizer = _loader(path).from_pretrained(
            path, revision=revision, local_files_only=local, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        if local and not Path(path).is_dir():
            raise DataError(
                f"{path}: no such folder, not in the Hugging Face cache, and the hub cannot be "
                f"reached; give a local folder"
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(f"{path}: no tokenizer could be loaded ({first})") from error
    _backend(tokenizer)
    return tokenizer


def _loader(path: str) -> Any:
    """AutoTokenizer; or, where it would end there anyhow, the class that imports no torch (4 s)."""
    config = Path(path) / "tokenizer_config.json"
    if config.is_file():
        plain = json.loads(config.read_text()).get("tokenizer_class") in GENERIC_CLASSES
        if plain and (Path(path) / "tokenizer.json").is_file():
            from transformers import TokenizersBackend

            return TokenizersBackend
    from transformers import AutoTokenizer

    return AutoTokenizer


def name_of(tokenizer: Any) -> str:
    """What a message calls this tokenizer."""
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{name_of(tokenizer)}: only fast tokenizers (tokenizer.json) are supported, "
            f"this is a {type(tokenizer).__name__}"
        )
    return backend


class Codec:
    """Text with aliases and marks -> ids; immutable, so threads may share it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", template: str = "") -> None:
        from tokenizers import AddedToken, Tokenizer

        spec = json.loads(_backend(tokenizer).to_str())
        # Set by whoever last called the tokenizer with padding=; no part of what it is.
        spec |= {"truncation": None, "padding": None}
        self.digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        control = [
            token
            for token in spec["added_tokens"]
            if not token["content"].isspace()
            and (
                token["special"]
                or (PIPED.fullmatch(token["content"]) and token["content"] in template)
            )
        ]
        self.aliases = {
            token["content"]: f"{ALIAS_OPEN}{token['id']}{ALIAS_CLOSE}" for token in control
        }
        self.swallows = {token["content"] for token in control if token["rstrip"]}
        self.control = re.compile(any_of(self.aliases))
        self._core = Tokenizer.from_str(json.dumps(_respell(spec, self.aliases)))
        self._core.add_special_tokens(
            [AddedToken(mark, special=True, normalized=False) for mark in (START, END, CUT)]
        )
        self.start, self.end, self.cut = (
            int(self._core.token_to_id(m) or 0) for m in (START, END, CUT)
        )
        assert 0 < self.start < self.end < self.cut
        for content, alias in self.aliases.items():
            assert self._core.token_to_id(alias) == tokenizer.convert_tokens_to_ids(content), (
                content
            )
        self._prepends = self._prepends_a_space()

    def protect(self, text: str) -> str:
        """Content as it may enter a template: control strings in it are marked as text."""
        return self.control.sub(lambda m: m.group()[0] + GUARD + m.group()[1:], text)

    def seal(self, text: str) -> str:
        """Rendered text as it may be encoded: the template's control strings become aliases."""
        return self.control.sub(lambda m: self.aliases[m.group()], text).replace(GUARD, "")

    def marked(self, text: str, marks: Sequence[tuple[int, str]]) -> str:
        """Seal `text`, each mark put before the character at its position (positions ascend)."""
        pieces, previous = [], 0
        for position, mark in marks:
            pieces += [self.seal(text[previous:position]), mark]
            previous = position
            if self._prepends and text[previous : previous + 1] == " ":
                previous += 1  # the tokenizer puts it back in front of every segment
        return "".join([*pieces, self.seal(text[previous:])])

    def end_of_control(self, text: str, start: int, stop: int) -> int | None:
        """Where the last control token of text[start:stop] ends, if only whitespace follows it."""
        found = list(self.control.finditer(text, start, stop))
        if not found or text[found[-1].end() : stop].strip():
            return None
        return stop if found[-1].group() in self.swallows else found[-1].end()

    def without_last_control(self, text: str) -> str:
        """`text` without a control token at its very end."""
        found = list(self.control.finditer(text))
        closed = found and not text[found[-1].end() :].strip()
        return text[: found[-1].start()] if closed else text

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """ids int32 (L,) of each sealed text, marks included, no token added."""
        encodings = self._core.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def _prepends_a_space(self) -> bool:
        """Whether a segment after a special token gets a space (SentencePiece's dummy prefix)."""
        cut, plain = self.encode([f"a{CUT}x", "a x"])
        return bool(np.array_equal(cut[cut != self.cut], plain))


def any_of(words: Iterable[str]) -> str:
    """A pattern of the longest of `words` at a place, as a trie: Gemma has 6,000 of them, and a
    plain alternation would try them all at every `<`."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}  # a word ends here
    return _trie_pattern(root) if root else r"(?!)"


def _trie_pattern(node: dict[str, Any]) -> str:
    branches = [re.escape(c) + _trie_pattern(inner) for c, inner in sorted(node.items()) if c]
    if not branches:
        return ""
    joined = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    return f"(?:{joined})?" if "" in node else joined


def _respell(spec: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """The tokenizer.json `spec` with control tokens spelled as their aliases, ids unchanged."""
    for token in spec["added_tokens"]:
        if token["content"] in aliases:
            token |= {"content": aliases[token["content"]], "normalized": False}
            token["special"] = True
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {aliases.get(piece, piece): id for piece, id in vocab.items()}
    else:
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    return spec | {"post_processor": None}
