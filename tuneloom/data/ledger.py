"""The account of a run's rows and tokens, per source: nothing is lost without being written down.

rows in = used + dropped by reason; tokens in = trained + masked + truncated + dropped. Padding is
made by batching and belongs to no source, so it is counted apart. A row counts once for every
epoch it is in.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuneloom.data.shards import write_whole
from tuneloom.data.tokens import TokenStore


@dataclass
class Account:
    """Counts of one source."""

    rows: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows by reason."""
    tokens: int = 0
    """Of all rows, before any cut."""
    trained: int = 0
    masked: int = 0
    truncated: int = 0
    dropped_tokens: int = 0


class Ledger:
    """Filled step by step on rank 0, which sees the rows of all ranks; saved with checkpoints."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.padded = 0

    def count(self, rows: np.ndarray, store: TokenStore, *, padded: int = 0) -> None:
        """Book rows of a step, or `plan.dropped`; `padded` is what batching them added."""
        self.padded += padded
        facts = store.facts(rows)
        for code in np.unique(facts.sources).tolist():
            mine = facts.sources == code
            kept, used = facts.kept[mine], facts.kept[mine] > 0
            tokens, trained = facts.tokens[mine].astype(np.int64), facts.trained[mine]
            account = self.accounts.setdefault(store.sources[code], Account())
            account.rows += len(kept)
            account.used += int(used.sum())
            account.tokens += int(tokens.sum())
            account.trained += int(trained.sum())
            account.masked += int((kept - trained).sum())
            account.truncated += int((tokens - kept)[used].sum())
            account.dropped_tokens += int(tokens[~used].sum())
            for row in rows[mine][~used].tolist():
                reason = store.dropped(row)
                account.dropped[reason] = account.dropped.get(reason, 0) + 1

    def check(self, *, rows: int | None = None, trained: int | None = None) -> None:
        """Assert that every source adds up, and that the totals are those measured elsewhere:
        `rows` by the plan (`plan.consumed`), `trained` by the loss over all steps."""
        for source, a in self.accounts.items():
            assert a.rows == a.used + sum(a.dropped.values()), (source, a)
            assert a.tokens == a.trained + a.masked + a.truncated + a.dropped_tokens, (source, a)
        total = self.total
        assert rows is None or total.rows == rows, (total, rows)
        assert trained is None or total.trained == trained, (total, trained)

    @property
    def total(self) -> Account:
        """All sources together."""
        total = Account()
        for account in self.accounts.values():
            for name, value in vars(account).items():
                if name != "dropped":
                    setattr(total, name, getattr(total, name) + value)
            for reason, rows in account.dropped.items():
                total.dropped[reason] = total.dropped.get(reason, 0) + rows
        return total

    def shares(self) -> dict[str, dict[str, float]]:
        """By source, its part of the rows that were used and of the tokens in them, from 0 to 1."""
        total = self.total
        kept = max(1, total.trained + total.masked)
        return {
            name: {"rows": round(a.used / max(1, total.used), 6),
                   "tokens": round((a.trained + a.masked) / kept, 6)}
            for name, a in sorted(self.accounts.items())
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """JSON of everything counted."""
        sources = {name: asdict(account) for name, account in sorted(self.accounts.items())}
        return {"sources": sources, "padded": self.padded}

    def restore(self, state: dict[str, Any]) -> None:
        self.accounts = {name: Account(**account) for name, account in state["sources"].items()}
        self.padded = state["padded"]

    def write(self, path: Path) -> None:
        """ledger.json: the sources, their total, what share of it each is, the padding."""
        whole = {**self.state(), "total": asdict(self.total), "shares": self.shares()}
        text = json.dumps(whole, indent=2)
        write_whole(path, text.encode())
