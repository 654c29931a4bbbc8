"""Everything a run holds on one rank, made in dependency order, and the few things its loop asks
for.
"""

import datetime
import json
import math
import os
import shutil
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from tuneloom.data.consent import refuse_ended
from tuneloom.data.guard import refuse_golden
from tuneloom.data.tokenizer import load_tokenizer
from tuneloom.errors import ConfigError, DiskError, Stopped, TrainingError, TuneloomError
from tuneloom.redact import redacted
from tuneloom.registry.digests import weights_digest
from tuneloom.train import (
    background,
    checkpoint,
    compiled,
    copies,
    debug,
    distributed,
    effects,
    evaluation,
    flops,
    fp8,
    graphed,
    method,
    model,
    patterns,
    probe,
    runs,
    samples,
    sequence,
    shm,
    tiles,
    weights,
    zero,
)
from tuneloom.train.batches import MicroBatch
from tuneloom.train.config import TrainConfig
from tuneloom.train.distributed import World
from tuneloom.train.drills import FirstCheckpoint, passed_before
from tuneloom.train.exposure import Exposure
from tuneloom.train.feed import Feed
from tuneloom.train.metrics import Clock, Metrics, Progress, peak_memory_gib
from tuneloom.train.pace import Pace
from tuneloom.train.signals import StopFlag
from tuneloom.train.spikes import Spikes
from tuneloom.train.tracker import Tracker
from tuneloom.train.universal import convert, own_loader
from tuneloom.train.watchdog import (
    READING_SECONDS,
    STARTUP_SECONDS,
    Watchdog,
    collective_seconds,
)


@dataclass(frozen=True)
class Tally:
    """Sums over all ranks of one step."""

    target_tokens: int
    tokens: int
    square_tokens: int
    padded: int
    stop: bool


