"""The process that renders chat templates: run as a file, it reads JSON objects, a line each, and answers each with one.

Templates come with other people's models. Jinja's sandbox keeps them from Python's objects; this process bounds their memory
and their time, and dies of a template that takes more.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

MEMORY_BYTES, MOST_CHARACTERS = 1 << 30, 1 << 22


@lru_cache
def compiled(template: str) -> Any:
    """Returns a template with the extensions, filter and functions that transformers gives to chat templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, around what the model is trained to say: plain text here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(template)


def answer(template: str, variables: dict[str, Any], seconds: float) -> dict[str, str]:
    """Returns a rendered template under "text", or what is wrong with it under "error".

    Args:
        seconds: of processor time after which Linux ends the process.
    """
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        text = compiled(template).render(**variables)
        if len(text) <= MOST_CHARACTERS:
            return {"text": text}
        return {"error": f"it makes {len(text):,} characters, and {MOST_CHARACTERS:,} are allowed"}
    except Exception as error:  # whatever a template does
        return {"error": " ".join(f"{error}".split())[:500] or type(error).__name__}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answers until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    del sys.path[0]  # this file's folder
    main()
