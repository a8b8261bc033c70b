"""Chat templates, rendered in a process of their own that ends itself where one takes too long or too much memory."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jarm.core.messages import readable
from jarm.core.status import JarmError

SECONDS, MEMORY = 10.0, 1 << 30
"""Limits of one text; both grow with the size of its messages."""

_LOCK = threading.Lock()
_CHILDREN: dict[int, subprocess.Popen[bytes]] = {}  # by the process that started it: a fork may not share its pipes


def render(template: str, tokens: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
    """The text that a chat template makes of messages.

    Args:
      template: in Jinja.
      tokens: special tokens by name.
      messages: each with its role and content.

    Raises:
      JarmError: the template refuses the messages, or exceeds the limits.
    """
    request = json.dumps([template, tokens, messages], default=str).encode() + b"\n"
    with _LOCK:
        child = _child()
        try:
            line = _answer(child, request)
        except BaseException:  # what is left in the pipes belongs to no later request
            _stop()
            raise
        if not line.endswith(b"\n"):
            _stop()
            raise JarmError(
                f"The model's chat template takes more than {SECONDS:.0f} s or {readable(MEMORY)} for these messages: "
                "give a --template, such as '{prompt} {response}', or use another model."
            )
    answer = json.loads(line)
    if "reason" in answer:
        raise JarmError(f"The model's chat template refuses these messages ({answer['reason']}).")
    return str(answer["text"])


def _answer(child: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The line that the child answers; not a whole one if it ended."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(request)
        child.stdin.flush()
        return child.stdout.readline()
    except OSError:
        return b""


def _child() -> subprocess.Popen[bytes]:
    """The child of this process, started if there is none; signals of the terminal do not reach it."""
    if os.getpid() not in _CHILDREN:
        program = pathlib.Path(__file__).with_name("chat_child.py")
        _CHILDREN[os.getpid()] = subprocess.Popen(
            [sys.executable, "-P", str(program), str(SECONDS), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return _CHILDREN[os.getpid()]


@atexit.register
def _stop() -> None:
    child = _CHILDREN.pop(os.getpid(), None)
    if child is not None:
        child.kill()
        with contextlib.suppress(OSError):
            child.communicate()
