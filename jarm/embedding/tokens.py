"""From prompt and response to token ids: template, special tokens, truncation, and a fingerprint of all three."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jarm.core.status import JarmError
from jarm.data.store import fields, fill
from jarm.data.texts import TEMPLATE, check_template

CHAT = "chat"
"""Name of the model's own template."""
CHAT_KEY = "{prompt}\x1e{response}"
"""Template of keys under a chat template: no two pairs of prompt and response fill it alike."""
KEEP = ("start", "end")
_ENDLESS = 1 << 30
# Templates may write the date into a text; a store has to hold the same text on all days.
_DATED, _DAY = "strftime_now", "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class Tokenizer:
    """Texts of one model: `render` joins the columns of a row, `encode` gives the ids of texts.

    Attributes:
      template: `chat`, or columns in braces.
      key_template: template of the texts whose keys a store has.
      max_length: largest number of tokens in a text, special ones included.
      keep: the end of a longer text that stays, `start` or `end`, with the special tokens around it.
      made_by: all settings that decide the ids, for the `made_by` of a store.
    """

    def __init__(self, folder: pathlib.Path, *, template: str | None, max_length: int | None, keep: str, window: int):
        """Load the tokenizer of a checkpoint.

        Args:
          folder: the checkpoint.
          template: `chat`, or columns in braces; if None, `chat` where the model has a chat template, else
            `{prompt}\\n\\n{response}`.
          max_length: at most the window; if None, the window, or less where the tokenizer says so.
          keep: `start` or `end`.
          window: positions of the model.

        Raises:
          JarmError: no tokenizer, no chat template where one is asked for, or a template or length that does not fit.
        """
        self._tokenizer = _load(folder)
        own = self._tokenizer.chat_template
        if isinstance(own, str) and _DATED in own:
            own = self._tokenizer.chat_template = _DAY + own
        self.template = template if template is not None else CHAT if own else TEMPLATE
        if self.template == CHAT and not own:
            raise JarmError(f"{folder} has no chat template: give a --template such as '{{prompt}}\\n\\n{{response}}'.")
        if self.template != CHAT:
            check_template(self.template)
        self.key_template = CHAT_KEY if self.template == CHAT else self.template
        if keep not in KEEP:
            raise JarmError(
                f"Truncation keeps the start or the end of a text, not the {keep!r}: give --keep start or end."
            )
        self.keep = keep
        self._bos = self._tokenizer.bos_token_id
        self._head, self._tail = self._special()
        usual = min(window, self._tokenizer.model_max_length)
        self.max_length = usual if max_length is None else max_length
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
            return fill(self.template, row)
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
        """Tokens as the vocabulary writes them."""
        return [str(self._tokenizer.convert_ids_to_tokens(int(i))) for i in ids]

    def _cut(self, ids: np.ndarray) -> np.ndarray:
        room, head, tail = self.max_length, self._head, self._tail
        if self.template == CHAT:
            head, tail = int(ids[0] == self._bos), 0
        body = ids[head : len(ids) - tail]
        kept = body[: room - head - tail] if self.keep == "start" else body[len(body) - (room - head - tail) :]
        return np.concatenate([ids[:head], kept, ids[len(ids) - tail :]])

    def _special(self) -> tuple[int, int]:
        """Numbers of special tokens that the tokenizer puts before and after a text."""
        with_, without = (self._tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
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


def _load(folder: pathlib.Path) -> Any:
    """The tokenizer of a checkpoint, which neither truncates, pads nor warns, whatever its files say."""
    from transformers import AutoTokenizer  # heavy, and unused by those who only read embeddings
    from transformers.utils import logging

    logging.set_verbosity_error()  # lengths are checked, counted and reported here
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each library below has its own kinds
        reason = " ".join(str(error).split())[:200]
        raise JarmError(
            f"{folder} has no tokenizer that transformers can read ({reason}): download tokenizer.json and "
            "tokenizer_config.json again."
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
