"""From prompt and response to token ids: template, special tokens, truncation; what decides them has a fingerprint."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jarm.core.status import JarmError
from jarm.data.store import fields, fill
from jarm.data.texts import TEMPLATE

CHAT = "chat"
"""The template that is the model's own."""
CHAT_KEY = "{prompt}\x1e{response}"
"""What the key of a text stands for under a chat template: no prompt and response make another pair's."""
KEEP = ("start", "end")
_ENDLESS = 1 << 30
# Templates may write the day into a text; a store has to hold the same text on all days.
_DATED, _DAY = "strftime_now", "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class Tokenizer:
    """Texts of one model: `render` joins a row's columns, `encode` gives the ids of texts.

    Attributes:
      template: `chat`, or columns in braces.
      key_template: what `key_of` is taken of, in columns.
      max_length: tokens in a text, special ones included.
      keep: where a text is longer, its `start` or its `end` stays, and the special tokens around it.
      made_by: all of it that decides the ids, for a store.
    """

    def __init__(self, folder: pathlib.Path, *, template: str | None, max_length: int | None, keep: str, window: int):
        """Load the tokenizer of a checkpoint.

        Args:
          folder: the checkpoint.
          template: `chat`, or columns in braces; if None, `chat` where the model has a chat template, else
            `{prompt}\\n\\n{response}`.
          max_length: at most the window; if None, the window, or less where the tokenizer says so.
          keep: `start` or `end`.
          window: positions that the model has.

        Raises:
          JarmError: no tokenizer, no chat template where one is asked for, or a template or length that cannot be.
        """
        from transformers import AutoTokenizer  # heavy, and needed by nobody who only reads embeddings
        from transformers.utils import logging

        logging.set_verbosity_error()  # lengths are checked, counted and reported here
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # every library below has its own kinds
            reason = " ".join(str(error).split())[:200]
            raise JarmError(
                f"{folder} has no tokenizer that transformers can read ({reason}): download tokenizer.json and "
                "tokenizer_config.json again."
            ) from error
        own = self._tokenizer.chat_template
        if isinstance(own, str) and _DATED in own:
            own = self._tokenizer.chat_template = _DAY + own
        self.template = template or (CHAT if own else TEMPLATE)
        if self.template == CHAT and not own:
            raise JarmError(f"{folder} has no chat template: give a --template such as '{{prompt}}\\n\\n{{response}}'.")
        if self.template != CHAT and not fields(self.template):
            raise JarmError(
                f"The template {self.template!r} names no column: write one such as '{{prompt}} {{response}}'."
            )
        self.key_template = CHAT_KEY if self.template == CHAT else self.template
        if keep not in KEEP:
            raise JarmError(f"Of a text too long one keeps the {' or the '.join(KEEP)}, not the {keep!r}.")
        self.keep = keep
        self._bos = self._tokenizer.bos_token_id
        self._head, self._tail = self._special()
        usual = min(window, self._tokenizer.model_max_length)
        self.max_length = usual if max_length is None else max_length
        if not self._head + self._tail < self.max_length <= window:
            least = self._head + self._tail + 1
            raise JarmError(
                f"Texts cannot be cut to {self.max_length:,} tokens: give a --max-length of {least} to {window:,}, the "
                f"positions of this model, of which {least - 1} go to special tokens."
            )
        # Neither truncates, pads nor warns from here on, whatever its files say.
        self._tokenizer.model_max_length = _ENDLESS
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
        self.made_by: dict[str, Any] = {
            "template": self.key_template,
            "chat_template": _hash(json.dumps(own)) if self.template == CHAT else None,
            "tokenizer": self._fingerprint(folder),
            "max_length": self.max_length,
            "keep": self.keep,
        }

    def render(self, row: Mapping[str, Any]) -> str:
        """The exact text that the model gets of a row, without the special tokens that the tokenizer adds.

        Args:
          row: `prompt` and `response`, each a text or a list of messages, and whatever else the template names.

        Raises:
          JarmError: messages without a chat template, or a chat template that refuses them.
        """
        if self.template != CHAT:
            for name in fields(self.template):
                if isinstance(row[name], list):
                    raise JarmError(
                        f"{name} is a list of messages, which the template {self.template!r} cannot hold: use a model "
                        "with a chat template and `--template chat`."
                    )
            return fill(self.template, row)
        prompt, response = row["prompt"], row["response"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages += [{"role": "assistant", "content": response}] if isinstance(response, str) else list(response)
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # templates are programs
            reason = " ".join(str(error).split())[:200]
            raise JarmError(f"The model's chat template refuses these messages ({reason}).") from error

    def encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """Token ids of rendered texts, each int32, and whether each had to be cut.

        A chat template writes its own special tokens; else the tokenizer adds them. BOS is never there twice.
        """
        own = self.template == CHAT
        batch = self._tokenizer(
            list(texts), add_special_tokens=not own, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        out = []
        for tokens in batch:
            ids = np.asarray(tokens, np.int32)
            if self._bos is not None and len(ids) > 1 and ids[0] == ids[1] == self._bos:
                ids = ids[1:]
            out.append(ids)
        long = [len(ids) > self.max_length for ids in out]
        return [self._cut(ids) if cut else ids for ids, cut in zip(out, long, strict=True)], long

    def words(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """Tokens in writing."""
        return [str(self._tokenizer.convert_ids_to_tokens(int(i))) for i in ids]

    def _cut(self, ids: np.ndarray) -> np.ndarray:
        room, head, tail = self.max_length, self._head, self._tail
        if self.template == CHAT:
            head, tail = int(ids[0] == self._bos), 0
        body = ids[head : len(ids) - tail]
        kept = body[: room - head - tail] if self.keep == "start" else body[len(body) - (room - head - tail) :]
        return np.concatenate([ids[:head], kept, ids[len(ids) - tail :]])

    def _special(self) -> tuple[int, int]:
        """How many special tokens the tokenizer puts before and after a text."""
        with_, without = (self._tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
        n = len(without)
        head = next((i for i in range(len(with_) - n + 1) if with_[i : i + n] == without), 0)
        return head, len(with_) - n - head

    def _fingerprint(self, folder: pathlib.Path) -> str:
        """Of the whole tokenizer where it is of the usual kind, else of its files."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return _hash(backend.to_str())
        files = sorted(
            path for path in folder.iterdir() if path.name.startswith(("tokenizer", "vocab", "merges", "sp"))
        )
        return _hash("".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
