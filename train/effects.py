"""Receipts: after warm-up, what each enabled option really did; one that did nothing ends the run.

Options that are validated, documented and then read by nothing are this field's commonest lie (Muon
under ZeRO-3, DeepSpeed#8438; sequence parallelism, ms-swift#10061). Each receipt below is an
observation of the running engine, never a copy of the config.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuneloom.errors import TrainingError
from tuneloom.kernels import attention, fp8, jit, loss_head, nf4, patch
from tuneloom.train import compiled, graphed, masters, offload, sequence, tiles
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import World
from tuneloom.train.flops import true_numel
from tuneloom.train.model import DTYPES, RECOMPUTED

EVEN = 0.5
"""Median over largest singular value of an update: above it Muon acted, AdamW stays below."""


@dataclass(frozen=True)
class Receipt:
    """One option, whether it acted, and the evidence."""

    option: str
    acted: bool
    evidence: dict[str, Any]


FP8_LINEARS = (fp8.Fp8Linear, fp8.Fp8TrainedLinear)


class Witness:
    """Collects evidence during the first steps; `receipts` is called once, after `effects_step`."""

    def __init__(
        self, config: TrainConfig, engine: Any, world: World, graphs: graphed.Graphs | None = None
    ) -> None:
        self.config, self.engine, self.world = config, engine, world
        self.graphs = graphs
        self.network: nn.Module = engine.module
        self._sharded = engine.zero_optimization_stage() > 0
        self._gradients: dict[str, float] = {}
        self._update: dict[str, Any] | None = None
        self._before: tuple[str, Tensor] | None = None
        self._documents: list[int] = []
        attention.CALLS.clear()
        jit.CALLS.clear()
        self.prefetch = nf4.of(self.network)
        if self.prefetch is not None:
            self.prefetch.counts.clear()
        sequence.SEEN.clear()
        tiles.SEEN.clear()
        compiled.SEEN.clear()
        graphed.SEEN.clear()
        offload.MOVED.clear()
        RECOMPUTED.clear()

    def saw_micro_batches(self, documents: list[int]) -> None:
        """Documents in each micro-batch of a step that is about to run."""
        self._documents += documents

    def before_step(self) -> None:
        """Between the last backward and the optimizer step of the watched step; collective."""
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                gradient = _gradient(parameter, sharded=self._sharded)
                self._gradients[name] = 0.0 if gradient is None else float(gradient.float().norm())
        matrices = list(_matrices(self.network, muon=self.config.optim.name == "muon"))
        moving = [m for m in matrices if self._gradients[m[0]] > 0]  # LoRA's A is still at step 1
        if moving:  # the smallest: of an embedding neither a copy nor its singular values are cheap
            name, parameter = min(moving, key=lambda matrix: true_numel(matrix[1]))
            self._before = (name, masters.master(self.engine, parameter).float().clone())

    def after_step(self) -> None:
        """After the optimizer step of the watched step; collective."""
        if self._before is None:
            return
        name, before = self._before
        after = masters.master(self.engine, dict(self.network.named_parameters())[name])
        change = after.float() - before
        values = torch.linalg.svdvals(change)
        self._update = {
            "parameter": name,
            "norm": float(change.norm()),
            "singular_values": {"largest": float(values[0]), "median": float(values.median())},
        }

    def receipts(self) -> list[Receipt]:
        """Every receipt, in the order of the config; collective evidence was gathered before."""
        return [*self._method(), *self._optimizer(), *self._zero(), *self._model(), *self._batch()]

    def _method(self) -> Iterator[Receipt]:
        method = self.config.method
        moved = {n: g for n, g in self._gradients.items() if g > 0}
        still = sorted(set(self._gradients) - set(moved))
        evidence: dict[str, Any] = {
            "trainable_tensors": len(self._gradients),
            "with_gradient": len(moved),
            "without_gradient": still[:10],
            "trainable_parameters": sum(
                true_numel(p) for p in self.network.parameters() if p.requires_grad
            ),
        }
        yield Receipt(f"method={method.kind}", bool(moved), evidence)
        if method.kind == "qlora":
            quantised = [  # PEFT's wrapper around one has the same class name
                m
                for m in self.network.modules()
                if type(m).__name__ == "Linear4bit" and not hasattr(m, "lora_A")
            ]
            yield Receipt("method=qlora", bool(quantised), {"modules_in_nf4": len(quantised)})
        if method.prefetch:
            asked = {"hits": 0, "misses": 0} | dict(self.prefetch.counts if self.prefetch else {})
            held = self.prefetch.bytes if self.prefetch else 0
            evidence = asked | {"buffer_bytes": held}
            yield Receipt("method.prefetch", asked["hits"] > 0, evidence)
        if method.dora:
            vectors = [n for n in moved if "lora_magnitude_vector" in n]
            yield Receipt(
                "method.dora", bool(vectors), {"magnitude_vectors_with_gradient": len(vectors)}
            )
        if method.rslora:
            layers: list[Any] = [m for m in self.network.modules() if hasattr(m, "lora_A")]
            # PEFT gives the fused gate and up of stacked experts twice the rank and alpha.
            wanted = {
                n * method.alpha / math.sqrt(n * method.rank): n * method.rank for n in (1, 2)
            }
            found = {
                (scale, layer.r[name]) for layer in layers for name, scale in layer.scaling.items()
            }
            acted = bool(found) and all(wanted.get(scale) == rank for scale, rank in found)
            yield Receipt("method.rslora", acted, {"scaling": sorted(scale for scale, _ in found)})
        for extra in method.extra_modules:
            names = [n for n in moved if f"{extra}.modules_to_save" in n]
            yield Receipt(
                f"method.extra_modules={extra}", bool(names), {"with_gradient": len(names)}
            )

    def _optimizer(self) -> Iterator[Receipt]:
        optim = self.config.optim
        branches: dict[str, int] = {}
        for parameter in self.network.parameters():
            if parameter.requires_grad:
                branch = "muon" if getattr(parameter, "use_muon", False) else "adamw"
                branches[branch] = branches.get(branch, 0) + true_numel(parameter)
        base = getattr(self.engine, "basic_optimizer", None)
        evidence: dict[str, Any] = {
            "class": type(base).__name__, "parameters_by_branch": branches, "update": self._update,
        }  # fmt: skip
        acted = self._update is not None and self._update["norm"] > 0
        if optim.name == "muon" and self._update is not None:
            # Newton-Schulz brings singular values near one another; AdamW's spread over decades.
            values = self._update["singular_values"]
            level = values["median"] > EVEN * values["largest"]
            acted = acted and branches.get("muon", 0) > 0 and level
        if optim.name == "adamw8bit":
            acted = acted and "8bit" in type(base).__name__
        yield Receipt(f"optim={optim.name}", acted, evidence)

    def _zero(self) -> Iterator[Receipt]:
        zero = self.config.zero
        stage = int(self.engine.zero_optimization_stage())
        local = _optimizer_bytes(self.engine)
        yield Receipt(
            f"zero.stage={zero.stage}",
            stage == zero.stage,
            {
                "stage": stage,
                "ranks": self.engine.dp_world_size,
                "optimizer_bytes_on_this_rank": local,
                "sharded_parameters": sum(hasattr(p, "ds_id") for p in self.network.parameters()),
            },
        )
        if zero.offload != "none":
            optimizer = self.engine.optimizer
            enabled = any(getattr(optimizer, k, None) for k in ("cpu_offload", "offload_optimizer"))
            moved = local if zero.offload == "cpu" else _bytes_swapped(optimizer)
            kind = type(self.engine.basic_optimizer).__name__
            evidence = {"offloaded_bytes": moved, "optimizer": kind}
            yield Receipt(f"zero.offload={zero.offload}", enabled and moved > 0, evidence)
        if zero.offload_parameters != "none":
            moved = _parameter_bytes(self.network, zero.offload_parameters)
            yield Receipt(
                f"zero.offload_parameters={zero.offload_parameters}",
                moved > 0,
                {"offloaded_bytes": moved},
            )

    def _model(self) -> Iterator[Receipt]:
        model = self.config.model
        calls = dict(attention.CALLS)
        reasons = {backend: attention.REASONS[backend] for backend in calls}
        ran = {"calls": calls, "reasons": reasons}
        yield Receipt(f"model.attention={model.attention}", bool(calls), ran)
        dtypes: dict[str, int] = {}
        for parameter in self.network.parameters():
            dtypes[str(parameter.dtype).removeprefix("torch.")] = dtypes.get(
                str(parameter.dtype).removeprefix("torch."), 0
            ) + true_numel(parameter)
        wanted = str(DTYPES[model.dtype]).removeprefix("torch.")
        held = masters.dtypes(self.engine)
        yield Receipt(
            f"model.dtype={model.dtype}",
            wanted in dtypes and held["masters"] == ["float32"],
            {"parameters": dtypes} | held,
        )
        if model.kernels:
            ran = dict(jit.CALLS)
            yield Receipt("model.kernels", any(ran.get(op) for op in patch.OPS), {"calls": ran})
        if model.compile:
            spent = compiled.cost()
            layers_run = compiled.SEEN["forwards"]
            if self.world.first:
                print(f"model.compile: {spent.graphs} graphs in {spent.seconds:.1f} s", flush=True)
            yield Receipt(
                "model.compile",
                layers_run > 0 and spent.graphs > 0,
                {"compiled_forwards": layers_run} | asdict(spent),
            )
        if model.cuda_graphs:
            yield self._graphs()
        if model.fp8:
            evidence = {
                "linears": sum(isinstance(m, FP8_LINEARS) for m in self.network.modules()),
                "products_forward": jit.CALLS["fp8"],
            }
            yield Receipt("model.fp8", all(evidence.values()), evidence)
        if model.checkpointing != "off":
            again = RECOMPUTED["layers"]
            evidence = {"layers_recomputed": again, "micro_batches": len(self._documents)}
            yield Receipt(f"model.checkpointing={model.checkpointing}", again > 0, evidence)
        if model.checkpoint_offload:
            moved = dict(offload.MOVED)
            yield Receipt("model.checkpoint_offload", moved.get("bytes", 0) > 0, moved)
        if model.tile_tokens is not None:
            seen = dict(tiles.SEEN) | {"losses": jit.CALLS[loss_head.OP]}
            tiled = seen.get("tiles", 0) > seen.get("forwards", 0) and seen["losses"] > 0
            yield Receipt(f"model.tile_tokens={model.tile_tokens}", tiled, seen)

    def _graphs(self) -> Receipt:
        """All layers of all micro-batches, replayed from one capture each."""
        assert self.graphs is not None
        layers, replays = len(self.graphs.captured), graphed.SEEN["replays"]
        evidence = {
            "layers_captured": layers,
            "seconds": self.graphs.seconds,
            "gib": self.graphs.gib,
            "replayed_forwards": replays,
        }
        return Receipt("model.cuda_graphs", replays == layers * len(self._documents) > 0, evidence)

    def _batch(self) -> Iterator[Receipt]:
        if self.config.batch.packing:
            mean = sum(self._documents) / max(1, len(self._documents))
            yield Receipt("batch.packing", mean > 0, {"documents_per_pack": round(mean, 2)})
        shared = self.config.batch.sequence_parallel
        if shared > 1:
            seen = dict(sequence.SEEN)  # each rank attends to what all that share hold
            whole = seen.get("tokens_held", 0) * shared == seen.get("tokens_attended")
            yield Receipt(f"batch.sequence_parallel={shared}", whole, seen)


def as_json(receipts: list[Receipt], extra: dict[str, Any]) -> dict[str, Any]:
    return {"receipts": [asdict(r) for r in receipts], **extra}


def refuse_idle(receipts: Iterable[Receipt]) -> None:
    """Raise TrainingError naming every option that did not act."""
    idle = [f"{r.option} ({r.evidence})" for r in receipts if not r.acted]
    if idle:
        raise TrainingError(f"options that did nothing: {'; '.join(idle)}; see effects.json")


def _gradient(parameter: nn.Parameter, *, sharded: bool) -> Tensor | None:
    """The whole averaged gradient; collective under ZeRO."""
    from deepspeed.utils import safe_get_full_grad

    gradient: Tensor | None = safe_get_full_grad(parameter) if sharded else parameter.grad
    return gradient


def _matrices(network: nn.Module, *, muon: bool) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable matrices that a receipt can watch: under Muon only those on its branch."""
    for name, parameter in network.named_parameters():
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) == 2
        if (
            parameter.requires_grad
            and matrix
            and (not muon or getattr(parameter, "use_muon", False))
        ):
            yield name, parameter


def _optimizer_bytes(engine: Any) -> int:
    """Bytes of optimizer state that this rank holds."""
    state = engine.basic_optimizer.state
    return sum(
        value.numel() * value.element_size()
        for entry in state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    )


def _bytes_swapped(optimizer: Any) -> int:
    """Bytes in the swap files of this rank's optimizer: groups under 1 MiB stay in memory."""
    folder = Path(optimizer.optimizer_swapper.swap_folder)
    return sum(file.stat().st_size for file in folder.rglob("*.swp"))


def _parameter_bytes(network: nn.Module, place: str) -> int:
    """Bytes of this rank's parameter shards that rest in `place`; those under 1 MiB and those that
    DeepSpeed keeps gathered never go to a drive.
    """
    total = 0
    for parameter in network.parameters():
        shard: Any = parameter.ds_tensor  # type: ignore[attr-defined]
        there = shard.final_location == "nvme" if place == "nvme" else shard.device.type == "cpu"
        total += int(there) * int(shard.ds_numel) * shard.element_size()
    return total
