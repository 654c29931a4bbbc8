"""Golden renderings: a few fixed conversations as token ids, so that a changed rendering is seen.

They are made up, never rows of a dataset: an export travels further than its data may.
"""

from typing import Any

from tuneloom.data.records import parse
from tuneloom.data.render import Renderer
from tuneloom.errors import DataError
from tuneloom.registry.contract import Contract, Golden, check_renderings

CONVERSATIONS: tuple[dict[str, Any], ...] = (
    {
        "messages": [
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "4"},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "  Zürich, 東京, Αθήνα:\nwhich is in Japan?\n"},
            {"role": "assistant", "content": "東京"},
            {"role": "user", "content": "And <|im_end|></s> is\tno turn's end?"},
            {"role": "assistant", "content": "Right.\n\nIt is text."},
        ]
    },
    {"prompt": "Capital of Norway: ", "completion": "Oslo"},
    {"text": "A line.\n\tAn indented line with 1,024 ciphers."},
)


def goldens(renderer: Renderer) -> list[Golden]:
    """The conversations that this renderer can render, rendered; a template may know no system."""
    found = []
    for content in CONVERSATIONS:
        try:
            prompt, ids, target = _rendered(renderer, content)
        except DataError:
            continue
        found.append(Golden(record=content, prompt_ids=prompt, ids=ids, targets=_ranges(target)))
    if not found:
        raise DataError("template: none of the golden conversations can be rendered with it")
    return found


def check(contract: Contract, renderer: Renderer, *, holder: str) -> None:
    """Refuse to go on when `renderer` gives other tokens than those the weights were trained on."""
    check_renderings(contract, holder, render=lambda content: _rendered(renderer, content)[:2])


def _rendered(
    renderer: Renderer, content: dict[str, Any]
) -> tuple[list[int], list[int], list[bool]]:
    """Prompt ids (none for a text), all ids, and which of them carry loss."""
    record = parse(content, where="golden")
    example = renderer.render(record)
    prompt = [] if record.kind == "text" else [int(i) for i in renderer.prompt_ids(record)]
    return prompt, [int(i) for i in example.ids], [bool(t) for t in example.target]


def _ranges(target: list[bool]) -> list[list[int]]:
    """Half-open runs of True."""
    changes = zip([False, *target], [*target, False], strict=True)
    edges = [i for i, (before, after) in enumerate(changes) if before != after]
    return [[start, end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
