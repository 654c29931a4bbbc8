"""Tokens of a mixture's train rows by dataset, as one tokenizer and its chat template make them."""

from collections import Counter
from pathlib import Path

from tuneloom.data.payloads import COMPARED
from tuneloom.data.render import Renderer
from tuneloom.data.rows import DatasetRows
from tuneloom.data.tokenizer import load_tokenizer

AT_ONCE = 256


class TokenCounter:
    """Renders as training does: text rows for pretrain, all others for sft, none of them cut."""

    def __init__(self, model: str, revision: str | None) -> None:
        tokenizer = load_tokenizer(model, revision)
        self.text, self.other = Renderer(tokenizer, "pretrain"), Renderer(tokenizer, "sft")

    def of(self, folder: Path) -> tuple[dict[str, int], int]:
        """Tokens by dataset name, which leads each row's source; a row taken twice counts twice.
        And the rows that compare two answers, which are no one text to count.
        """
        rows, found, compared = DatasetRows(folder, "train"), Counter[str](), 0
        for start in range(0, len(rows), AT_ONCE):
            several = range(start, min(start + AT_ONCE, len(rows)))
            part = [i for i in several if rows[i].kind != COMPARED]
            compared += len(several) - len(part)
            for renderer in (self.text, self.other):
                mine = [i for i in part if (rows[i].kind == "text") == (renderer is self.text)]
                places = [rows.where(i) for i in mine]
                for i, example in zip(
                    mine, renderer.render_many([rows[i] for i in mine], places), strict=True
                ):
                    found[rows.source(i).split("/")[0]] += example.tokens
        return dict(sorted(found.items())), compared
