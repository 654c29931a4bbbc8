"""Imports that cost less on the way to the first step: packages no run needs, and no sweeps of
garbage.

CPU-seconds of torch, a Llama, PEFT and DeepSpeed, 2 cores: 4.4; without sweeps 3.4; without
bitsandbytes and SciPy, too, 2.9 (0.5 to 1 s are saved by either). pandas would take another 0.5.
"""

import atexit
import functools
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MANY = 50
"""Modules; a second run of a process imports fewer, and what its first one left is garbage."""


@contextmanager
def unswept() -> Iterator[None]:
    """Collect no garbage: imports make a million objects, of which hardly any are garbage, and the
    collector would look at all of them again and again. Where much was imported, it never looks at
    what is there by then (0.6 s up to the first step).
    """
    was_on, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules + MANY:
            gc.freeze()
            atexit.register(
                gc.unfreeze
            )  # or nanobind's modules call what is left a leak, at length
        if was_on:
            gc.enable()


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Packages that are not imported yet look as if they were not installed.

    None in sys.modules is Python's own way to say so: `import` raises ModuleNotFoundError and
    `find_spec` answers None. What transformers and PEFT remember of it is forgotten afterwards, so
    that a later run of this process finds the packages.
    """
    hidden = [name for name in packages if name not in sys.modules]
    if not hidden:
        yield
        return
    _forget()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        _forget()


def _forget() -> None:
    """Empty the caches of `is the package there?` in what is imported of transformers and PEFT."""
    for home, probes in (
        ("peft.import_utils", ("is_bnb_available", "is_bnb_4bit_available")),
        ("transformers.utils.import_utils", ("is_scipy_available", "is_bitsandbytes_available")),
    ):
        for probe in probes if home in sys.modules else ():
            getattr(sys.modules[home], probe).cache_clear()


def modelling() -> None:
    """transformers' model classes, without SciPy, which only losses of object detection use, and
    without kernels from the hub: what a checkout answers to that name is our own folder, in which
    transformers looks for a version through the metadata of every installed package.
    """
    with unswept(), absent("scipy", "kernels"):
        import transformers.modeling_utils  # noqa: F401


def adapters() -> None:
    """PEFT, without bitsandbytes, which it imports to no use where no weight is quantised: 1 s.

    (peft.helpers, the module that does, holds a conversion to LoRA that is not called here.)
    """
    modelling()
    with unswept(), absent("bitsandbytes"):
        import peft  # noqa: F401


class _NoPandas:
    """For sys.meta_path: pandas cannot be found."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name=name)


def arrow() -> None:
    """pyarrow, which looks for pandas at its first array and remembers that there was none: 0.5 s.

    (It asks `sys.modules` in a way of its own, so that `absent` would not do.)
    """
    import pyarrow

    sys.meta_path.insert(0, _NoPandas)
    try:
        pyarrow.array([0], pyarrow.int64())
    finally:
        sys.meta_path.remove(_NoPandas)


def muon() -> None:
    """DeepSpeed's Muon, which ZeRO imports for any optimizer and decorates with torch.compile; that
    imports the inductor even where TORCH_COMPILE_DISABLE says that nothing is to be compiled.

    Where it says so, the decorator is told, too: the same functions, run as they are.
    """
    if os.environ.get("TORCH_COMPILE_DISABLE") != "1":
        return
    import torch

    compiling = torch.compile
    torch.compile = functools.partial(compiling, disable=True)
    try:
        with unswept():
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compiling
