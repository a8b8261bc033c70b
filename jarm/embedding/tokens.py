"""From prompt and response to token ids: template, special tokens, truncation, and a fingerprint of all three."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jarm.core.messages import printable
from jarm.core.outside import read_json, record, text
from jarm.core.status import JarmError
from jarm.data.store import fields, fill
from jarm.data.texts import TEMPLATE, check_template
from jarm.llm.config import import_transformers

CHAT = "chat"
"""Name of the model's own template."""
CHAT_KEY = "{prompt}\x1e{response}"
"""Template of keys under a chat template: no two pairs of prompt and response fill it alike."""
KEEP = ("start", "end")
_ENDLESS, _MAX_TOKENS = 1 << 30, 1 << 24
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
        self._tokenizer = _load(folder, lowercase=self.form.lowercase)
        own = self._tokenizer.chat_template = _chat_template(folder, self._tokenizer)
        if own is not None and _DATED in own:
            own = self._tokenizer.chat_template = _DAY + own
        self.template = template if template is not None else CHAT if own else TEMPLATE
        if self.template == CHAT and not own:
            raise JarmError(f"{folder} has no chat template: give a --template such as '{{prompt}}\\n\\n{{response}}'.")
        if self.template != CHAT:
            check_template(self.template)
        self.key_template = CHAT_KEY if self.template == CHAT else self.template
        if keep is None:
            keep = "end" if self._tokenizer.truncation_side == "left" else "start"
        if keep not in KEEP:
            raise JarmError(
                f"Truncation keeps the start or the end of a text, not the {keep!r}: give --keep start or end."
            )
        self.keep = keep
        self._bos = self._tokenizer.bos_token_id
        self._head, self._tail = self._special()
        if max_length is None:
            max_length = min(window, self.form.max_length or _own_length(folder, self._tokenizer))
        self.max_length = max_length
        if not self._head + self._tail < self.max_length <= window:
            special = self._head + self._tail
            raise JarmError(
                f"Texts cannot be cut to {self.max_length:,} tokens: give a --max-length of {special + 1} to "
                f"{window:,}, the positions of this model, of which {special} go to special tokens."
            )
        self._tokenizer.model_max_length = _ENDLESS
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
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates are programs and raise anything
            reason = " ".join(str(error).split())[:200]
            raise JarmError(f"The model's chat template refuses these messages ({reason}).") from error

    def encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """Token ids of rendered texts, each int32, and whether each was truncated.

        A chat template writes its own special tokens; else the tokenizer adds them. A second BOS is dropped.
        """
        own = self.template == CHAT
        out = []
        for tokens in self._call(list(texts), special=not own):
            ids = np.asarray(tokens, np.int32)
            if self._vocab is not None and len(ids) and ids.max() >= self._vocab:
                raise JarmError(
                    f"The tokenizer makes the token {int(ids.max())} ({self.words([ids.max()])[0]!r}), but the model "
                    f"has embeddings of {self._vocab:,} tokens only: take the tokenizer that belongs to the model."
                )
            if self._bos is not None and len(ids) > 1 and ids[0] == ids[1] == self._bos:
                ids = ids[1:]
            out.append(ids)
        long = [len(ids) > self.max_length for ids in out]
        return [self._cut(ids) if cut else ids for ids, cut in zip(out, long, strict=True)], long

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
        count = len(ids) - (len(ids) > 0 and int(ids[-1]) in self._tokenizer.all_special_ids)
        if count + self._tail >= self.max_length:
            raise JarmError(
                f"The model's prompt has {count:,} tokens, and leaves no room for texts of up to {self.max_length:,}: "
                "give a larger --max-length, or --prompt-name none."
            )
        return count

    def words(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Tokens as the vocabulary writes them."""
        return [str(self._tokenizer.convert_ids_to_tokens(int(i))) for i in ids]

    def _call(self, texts: list[str], *, special: bool) -> list[list[int]]:
        """Token ids as transformers gives them, with the special ones that it adds, or without."""
        with _faults("The tokenizer of the model fails"):
            ids = self._tokenizer(
                texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
            )
        return list(ids["input_ids"])

    def _cut(self, ids: np.ndarray) -> np.ndarray:
        room, head, tail = self.max_length, self._head, self._tail
        if self.template == CHAT:
            head, tail = int(ids[0] == self._bos), 0
        body = ids[head : len(ids) - tail]
        kept = body[: room - head - tail] if self.keep == "start" else body[len(body) - (room - head - tail) :]
        return np.concatenate([ids[:head], kept, ids[len(ids) - tail :]])

    def _special(self) -> tuple[int, int]:
        """Numbers of special tokens that the tokenizer puts before and after a text."""
        with_, without = (self._call(["a"], special=add)[0] for add in (True, False))
        n = len(without)
        head = next((i for i in range(len(with_) - n + 1) if with_[i : i + n] == without), 0)
        return head, len(with_) - n - head

    def _fingerprint(self, folder: pathlib.Path) -> str:
        """Fingerprint of the whole tokenizer where it is a fast one, else of its files."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
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
    if not own and beside.exists():  # of a processor, which tokenizers do not read
        own = read_json(beside, record({"chat_template": text(1 << 24)}))["chat_template"]
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
