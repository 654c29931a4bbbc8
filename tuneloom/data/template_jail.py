"""Runs chat templates under limits: a script of its own, started by template_probe.py.

Reads {"sources": [...], "variables": {...}} and writes one fault or null for each source. Imports
nothing of Tuneloom, so a start takes 0.06 s of CPU; each template runs in a fork of this process,
which is what the limits end.
"""

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS, MEGABYTES, CHARACTERS = 2, 512, 1_000_000
FULL, LONG = 3, 4  # exit codes of a fork
GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
LITERALS = 64
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}


def fault(source: str, variables: dict[str, Any]) -> str | None:
    """What is wrong with this template, found in a fork with limits; None is nothing."""
    child = os.fork()
    if not child:
        os._exit(_limited(source, variables))
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        killer = os.WTERMSIG(status)
        if killer in (signal.SIGXCPU, signal.SIGKILL):
            return f"takes more than {CPU_SECONDS} s of CPU for chats of a few words"
        return f"crashes with signal {killer}"
    if os.WEXITSTATUS(status) == FULL:
        return f"takes more than {MEGABYTES} MB for chats of a few words"
    if os.WEXITSTATUS(status) == LONG:
        return f"makes more than {CHARACTERS:,} characters of chats of a few words"
    assert os.WEXITSTATUS(status) == 0, status
    return None


def _limited(source: str, variables: dict[str, Any]) -> int:
    """Render every chat within the limits; the exit code of the fork."""
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, MEGABYTES << 20),
    ):
        resource.setrlimit(limit, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    try:
        return LONG if _too_long(source, variables) else 0
    except MemoryError:
        return FULL


def _too_long(source: str, variables: dict[str, Any]) -> bool:
    """Whether any chat becomes longer than CHARACTERS; a template may refuse what it likes."""
    environment = _environment()
    source = GENERATION.sub(lambda m: m[1] + ("endif" if m[2] else "if true") + m[3], source)
    try:
        template = environment.from_string(source)
        literals = _literals(environment, source)
    except (TemplateError, RecursionError, SyntaxError, ValueError, TypeError):
        return False  # it says so when it is loaded
    for chat in _chats(literals):
        length = 0
        try:
            for piece in template.generate(**variables, **chat):
                length += len(piece)
                if length > CHARACTERS:
                    return True
        except MemoryError:
            raise
        except Exception:  # a template is a program: it may raise anything, and is refused then
            continue
    return False


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers gives a chat template, but for the `generation` tag and the clock."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": str}
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _literals(environment: ImmutableSandboxedEnvironment, source: str) -> list[str]:
    """The strings that the template compares with: a message may be one of them."""
    found = (node.value for node in environment.parse(source).find_all(nodes.Const))
    return sorted({text for text in found if isinstance(text, str) and len(text) < 500})[:LITERALS]


def _chats(literals: list[str]) -> Iterator[dict[str, Any]]:
    """Chats of every make: short, long, many turns, parts, tools, thoughts, the literals."""
    for turns in _turns(literals):
        for tools in (None, [TOOL]):
            for prompt in (False, True):
                yield {"messages": turns, "tools": tools, "add_generation_prompt": prompt}


def _turns(literals: list[str]) -> Iterator[list[dict[str, Any]]]:
    for content in ("question", "a line\n" * 2_000, [{"type": "text", "text": "question"}]):
        system, user, answer = (
            {"role": role, "content": content} for role in ("system", "user", "assistant")
        )
        yield from ([user], [user, answer], [system, user, answer])
    short = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    yield short * 50
    yield [short[0], {**short[1], "reasoning_content": "so", "thinking": "so"}]
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    yield [short[0], called, {"role": "tool", "name": "look", "content": "seen"}, short[1]]
    for literal in literals:
        yield [{**turn, "content": literal} for turn in short]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(json.dumps([fault(source, asked["variables"]) for source in asked["sources"]]))