class Session:
    """One run on one rank. `prepare` is collective; attributes that only rank 0 has are None
    elsewhere.
    """

    engine: Any
    feed: Feed

    def __init__(self, config: TrainConfig, world: World, launcher: dict[str, Any]) -> None:
        self.config, self.world, self.launcher = config, world, launcher
        self.folder = runs.folder_of(config)
        self.clock = Clock()
        self.step = 0
        self.last_step = -1
        self.ended_early = False
        self.last_loss = math.nan
        self._effects_step = 0
        """At which `witness` writes its receipts."""
        self.named_step: int | None = None
        """Of the checkpoint that `resume` names."""
        self._lock: IO[str] | None = None
        self.recorded = False
        """That run.json knows of this attempt; before, how it ends is not how the run ended."""
        self._lost = False
        """That it ended with a rank that was lost, or with an error of nobody's making."""
        self._saved_step = -1
        self._evaluated_step = self._sampled_step = -1
        self._best, self._worse, self._best_step = math.inf, 0, 0
        self.metrics: Metrics | None = None
        self.progress_line: Progress | None = None
        self.exposure: Exposure | None = None
        self.stop: StopFlag | None = None
        self.witness: effects.Witness | None = None
        self.drill: FirstCheckpoint | None = None
        self.watchdog: Watchdog | None = None
        self.background: background.Background | None = None
        self.copies: copies.Copies | None = None
        self.spikes = Spikes(config.train.spike_z)

    def prepare(self) -> None:
        """Seed, run folder, tokenizer, data, model, method, engine, resume, metrics."""
        config = self.config
        hosts = self._come_together()

        # what to resume from decides how the engine is built
        self._begin_part(READING_SECONDS)
        self.copies_at: Path | None = (
            shm.ROOT / self._on_first(lambda: shm.name_of(self.folder))
            if config.checkpoint.memory_every
            else None
        )
        found = self._resume_point()
        self.last_step = _last_step(config, found.step if found else 0)
        accumulation = self._accumulation(found)
        universal = self._universal(found)
        base = self.base = self._on_first(lambda: model.locate(config.model))
        settings = zero.deepspeed_config(
            config, self.world, accumulation=accumulation,
            universal=universal is not None and own_loader(config.zero) is None,
            largest=model.largest_parameter(base, config.model) if self._swaps() else None,
        )  # fmt: skip

        # data first: what may not be trained on, and the batch that lets a base in FP8 in
        self._begin_part(READING_SECONDS)
        self._open_data(accumulation)
        self._begin_part(READING_SECONDS)
        self._build(settings)

        # the proof that packs are isolated, before a step is taken
        self._begin_part()
        self._prove()

        self._begin_part(READING_SECONDS)
        self.base_digest: str | None = self._on_first(lambda: self._record_run(found))
        self.recorded = True
        if self.world.first:
            self.exposure = Exposure(self.folder)
        if found:
            self._resume(found, universal)
        self._on_first(lambda: self._forget_later(found))
        self._begin_part()
        self.graphs = self._capture()  # once weights lie where the engine keeps them
        self._on_first(self._open_metrics)
        if not self._on_first(self._witnessed):
            self.witness = effects.Witness(config, self.engine, self.world, self.graphs)
            self._effects_step = self.step + config.train.effects_step
        if self.copies_at is not None:
            self.copies = copies.Copies(self.copies_at, self.folder, self.world)
        self.pace = Pace(self.world, hosts)
        distributed.barrier()  # the loop's first step is not for the slowest start to use up

    # set-up, in pieces

    def _come_together(self) -> list[str]:
        """Seed, lock, and what watches the run; returns every rank's host."""
        config = self.config
        world = self.world = self.world.sharing(config.batch.sequence_parallel)
        distributed.seed_everything(config.seed)
        self._on_first(self._claim)
        hosts = [str(host) for host in distributed.gather_objects(socket.gethostname())]
        self.watchdog = Watchdog(
            self.folder, world, self.clock, seconds=config.train.hang_seconds, hosts=hosts,
            step=lambda: self.step,
        )  # fmt: skip
        distributed.record_flights(self.watchdog.folder, world)
        self.stop = StopFlag(self.folder, first=world.first)
        if config.checkpoint.asynchronous:
            self.background = background.Background(
                self.folder / "checkpoints", world, keep=config.checkpoint.keep
            )
        return hosts

    def _universal(self, found: checkpoint.Found | None) -> Path | None:
        """The checkpoint in a form for this layout, where it was saved in another."""
        layout: Any = {
            "world_size": self.world.size, "stage": self.config.zero.stage,
            "dtype": self.config.model.dtype,
        }  # fmt: skip
        if found is None or found.same_layout(**layout):
            return None
        converted: Path = self._on_first(
            lambda: convert(found, self.folder / "checkpoints", **layout)
        )
        return converted

    def _open_data(self, accumulation: int) -> None:
        """Tokenizer and feed; raises what refuses rows that may not be trained on."""
        self.tokenizer = load_tokenizer(str(self.base))
        self.feed = Feed(self.config, self.tokenizer, self.world, accumulation)
        today = datetime.datetime.now(datetime.UTC).date()
        for line in self._on_first(lambda: refuse_ended(self.feed.rows, today)):
            if self.world.first:
                print(line, flush=True)
        golden = self.config.data.golden
        self.golden = self._on_first(lambda: refuse_golden(self.feed.rows, golden))

    def _build(self, settings: dict[str, Any]) -> None:
        """Model, method and engine; adapters are made after the seed, alike on every rank."""
        config, world = self.config, self.world
        with zero.partitioned_init(settings):
            network = model.load(
                self.base, config.model, config.method, world.device, seed=config.seed
            )
            self._begin_part()
            inexact = patterns.refuse(network, config.batch)
            if inexact and world.first:
                print(inexact, flush=True)
            self._share_sequences(network)
            self.patched = _patch(network) if config.model.kernels else {}
            first = self.feed.peek() if config.model.fp8 else []
            self.fp8 = fp8.hold(network, config, first, world)
            self.tiled = tiles.install(network, config.model, config.batch)
            self.recomputing = model.checkpoint_activations(network, config.model)
            torch.manual_seed(config.seed)
            network = method.apply(network, config.method)
            self.compiled = compiled.install(network, config.model, world.device)
            if config.model.cuda_graphs:
                graphed.refuse(network, config.model, world.device)
        network.train()
        self.shape = flops.shape_of(network, frozen=config.method.kind != "full")
        self.engine = zero.build_engine(network, config, settings)
        self.network: nn.Module = self.engine.module
        if config.method.prefetch:
            _prefetch(self.network, self.patched)
        self.base_lrs = [group["lr"] for group in self.engine.optimizer.param_groups]

    def _prove(self) -> None:
        """Open the rows to validate on; probe that packed documents are isolated, also when ranks
        share them; then seed each rank by itself, as dropout differs by rank.
        """
        config, world = self.config, self.world
        self.validation = evaluation.Validation(config, self.tokenizer, world)
        self.validation.refuse()  # now, not after all of the training
        if config.batch.packing and config.train.probe:
            probe.isolation(self.network, self.vocabulary, world, seed=config.seed)
        if world.sequence > 1 and config.train.probe:
            probe.sharing(self.network, self.vocabulary, world, seed=config.seed)
        torch.manual_seed(config.seed + world.rank)

    def _resume(self, found: checkpoint.Found, universal: Path | None) -> None:
        """Weights, optimizer, random state and counters of a checkpoint."""
        load = own_loader(self.config.zero)
        if universal is not None and load is not None:
            load(self.engine, universal)
            checkpoint.restore_rng(found.folder, self.world)
        else:
            checkpoint.restore(self.engine, found, self.world, universal=universal)
        self._restore(found)

    def _begin_part(self, seconds: float = STARTUP_SECONDS) -> None:
        """The next part of start-up, which may take so long, on all ranks at once: who waits for a
        slower one waits in that one's part. Collective.
        """
        assert self.watchdog is not None
        distributed.barrier()
        self.watchdog.begin_part(seconds)

    def _share_sequences(self, network: nn.Module) -> None:
        """Attention across the ranks that share a micro-batch, where there are any."""
        causal: Any = network
        across = sequence.exchange(
            self.world, causal.config.get_text_config(),
            timeout_seconds=collective_seconds(self.config.train.hang_seconds),
        )  # fmt: skip
        if across is not None:
            model.choose_attention(network, self.config.model, exchange=across)

    def _capture(self) -> graphed.Graphs | None:
        """The layers as CUDA graphs, where they are asked for; each rank captures its own."""
        if not self.config.model.cuda_graphs:
            return None
        inputs = self.feed.blank().model_inputs()
        graphs = graphed.capture(self.network, inputs, accumulation=self.feed.accumulation)
        if self.world.first:
            layers, seconds = len(graphs.captured), graphs.seconds
            print(f"model.cuda_graphs: {layers} layers captured in {seconds:.1f} s", flush=True)
        return graphs

    def _swaps(self) -> bool:
        return self.config.zero.offload_parameters == "nvme"

    def _on_first(self, work: Any) -> Any:
        """Rank 0's result on all ranks; its error is every rank's error."""
        return distributed.on_first(work, where=self.folder)

    def _claim(self) -> None:
        self._lock = runs.claim(self.config)

    def _resume_point(self) -> checkpoint.Found | None:
        config, root = self.config, self.folder / "checkpoints"
        earlier = self._on_first(lambda: runs.earlier(config))
        if earlier is None and config.resume == "never":
            return None
        own = earlier is not None or config.resume == "auto"
        found = checkpoint.newest(root, self.world) if own else None
        if config.resume not in ("auto", "never"):
            named = earlier["named_step"] if earlier else None
            if found is None or named is None or found.step <= named:  # nothing was saved since
                found = checkpoint.opened(Path(config.resume), self.world)
                named = found.step
            elif self.world.first:
                print(
                    f"resume: {config.resume} was taken up by the attempt before; going on from "
                    f"{found.folder.name}",
                    flush=True,
                )
            self.named_step = named
        if not own:
            if self.copies_at is not None:  # of steps that the run does not go on from
                shm.forget(self.copies_at)
            return found
        if self.copies_at is None:
            return found
        rescued = copies.rescue(
            self.copies_at, root, self.world, newer_than=found.step if found else 0,
            keep=config.checkpoint.keep,
        )  # fmt: skip
        return checkpoint.opened(rescued, self.world) if rescued else found

    def _accumulation(self, found: checkpoint.Found | None) -> int:
        """Micro-batches of this rank a step; a resumed run keeps its global batch on any world
        size, and however many ranks share a micro-batch. A run that takes up another's checkpoint
        has its own.
        """
        wanted = self.config.batch.accumulation
        if found is None or not self._is_own(found):
            return wanted
        group = int(found.trainer["group"])
        shares, sequence = self.world.data_size, self.world.sequence
        if group % shares:
            times = f", times batch.sequence_parallel={sequence}" if sequence > 1 else ""
            raise ConfigError(
                f"launch.workers: the run takes {group} micro-batches a step, which {shares} "
                f"ranks cannot share evenly; use a divisor of {group}{times}"
            )
        used, before = group // shares, int(found.manifest["world_size"]) // sequence
        if used != wanted and wanted * before != group and self.world.first:
            print(
                f"batch.accumulation: {used} is used, not {wanted}, as {self.config.run.id} keeps "
                f"its {group} micro-batches a step; for others take up its checkpoint under "
                "another run.id, by resume=CHECKPOINT",
                flush=True,
            )
        return used

    def _record_run(self, found: checkpoint.Found | None) -> str | None:
        """Write run.json; returns the base's digest."""
        config = self.config
        base = None if config.model.init == "random" else weights_digest(self.base)
        facts = {
            "launcher": self.launcher,
            "world_size": self.world.size,
            "device": _device_name(self.world.device),
            "base": {"path": str(self.base), "digest": base},
            "dataset": {
                "path": config.data.path, "digest": self.feed.rows.digest,
                "rows": len(self.feed.rows),
                "renderer": self.feed.renderer.digest, "golden_sets": self.golden,
            },
            "attempt": int(os.environ.get("TUNELOOM_ATTEMPT", "0")),
            "clock": {"command": self.clock.command, "attempt": self.clock.started},
            "resumed_from": found.folder.name if found else None,
            "named_step": self.named_step,
            "accumulation": self.feed.accumulation, "sequence_parallel": self.world.sequence,
        }  # fmt: skip
        if found:
            own = self._is_own(found)
            runs.refuse_other_inputs(config, facts, found.manifest["digests"], own)
            if not own:
                runs.refuse_other_method(config, found.folder.parent.parent, found.made_with)
            self.feed.plan.refuse_other(found.trainer["feed"]["plan"])
            checkpoint.supersede(self.folder / "checkpoints", found.step)
        runs.record(config, facts)
        return base

    def _is_own(self, found: checkpoint.Found) -> bool:
        """True for a checkpoint of this run, not of another that `resume` names."""
        return found.folder.parent.parent.resolve() == self.folder.resolve()

    def _restore(self, found: checkpoint.Found) -> None:
        self.step = self._saved_step = found.step
        self.feed.restore(found.trainer["feed"])
        # another run's best may be of other rows
        if self._is_own(found) and self.config.train.patience > 0:
            self._best, self._worse = found.trainer["best"], found.trainer["worse"]
            self._best_step = found.trainer.get("best_step", 0)  # not in checkpoints of before
            self._count_anew()
        self.ended_early = 0 < self.config.train.patience <= self._worse
        self.last_loss = found.trainer.get("loss", math.nan)  # not in checkpoints of before
        # Validating this step once more would count twice towards train.patience.
        self._evaluated_step = found.trainer["evaluated"]
        self._sampled_step = found.trainer["sampled"]
        if self.world.first:
            print(f"resumed {found.folder.name} of {self.config.run.id}", flush=True)

    def _count_anew(self) -> None:
        """Where the weights of the best validation are gone, the next one is the best, but for a
        run that has ended, and has them in weights/.
        """
        kept = self._on_first(lambda: self._best_folder().is_dir() or self._ended_with_best())
        if math.isfinite(self._best) and not kept:
            self._best, self._worse, self._best_step = math.inf, 0, 0
            if self.world.first:
                print(
                    "train.patience: the weights of the best validation so far are not in "
                    f"{self.folder}; counting anew",
                    flush=True,
                )

    def _ended_with_best(self) -> bool:
        """That it stopped early, and weights/ holds those of the best validation; for rank 0."""
        if self._worse < self.config.train.patience or not (self.folder / runs.WEIGHTS).is_dir():
            return False
        recorded = runs.recorded(self.folder).get("weights_step")
        return self._best_step > 0 and recorded == self._best_step

    def _forget_later(self, found: checkpoint.Found | None) -> None:
        """What earlier attempts left of later steps goes, as these steps come again."""
        assert self.exposure is not None
        self.exposure.rewind(self.step)
        # another run's rows are in its own exposure
        if found and self._is_own(found) and (found.folder / copies.EXPOSURE).exists():
            self.exposure.adopt(found.folder / copies.EXPOSURE)
        samples.rewind(self.folder / samples.FILE, self.step)

    def _open_metrics(self) -> None:
        tracker = Tracker(
            self.config.tracker,
            self.folder,
            str(self.config.run.id),
            redacted(runs.plain(self.config)),
        )
        runs.update(self.folder, {"tracker": {"mode": tracker.mode, "reason": tracker.reason}})
        self.metrics = Metrics(self.folder, tracker)
        if self.clock.carry_on(self.metrics.open_at(self.step)):
            # Booked at once, so that it outlives an attempt that is lost before a step.
            self.metrics.write({"step": self.step} | self.clock.row())
        self.progress_line = Progress()

    @property
    def vocabulary(self) -> int:
        config: Any = self.network.config
        return int(config.get_text_config().vocab_size)

    # what the loop asks for

    def due(self, every: int) -> bool:
        """True at multiples of `every`; never at step 0, never when 0."""
        return every > 0 and self.step > 0 and self.step % every == 0

    def progress(self) -> float:
        """Share of the run that is done, by rows or by steps, whichever ends first."""
        by_steps = self.step / self.config.steps if self.config.steps else 0.0
        return max(by_steps, self.feed.plan.progress)

    def agree(self, micros: list[MicroBatch]) -> Tally:
        """Sum the step's tokens over ranks; one small CPU collective that also carries the stop
        flag.
        """
        assert self.stop is not None
        if self.witness is not None:
            self.witness.saw_micro_batches([len(m.rows) for m in micros])
        values = [
            sum(m.target_tokens for m in micros), sum(m.tokens for m in micros),
            sum(m.square_tokens for m in micros), sum(m.padded for m in micros),
            int(self.stop.asked()), *self._written(), *self.pace.slots(),
        ]  # fmt: skip
        with self.clock.phase("collective"):
            summed = distributed.sum_over_ranks(torch.tensor(values, dtype=torch.float64)).tolist()
        stop, paces = summed[4], 5 + background.SLOTS
        # Every rank that shares a micro-batch has counted all of it.
        target, tokens, square, padded = (int(v) // self.world.sequence for v in summed[:4])
        if self.background is not None:
            self.background.note(summed[5:paces])
        self.pace.note(summed[paces:])
        assert target > 0, "a step without target tokens: the renderer refuses such rows"
        return Tally(target, tokens, square, padded, stop > 0)

    def _written(self) -> list[int]:
        return self.background.slots() if self.background is not None else [0] * background.SLOTS

    def set_lr(self, factor: float) -> float:
        """Scale every group's base learning rate; returns that of the first group."""
        groups = self.engine.optimizer.param_groups
        for group, base in zip(groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        return float(groups[0]["lr"])

    def optimizer_step(self) -> tuple[float, bool]:
        """Step; says the gradient norm and whether it was applied: non-finite gradients are not."""
        step = self.step + 1
        due = step >= self._effects_step or step == self.last_step or self.feed.plan.progress >= 1
        witness = self.witness if due else None
        if witness is not None:
            witness.before_step()
        norm, applied = self._engine_step()
        if witness is not None and applied:
            witness.after_step()
            self._write_receipts(witness.receipts())
        return norm, applied

    def _witnessed(self) -> bool:
        """That effects.json is of a step which stands, and of options that this attempt has; for
        rank 0.
        """
        try:
            found = json.loads((self.folder / "effects.json").read_text(encoding="utf-8"))
            return bool(found["step"] <= self.step and found["resumable"] == self._resumable())
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def _resumable(self) -> dict[str, Any]:
        """The options with a receipt that a resume may change."""
        zeros = self.config.zero.model_dump(exclude={"nvme_path"})
        return zeros | {"sequence_parallel": self.config.batch.sequence_parallel}

    def _write_receipts(self, receipts: list[effects.Receipt]) -> None:
        """effects.json, and the end of the run when an option did nothing."""
        self.witness = None
        extra = {
            "step": self.step + 1, "resumable": self._resumable(), "kernels": self.patched,
            "layers_recomputing": self.recomputing, "mlps_tiled": self.tiled,
            "layers_compiled": self.compiled, "fp8": asdict(self.fp8) if self.fp8 else None,
        }  # fmt: skip
        content = effects.as_json(receipts, extra)
        self._on_first(lambda: runs.write_json(self.folder / "effects.json", content))
        unknown = all(set(ops) == {"unpatched"} for ops in self.patched.values())
        # A model that kernels/ does not know was said to run unpatched when it was loaded.
        effects.refuse_idle(r for r in receipts if r.option != "model.kernels" or not unknown)

    def _engine_step(self) -> tuple[float, bool]:
        engine = self.engine
        if self.config.zero.stage == 0 and self.config.model.dtype == "fp32":
            return self._plain_step()
        skipped = engine.skipped_steps
        engine.step()
        norm = engine.get_global_grad_norm()
        applied = engine.skipped_steps == skipped
        if not applied and self.config.model.dtype == "fp16" and self.loss_scale <= 1.0:
            raise TrainingError(
                f"model.dtype: fp16 gradients overflow in step {self.step + 1} even unscaled; set "
                "model.dtype=bf16, or lower optim.lr"
            )
        return float(norm) if norm is not None else math.nan, applied

    @property
    def loss_scale(self) -> float:
        """fp16's dynamic scale, which an overflow halves; 1 in the other precisions."""
        return float(self.engine.optimizer.loss_scale) if self.config.model.dtype == "fp16" else 1.0

    def _plain_step(self) -> tuple[float, bool]:
        """Without ZeRO in fp32 DeepSpeed neither reports a norm nor refuses a NaN, so both happen
        here.
        """
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        limit = self.config.optim.clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            for parameter in parameters:
                parameter.grad = None
        self.engine.step()
        return norm, math.isfinite(norm)

    def record(
        self, bins: list[np.ndarray], *, loss: float, grad_norm: float, lr: float, tally: Tally,
        applied: bool, seconds: float,
    ) -> None:  # fmt: skip
        """Ledger, exposure, metrics and the progress line, on rank 0."""
        if self.metrics is None or self.progress_line is None or self.exposure is None:
            return
        self.feed.account(bins, self.step, tally.padded, self.exposure)
        row = {
            "step": self.step,
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/target_tokens": tally.target_tokens,
            "train/epoch": round(self.feed.plan.epoch, 6),
            "train/skipped": int(not applied),
            "speed/tokens_per_second": tally.tokens / seconds,
            "speed/padding": tally.padded / (tally.padded + tally.tokens),
            "memory/peak_gib": peak_memory_gib(self.world.device),
        }
        row |= self.spikes.note(self.step, loss)
        if self.pace.slowest is not None:
            row["speed/slowest_rank"] = self.pace.slowest
        if self.config.model.dtype == "fp16":
            row["train/loss_scale"] = self.loss_scale
        peak = flops.peak_flops(self.world.device)
        if peak is not None:
            work = self.shape.step(
                tokens=tally.tokens,
                target_tokens=tally.target_tokens,
                square_tokens=tally.square_tokens,
            )
            row["speed/mfu"] = work / (seconds * peak * self.world.size)
        self.metrics.write(row | self.clock.row())
        if self.step == 1:
            # Exact: launchers that agree do so to the bit.
            try:
                runs.update(self.folder, {"first_loss": loss.hex()})
            except OSError as error:
                raise DiskError(
                    f"{self.folder / runs.RECORD} cannot be written ({error.strerror}); free some "
                    "space, and the same command goes on"
                ) from error
        self.progress_line.show(row, self.progress())

    def validate(self) -> None:
        """Loss per target token on validation rows; counts towards an early stop."""
        if self._evaluated_step == self.step or not self.validation.rows:
            return
        self._evaluated_step = self.step
        with self.clock.phase("evaluation"):
            loss = self.validation.loss(self.engine)
        if not math.isfinite(loss):  # JSON has no word for it
            if self.world.first:
                print(
                    f"step {self.step:>6}  validation loss is {loss}: not recorded, and not "
                    "counted towards train.patience",
                    flush=True,
                )
            return
        if self.config.train.patience > 0:
            self._count(loss)
        if self.metrics is not None:
            self.metrics.write({"step": self.step, "eval/loss": loss})
            print(f"step {self.step:>6}  validation loss {loss:.4f}", flush=True)

    def _count(self, loss: float) -> None:
        """One more validation towards `train.patience`."""
        better = loss < self._best
        self._best, self._worse = (loss, 0) if better else (self._best, self._worse + 1)
        self.ended_early = self._worse >= self.config.train.patience
        if better:
            with self.clock.phase("checkpoint"):
                self._keep_best()

    def _keep_best(self) -> None:
        """The weights of this validation: an early stop comes `train.patience` of them later."""
        self._best_step = self.step
        weights.save(self.engine, self.tokenizer, self._best_folder(), self.world)
        self._on_first(self._forget_older_best)

    def _best_folder(self) -> Path:
        return self.folder / f"best-{checkpoint.name(self._best_step)}"

    def _forget_older_best(self) -> None:
        for folder in self.folder.glob("best-step-*"):
            if folder != self._best_folder():
                shutil.rmtree(folder, ignore_errors=True)

    def sample(self) -> None:
        """Answers to a few validation prompts, kept in the run folder."""
        if self._sampled_step == self.step or not self.validation.rows:
            return
        self._sampled_step = self.step
        with self.clock.phase("evaluation"):
            self.validation.sample(self.engine, self.folder / samples.FILE, self.step)

    def save(self) -> None:
        """A checkpoint of this step, once; the first one is drilled. What no disk takes is copied
        in memory, where copies are kept.
        """
        try:
            self._save()
        except DiskError:
            if self._on_first(lambda: runs.is_ours(self.folder)):
                try:
                    self.remember()
                except TrainingError as full:  # the memory is; copies of an earlier step stay
                    print(full, flush=True)
            raise

    def _save(self) -> None:
        if self._saved_step == self.step:
            return
        with self.clock.phase("checkpoint"):
            self._on_first(lambda: self.exposure.flush(self.step) if self.exposure else None)
            content = self._content()
            if self.background is not None:
                self.background.save(self.engine, **content)
            else:
                checkpoint.save(
                    self.engine, self.folder / "checkpoints", self.world,
                    keep=self.config.checkpoint.keep, **content,
                )  # fmt: skip
            self._saved_step = self.step
            if self.config.train.drill and self.drill is None:
                self.drill = FirstCheckpoint(self)

    def remember(self) -> None:
        """Copy the state of this step in memory, unless it is there or a checkpoint already."""
        saved = self._saved_step == self.step and self.background is None
        if self.copies is not None and not saved and self.copies.step != self.step:
            with self.clock.phase("checkpoint"):
                self.copies.save(self.engine, **self._content(), exposure=self.exposure)

    def settle(self) -> None:
        """Wait for a save that is written beside training; collective."""
        if self.background is not None:
            with self.clock.phase("checkpoint"):
                self.background.settle()

    def _content(self) -> dict[str, Any]:
        """What a save is told of this step."""
        return {
            "step": self.step, "zero_stage": self.config.zero.stage, "trainer": self._state(),
            "adapters_only": self.config.method.kind != "full",
            "digests": {
                "config": runs.digest(self.config), "dataset": self.feed.rows.digest,
                "base": self.base_digest, "tokens": self.feed.renderer.digest,
            },
        }  # fmt: skip

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "loss": self.last_loss,
            "made_with": runs.made_with(runs.plain(self.config)),
            "group": self.world.data_size * self.feed.accumulation,
            "feed": self.feed.state(),
            "best": self._best,
            "worse": self._worse,
            "best_step": self._best_step,
            "evaluated": self._evaluated_step,
            "sampled": self._sampled_step,
        }

    def finish(self) -> None:
        """After the last step: validation, samples, checkpoint, weights, receipts; the run is
        done.
        """
        if self.step == 0:
            raise TrainingError(
                "nothing was trained: the run ended at step 0; look at data.path and epochs"
            )
        self.save()  # first, since what follows may fail
        self.validate()
        self.sample()
        self.settle()
        with self.clock.phase("checkpoint"):
            self._save_weights()
        with self.clock.phase("checkpoint"):
            if self._lacks_drill():  # all was saved by an attempt that ended before its verdict
                self.drill = FirstCheckpoint(self)
            if self.drill is not None:
                self.drill.verdict()
        self._on_first(self._close_books)
        if self.copies is not None:
            self.copies.forget()
        swapped = zero.swap_folder(self.config)
        if swapped is not None:  # on each node its own drive
            shutil.rmtree(swapped, ignore_errors=True)

    def _save_weights(self) -> None:
        """weights/: of the best validation under `train.patience`, else of the last step."""
        target, best = self.folder / runs.WEIGHTS, self._best_folder()
        stops_early = self.config.train.patience > 0
        there: bool = self._on_first(best.is_dir)
        if stops_early and not there and self._on_first(self._ended_with_best):
            return
        if not (stops_early and there):
            self._best_step = self.step
            weights.save(self.engine, self.tokenizer, target, self.world)
            return
        self._on_first(lambda: weights.copy(best, target))
        if self.world.first:
            print(
                f"weights are of step {self._best_step}, whose validation loss of {self._best:.4f} "
                "was the lowest",
                flush=True,
            )

    def _close_books(self) -> None:
        """Which rows were trained on, how many, and that the run is done."""
        assert self.exposure is not None
        data_order = self.exposure.finish(self.step)
        self.feed.ledger.check(rows=self.feed.plan.consumed)
        self.feed.ledger.write(self.folder / "ledger.json")
        self._book_the_rest()
        runs.update(self.folder, {
            "state": "done", "steps": self.step, "weights_step": self._best_step,
            "data_order": data_order,
            "loss": None if math.isnan(self.last_loss) else self.last_loss,
            "seconds": sum(self.clock.total.values()), "time": self.clock.shares(),
        })  # fmt: skip

    def _lacks_drill(self) -> bool:
        if not self.config.train.drill or self.drill is not None:
            return False
        passed: bool = self._on_first(lambda: passed_before(self.folder))
        return not passed

    def _book_the_rest(self) -> None:
        """The time since the last row, as a row of its own, and where all of it went as a line."""
        if self.metrics is None:
            return
        self.metrics.write({"step": self.step} | self.clock.row())
        shares = ", ".join(f"{phase} {share:.1%}" for phase, share in self.clock.shares().items())
        print(f"time: {sum(self.clock.total.values()):.1f} s: {shares}", flush=True)

    def abandon(self, error: BaseException) -> None:
        """Say in run.json how it ended, where that can still be said."""
        self._lost = not isinstance(error, TuneloomError)
        if self.copies is not None and not self._lost:
            self._part_with(self.copies, kept=isinstance(error, DiskError))
        ours = self.recorded or (
            # Of an attempt that was lost, as nobody else holds the lock.
            self._lock is not None and runs.recorded(self.folder).get("state") == "running"
        )
        if self.world.first and ours:
            state = "stopped" if isinstance(error, Stopped) else "failed"
            try:
                self._book_the_rest()
                runs.update(self.folder, {"state": state, "error": str(error).splitlines()[0:1]})
            except (OSError, TrainingError) as why:  # a full disk must not hide what ended the run
                print(f"how the run ended is not in its folder: {why}", flush=True)

    def _part_with(self, held: copies.Copies, *, kept: bool) -> None:
        """An end of the run's own is no loss of a rank, so copies in memory go, unless a full disk
        ended it and they are newer than what is on it.
        """
        saved = checkpoint.ordered(self.folder / "checkpoints")
        last = int(saved[-1].name.removeprefix("step-")) if saved else 0
        if kept and held.step > last and held.keep():
            said = (
                f"{checkpoint.name(held.step)} stays in memory, in {held.base}; with room on the "
                "disk the same command goes on from it"
            )
        else:
            held.forget()
            if self.step <= last:
                return
            said = (
                f"the {self.step - last} steps after {checkpoint.name(last)} are lost, as copies "
                "in memory go with a run that ends by an error of its own"
            )
        if self.world.first:
            print(f"copies: {said}", flush=True)

    def close(self) -> None:
        """Give back files, signals and the tracker."""
        try:
            if self.background is not None:
                self.background.close()
        finally:
            if self.watchdog is not None:
                self.watchdog.close()
        if hasattr(self, "feed"):
            self.feed.close()
        if hasattr(self, "validation"):
            self.validation.close()
        if self.progress_line is not None:
            self.progress_line.close()
        if self.metrics is not None:
            self.metrics.tracker.finish()
        if self.stop is not None:
            self.stop.clear(heard=not self._lost)
        if self._lock is not None:
            self._lock.close()
        if hasattr(self, "engine"):
            self.engine.destroy()  # its hooks on gradients keep it, and all weights, alive


def _last_step(config: TrainConfig, begun: int) -> int:
    """The step at which the run ends, -1 where only its rows end it; raises ConfigError where the
    checkpoint of step `begun` is beyond it.
    """
    steps = config.steps or -1
    if 0 < steps < begun:
        raise ConfigError(
            f"steps: {steps} counts from the start of training, and the checkpoint is of step "
            f"{begun}; raise it"
        )
    if not config.debug:
        return steps
    return min(steps, begun + debug.STEPS) if steps > 0 else begun + debug.STEPS


def _patch(network: nn.Module) -> dict[str, Any]:
    from tuneloom.kernels.patch import patch

    return dict(patch(network).report)


def _prefetch(network: nn.Module, patched: dict[str, Any]) -> None:
    """Unpack NF4 weights ahead, where layers take them from kernels/."""
    from tuneloom.kernels import nf4

    if not any("activation_diet" in ops for ops in patched.values()):
        raise ConfigError(
            f"method.prefetch: model.kernels fuses no layer of {', '.join(patched)}, and "
            "bitsandbytes unpacks in its own products; set method.prefetch=false"
        )
    nf4.install(network)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
