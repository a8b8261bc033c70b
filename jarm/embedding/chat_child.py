"""The program that `chat` starts: a chat template is a program of whoever made the model, and runs here, within limits.

It reads requests and writes answers, each a line of JSON, and imports nothing of jarm, so that it starts fast.
"""

import faulthandler
import json
import os
import sys
from typing import Any

GROWTH, ROOM = 16, 1 << 20
"""A rendered text has at most so many times the characters of its messages, or `ROOM`."""
SIZE_PER_BYTE, SPEED = 32, 1e7
"""Further bytes of memory for each byte of a request, and bytes of a request for each further second."""


def answer(request: bytes) -> dict[str, str]:
    """The text of messages, or the reason why there is none."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        template, tokens, messages = json.loads(request)
        texts: Any = render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=False, **tokens
        )[0]
        text = str(texts[0])
    except MemoryError:
        return {"reason": "it needs too much memory"}
    except Exception as error:  # templates are programs and raise anything
        return {"reason": " ".join(str(error).split())[:200]}
    if len(text) > max(ROOM, GROWTH * len(request)):
        return {"reason": f"it makes a text of {len(text):,} characters of them"}
    return {"text": text}


def limit_memory(size: int) -> None:
    """Let this process take so many more bytes, where the system can limit them."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + size, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        return


def main(seconds: float, memory: int) -> None:
    """Answer requests until there are no more, or one takes too long."""
    with open(os.devnull, "w") as silent:
        for request in sys.stdin.buffer:
            limit_memory(memory + SIZE_PER_BYTE * len(request))
            faulthandler.dump_traceback_later(seconds + len(request) / SPEED, exit=True, file=silent)
            line = json.dumps(answer(request))
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.buffer.write(line.encode() + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    import transformers.utils.chat_template_utils  # noqa: F401  before the clock runs

    main(float(sys.argv[1]), int(sys.argv[2]))
