"""From prompt and response to token ids: template, special tokens, truncation, and a fingerprint of all three."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jarm.core.files import there
from jarm.core.outside import read_json, string, struct
from jarm.core.status import JarmError, printable
from jarm.data.store import fields, fill
from jarm.data.texts import TEMPLATE, check_template
from jarm.embedding.chat import render
from jarm.llm.config import import_transformers

CHAT = "chat"
"""Name of the model's own template."""
CHAT_KEY = "{prompt}\x1e{response}"
"""Template of keys under a chat template: no two pairs of prompt and response fill it alike."""
KEEP = ("start", "end")
_ENDLESS, _MAX_TOKENS = 1 << 30, 1 << 24
# Characters for each token of the largest length, up to which texts are tokenised whole, and characters at once: the
# tokenizers take about 100 bytes for each.
_LETTERS, _AT_ONCE = 8, 1 << 22
_NONE = np.zeros(0, np.int32), False
# Templates may write the date into a text; a store has to hold the same text on all days.
_DATED, _DAY = "strftime_now", "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of texts that a model was trained on, where its folder says it.

    Attributes:
      prompt: text that goes before each text; the keys of texts are without it.
      lowercase: whether texts are put in lower case.
      max_length: largest number of tokens in a text, or None for what the tokenizer says.
    """

    prompt: str = ""
    lowercase: bool = False
    max_length: int | None = None


class Tokenizer:
    """Texts of one model: `render` joins the columns of a row, `encode` gives the ids of texts.

    Attributes:
      template: `chat`, or columns in braces.
      key_template: template of the texts whose keys a store has.
      max_length: largest number of tokens in a text, special ones included.
      keep: the end of a longer text that stays, `start` or `end`, with the special tokens around it.
      form: prompt and case of texts.
      own: the tokenizer of transformers.
      special: numbers of special tokens that it puts before and behind a text by itself; none around a chat.
      made_by: all settings that decide the ids, for the `made_by` of a store.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        template: str | None,
        max_length: int | None,
        keep: str | None,
        window: int,
        form: Form | None = None,
        vocab: int | None = None,
    ):
        """Load the tokenizer of a checkpoint.

        Args:
          folder: the checkpoint.
          template: `chat`, or columns in braces; if None, `chat` where the model has a chat template, else
            `{prompt}\\n\\n{response}`.
          max_length: at most the window; if None, the window, or less where `form` or else the tokenizer says so.
          keep: `start` or `end`; if None, as the tokenizer says.
          window: positions of the model.
          form: form of texts as the model's folder says; None where it says nothing.
          vocab: tokens that the model has embeddings of; None for no check.

        Raises:
          JarmError: no tokenizer, no chat template where one is asked for, or a template or length that does not fit.
        """
        self.form, self._vocab = form or Form(), vocab
        self.own = _load(folder, lowercase=self.form.lowercase)
        own = self.own.chat_template = _chat_template(folder, self.own)
        if own is not None and _DATED in own:
            own = self.own.chat_template = _DAY + own
        self.template = template if template is not None else CHAT if own else TEMPLATE
        if self.template == CHAT and not own:
            raise JarmError(f"{folder} has no chat template: give a --template such as '{{prompt}}\\n\\n{{response}}'.")
        if self.template != CHAT:
            check_template(self.template)
        self._chat = own if self.template == CHAT and own else ""
        self.key_template = CHAT_KEY if self.template == CHAT else self.template
        if keep is None:
            keep = "end" if self.own.truncation_side == "left" else "start"
        if keep not in KEEP:
            raise JarmError(
                f"Truncation keeps the start or the end of a text, not the {keep!r}: give --keep start or end."
            )
        self.keep = keep
        if max_length is None:
            max_length = min(window, self.form.max_length or _own_length(folder, self.own))
        self.max_length, self.own.model_max_length = max_length, _ENDLESS
        self._bos = self.own.bos_token_id
        self._head, self._tail = self._special()
        if not self._head + self._tail < self.max_length <= window:
            special = self._head + self._tail
            raise JarmError(
                f"Texts cannot be cut to {self.max_length:,} tokens: give a --max-length of {special + 1} to "
                f"{window:,}, the positions of this model, of which {special} go to special tokens."
            )
        self.special = (0, 0) if self.template == CHAT else (self._head, self._tail)
        self._whole = _LETTERS * self.max_length
        self.made_by: dict[str, Any] = {
            "template": self.key_template,
            "chat_template": _hash(json.dumps(own)) if self.template == CHAT else None,
            "tokenizer": self._fingerprint(folder),
            "max_length": self.max_length,
            "keep": self.keep,
        }
        self.made_by |= {"model_prompt": self.form.prompt} if self.form.prompt else {}
        self.made_by |= {"lowercase": True} if self.form.lowercase else {}

    def render(self, row: Mapping[str, Any]) -> str:
        """The exact text of a row, without the special tokens that the tokenizer adds.

        Args:
          row: `prompt` and `response`, each a text or a list of messages, and the other columns of the template.

        Raises:
          JarmError: messages without a chat template, or messages that the chat template refuses.
        """
        if self.template != CHAT:
            for name in fields(self.template):
                if isinstance(row[name], list):
                    raise JarmError(
                        f"{name} is a list of messages, which the template {self.template!r} cannot hold: use a model "
                        "with a chat template and `--template chat`."
                    )
            return self.form.prompt + fill(self.template, row)
        if self.form.prompt:
            raise JarmError(
                f"The model's prompt {self.form.prompt[:80]!r} goes before a text, and a chat is none: give "
                "--prompt-name none, or a --template with columns in braces."
            )
        prompt, response = row["prompt"], row["response"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages += [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
        return render(self._chat, self.own.special_tokens_map, messages)

    def encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """Token ids of rendered texts, each int32, and whether each was truncated.

        A chat template writes its own special tokens; else the tokenizer adds them. A second BOS is dropped.
        """
        short = [at for at, text in enumerate(texts) if len(text) <= self._whole]
        out: list[tuple[np.ndarray, bool]] = [self._long(text) if len(text) > self._whole else _NONE for text in texts]
        sizes = np.cumsum([len(texts[at]) for at in short]) // _AT_ONCE
        for _, part in itertools.groupby(zip(sizes, short, strict=True), key=lambda each: each[0]):
            rows = [at for _, at in part]
            for at, ids in zip(rows, self._ids([texts[at] for at in rows]), strict=True):
                long = len(ids) > self.max_length
                out[at] = self._cut(ids, self._head_of(ids)) if long else ids, long
        return [ids for ids, _ in out], [long for _, long in out]

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of whole texts."""
        own = self.template == CHAT
        every = [np.asarray(tokens, np.int32) for tokens in self._call(texts, special=not own)]
        if self._vocab is not None and (odd := [ids for ids in every if ids.max(initial=0) >= self._vocab]):
            (word,) = self.words(odd[0][[odd[0].argmax()]])
            raise JarmError(
                f"The tokenizer makes the token {odd[0].max()} ({word!r}), but the model has embeddings of "
                f"{self._vocab:,} tokens only: take the tokenizer that belongs to the model."
            )
        return [ids[int(self._bos is not None and ids[:2].tolist() == [self._bos] * 2) :] for ids in every]

    def _long(self, text: str) -> tuple[np.ndarray, bool]:
        """Ids of a text of many characters, from the end of it that stays: of two parts of it that give the same.

        A part may differ from the whole text in tokens near its other end. Where parts never agree, or give too few
        tokens, the largest part decides.
        """
        head = self._head_of(self._ids([text[:1024]])[0])
        before, size = _NONE[0], self._whole
        while True:
            ids = self._ids([text[:size] if self.keep == "start" else text[-size:]])[0]
            ids = np.concatenate([head, ids[len(self._head_of(ids)) :]])
            full = len(ids) > self.max_length
            kept = self._cut(ids, head) if full else ids
            if size >= len(text):
                return kept, full
            if size >= _AT_ONCE or (full and np.array_equal(kept, before)):
                return kept, True
            before = kept if full else _NONE[0]
            # Sizes differ by no multiple of a small number, so that repeated letters in tokens of several do not agree.
            size = min(size + (size // 210 + 1) * 210 + 1, max(size, _AT_ONCE))

    @property
    def said(self) -> str:
        """Form of texts in words."""
        before = f"the prompt {self.form.prompt[:80]!r} before each text, " if self.form.prompt else ""
        case = "lower case, " if self.form.lowercase else ""
        return f"{before}{case}up to {self.max_length:,} tokens, of longer texts the {self.keep}"

    def prompt_tokens(self) -> int:
        """Number of tokens of the model's prompt, with the special ones before it.

        Raises:
          JarmError: they leave no room for a text, or are cut off.
        """
        if self.keep == "end":
            raise JarmError(
                "The model leaves its prompt out of the pooling, and of long texts it would be cut: give --keep start, "
                "or --prompt-name none."
            )
        (ids,), _ = self.encode([self.form.prompt])
        count = len(ids) - (len(ids) > 0 and int(ids[-1]) in self.own.all_special_ids)
        if count + self._tail >= self.max_length:
            raise JarmError(
                f"The model's prompt has {count:,} tokens, and leaves no room for texts of up to {self.max_length:,}: "
                "give a larger --max-length, or --prompt-name none."
            )
        return count

    @property
    def ends(self) -> tuple[str, ...]:
        """Special tokens that end or fill texts, as text."""
        own = self.own
        return tuple({str(token) for token in (own.eos_token, own.pad_token) if token})

    def words(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Tokens as the vocabulary writes them."""
        return [str(self.own.convert_ids_to_tokens(int(i))) for i in ids]

    def _cut(self, ids: np.ndarray, head: np.ndarray) -> np.ndarray:
        """Ids that are too many without some in their middle; special tokens stay."""
        tail = self.special[1]
        body, room = ids[len(head) : len(ids) - tail], self.max_length - len(head) - tail
        kept = body[:room] if self.keep == "start" else body[len(body) - room :]
        return np.concatenate([head, kept, ids[len(ids) - tail :]])

    def _head_of(self, ids: np.ndarray) -> np.ndarray:
        """Special tokens at the beginning of ids, which stay where a text is cut."""
        return ids[: int(ids[:1].tolist() == [self._bos]) if self.template == CHAT else self._head]

    def _call(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Token ids as transformers gives them, with the special ones that it adds, or without."""
        with _faults("The tokenizer of the model fails"):
            ids = self.own(texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False)
        return list(ids["input_ids"])

    def _special(self) -> tuple[int, int]:
        """Numbers of special tokens that the tokenizer puts before and after a text."""
        with_, without = (self._call(["a"], special=add)[0] for add in (True, False))
        n = len(without)
        head = next((i for i in range(len(with_) - n + 1) if with_[i : i + n] == without), 0)
        return head, len(with_) - n - head

    def _fingerprint(self, folder: pathlib.Path) -> str:
        """Fingerprint of the whole tokenizer where it is a fast one, else of its files."""
        backend = getattr(self.own, "backend_tokenizer", None)
        if backend is not None:
            return _hash(backend.to_str())
        files = sorted(
            path for path in folder.iterdir() if path.name.startswith(("tokenizer", "vocab", "merges", "sp"))
        )
        return _hash("".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files))


def _load(folder: pathlib.Path, *, lowercase: bool) -> Any:
    """The tokenizer of a checkpoint, which neither truncates, pads nor warns, whatever its files say."""
    transformers = import_transformers()
    transformers.logging.set_verbosity_error()  # lengths are checked, counted and reported here
    with _faults(f"{folder} has no tokenizer that transformers can read"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        _ = tokenizer.all_special_ids  # looks them all up
        highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= _MAX_TOKENS:  # the vocabulary would be written with all numbers up to it
        raise JarmError(f"{folder} has a tokenizer with a token of number {highest:,}: download tokenizer.json again.")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    if lowercase:
        if backend is None:
            raise JarmError(
                f"{folder} has a slow tokenizer, which jarm cannot put in lower case: take a tokenizer.json."
            )
        from tokenizers.normalizers import Lowercase, Sequence

        own = backend.normalizer
        backend.normalizer = Lowercase() if own is None else Sequence([Lowercase(), own])
    return tokenizer


@contextlib.contextmanager
def _faults(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises, the panics of its Rust included, into one sentence."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = printable(" ".join(str(error).split()))[:200]
        raise JarmError(f"{what} ({reason}): download tokenizer.json and tokenizer_config.json again.") from error


def _chat_template(folder: pathlib.Path, tokenizer: Any) -> str | None:
    """The chat template of a checkpoint, of several the default one, or None."""
    own, beside = tokenizer.chat_template, folder / "chat_template.json"
    if not own and there(beside):  # of a processor, which tokenizers do not read
        own = read_json(beside, struct({"chat_template": string(1 << 24)}))["chat_template"]
    if isinstance(own, dict):
        if "default" not in own:
            names = printable(", ".join(map(str, own)))[:200]
            raise JarmError(
                f"{folder} has the chat templates {names}, and none that is the default: give a --template."
            )
        own = own["default"]
    if own and not isinstance(own, str):
        raise JarmError(f"{folder} has a chat template that is no text: download tokenizer_config.json again.")
    return own or None


def _own_length(folder: pathlib.Path, tokenizer: Any) -> int:
    """Largest number of tokens in a text, as the tokenizer says."""
    said = tokenizer.model_max_length
    if isinstance(said, bool) or not isinstance(said, (int, float)) or not said >= 1:
        raise JarmError(
            f"{folder / 'tokenizer_config.json'} has the `model_max_length` {str(said)[:40]!r}, no number of at least "
            "1: download it again, or give a --max-length."
        )
    return int(min(said, _ENDLESS))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
