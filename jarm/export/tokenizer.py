"""The tokenizer of an export: what it pads with, what it puts around texts, and its files."""

from __future__ import annotations

import json
import pathlib

from jarm.core.files import there, write_whole
from jarm.core.outside import read_json
from jarm.embedding.tokens import CHAT, Tokenizer


def pad_apart(tokenizer: Tokenizer, vocab: int) -> int | None:
    """A token for padding that no text ends with, so that the last other token of a padded text is its end.

    It is the tokenizer's own, else its BOS, else a new one. A tokenizer that is written then pads with it.

    Args:
      tokenizer: that is to be written.
      vocab: tokens that the model has embeddings of.

    Returns:
      The token; None where the model has no room for a new one.
    """
    own, ends = tokenizer.own, {tokenizer.own.eos_token_id}
    if tokenizer.template == CHAT:
        ids, _ = tokenizer.encode([tokenizer.render({"prompt": "a", "response": "a"})])
        ends.add(int(ids[0][-1]))
    for name in ("pad_token", "bos_token"):
        token = getattr(own, f"{name}_id")
        if token is not None and token not in ends:
            own.pad_token = getattr(own, name)
            return int(token)
    if len(own) >= vocab:
        return None
    own.add_special_tokens({"pad_token": "<|pad|>"})
    return int(own.pad_token_id)


def pad_alone(tokenizer: Tokenizer) -> bool:
    """Put around a text and an empty second one what is put around the text alone, by the tokenizer that is written.

    Returns:
      Whether the tokenizer is a fast one, whose special tokens can be set.
    """
    backend = getattr(tokenizer.own, "backend_tokenizer", None)
    if backend is None:
        return False
    from tokenizers.processors import TemplateProcessing

    head, tail = tokenizer.special
    (ids,), _ = tokenizer.encode(["a"])
    around = list(zip(tokenizer.words(ids), ids.tolist(), strict=True))
    before, after = around[:head], around[len(ids) - tail :]
    first, last = ([f"{word}:0" for word, _ in part] for part in (before, after))
    backend.post_processor = TemplateProcessing(
        single=[*first, "$A:0", *last], pair=[*first, "$A:0", "$B:0", *last], special_tokens=before + after
    )
    return True


def write_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Write the tokenizer's files, with the lengths and the chat template that this one has."""
    own, before = tokenizer.own, tokenizer.own.model_max_length
    own.model_max_length, own.padding_side = tokenizer.max_length, "right"
    own.truncation_side = "left" if tokenizer.keep == "end" else "right"
    own.save_pretrained(folder)
    own.model_max_length = before
    if there(folder / "tokenizer.json"):  # read as it is: the classes of families set special tokens of their own
        path = folder / "tokenizer_config.json"
        said = {
            **read_json(path),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "truncation_side": "left" if tokenizer.keep == "end" else "right",
            "padding_side": "right",
        }
        write_whole(path, json.dumps(said, indent=1, ensure_ascii=False) + "\n")
