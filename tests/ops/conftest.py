"""For tests of ops that write all of what they allocate."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned_outputs() -> Iterator[None]:
    """Memory that an op allocates holds NaN until it is written."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
