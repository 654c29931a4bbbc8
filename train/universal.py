"""A checkpoint for another layout: DeepSpeed's universal format, mended where 0.19.8 cannot read
its own.

`ds_to_universal` writes one folder a parameter, whole. Loading that at another ZeRO stage fails for
want of files that only the old stage writes, and with other ranks under ZeRO-3 for want of one a
rank; both are supplied here. DeepSpeed neither converts from ZeRO-0 nor loads the format into it;
both are done here, for AdamW's state.
"""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tuneloom.errors import ConfigError, TrainingError, TuneloomError
from tuneloom.train import masters
from tuneloom.train.checkpoint import ENGINE, FAILURES, PARAMETERS, Found, why
from tuneloom.train.config import ZeroConfig
from tuneloom.train.shards import load, load_mapped

MOMENTS = ("fp32", "exp_avg", "exp_avg_sq")
WHOLE = "mp_rank_00_model_states.pt"
"""What ZeRO-0 saves: module, optimizer and counters in one file."""


def convert(found: Found, root: Path, *, world_size: int, stage: int, dtype: str) -> Path:
    """A folder in `root` that loads at `world_size`, `stage` and `dtype`; run on one rank. `root`
    is the run's own, where nobody else writes: `found` may be another run's.

    Raises ConfigError for another optimizer than AdamW, TrainingError where the folder cannot be
    written; nothing of it stays then.
    """
    optimizer = found.made_with.get("optim.name", "adamw")
    if optimizer != "adamw":
        raise ConfigError(
            f"zero.stage: {found.folder} is of {found.manifest['world_size']} ranks at stage "
            f"{found.manifest['zero_stage']} in {found.made_with.get('model.dtype')}, and the "
            f"state of {optimizer} cannot move to others, only AdamW's can; keep zero.stage, "
            "model.dtype and the number of workers"
        )
    target = root / f".universal-{found.folder.name}"
    shutil.rmtree(target, ignore_errors=True)
    try:
        _fill(target, found, world_size, stage)
        if found.made_with.get("model.dtype", dtype) != dtype:
            _forget_scale(target / ENGINE / PARAMETERS / "optimizer_state.pt")
    except BaseException as error:
        reason = why(error, target, found.size) if isinstance(error, FAILURES) else ""
        shutil.rmtree(target, ignore_errors=True)
        if not reason or isinstance(error, TuneloomError):
            raise
        raise TrainingError(
            f"resume: {found.folder} could not be converted to another layout in {root}: {reason}"
        ) from error
    return target


def _fill(target: Path, found: Found, world_size: int, stage: int) -> None:
    if (found.folder / ENGINE / PARAMETERS).exists():
        shutil.copytree(found.folder / ENGINE, target / ENGINE)
    elif int(found.manifest["zero_stage"]) == 0:
        _split(found.folder / ENGINE / WHOLE, target / ENGINE)
    else:
        _run_converter(found.folder / ENGINE, target / ENGINE)
    _mend(target / ENGINE, world_size, stage)


def own_loader(zero: ZeroConfig) -> Callable[[Any, Path], None] | None:
    """What loads a converted checkpoint where DeepSpeed cannot; None where it can."""
    if zero.stage == 0:
        return load_unsharded
    return load_swapped if "nvme" in (zero.offload, zero.offload_parameters) else None


def load_unsharded(engine: Any, converted: Path) -> None:
    """Put a converted checkpoint into an engine without ZeRO: masters, moments, counters."""
    folder = converted / ENGINE
    with torch.no_grad():
        for name, (low, high) in zip(masters.names(engine), masters.unsharded(engine), strict=True):
            held = _whole(folder / PARAMETERS / name)
            high.copy_(held.pop("fp32").reshape(high.shape))
            low.copy_(high)
            engine.basic_optimizer.state[high] = {
                key: value if key == "step" else value.reshape(high.shape).to(high.device)
                for key, value in masters.adam_state(held, name).items()
            }
    masters.place_steps(engine.basic_optimizer)
    _count_on(engine, folder / WHOLE)


def load_swapped(engine: Any, converted: Path) -> None:
    """Put a converted checkpoint into ZeRO-3 with NVMe offload, one swapped group at a time."""
    folder, optimizer = converted / ENGINE, engine.optimizer
    named = {id(p): name for name, p in engine.module.named_parameters()}
    optimizer.checkpoint_event_prologue()
    for group, parameters in enumerate(optimizer.fp16_groups):
        swapped = optimizer._swappable_optimizer_subgroup(group)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        flat = optimizer.fp32_partitioned_groups_flat[group]
        entry, offset = optimizer.optimizer.state[flat], 0
        for key in MOMENTS[1:]:  # made by the first step, which this engine has not taken
            entry.setdefault(key, torch.zeros_like(flat.data))
        for parameter in parameters:
            held = _whole(folder / PARAMETERS / named[id(parameter)])
            length = int(parameter.partition_numel())
            for key in MOMENTS:
                target = flat.data if key == "fp32" else entry[key]
                target.narrow(0, offset, length).copy_(_share(held[key], length, engine))
            offset += length
            # DeepSpeed's CPU Adam counts in an int, torch's in a tensor.
            entry["step"] = int(held["step"]) if optimizer.offload_optimizer else held["step"]
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(group)
    optimizer.checkpoint_event_epilogue()
    masters.place_steps(optimizer.optimizer)
    states = sorted(folder.glob("*model_states.pt"))
    _count_on(engine, states[0])


def _share(whole: torch.Tensor, length: int, engine: Any) -> torch.Tensor:
    """This rank's `length` elements of a parameter; the last rank's are padded with zeros."""
    ranks, rank = engine.dp_world_size, engine.global_rank
    flat = whole.flatten()
    padded = torch.nn.functional.pad(flat, (0, length * ranks - flat.numel()))
    return padded.narrow(0, length * rank, length)


def _whole(folder: Path) -> dict[str, Any]:
    """fp32, exp_avg, exp_avg_sq and step of one parameter, as tensors."""
    held = {file.stem: load(file) for file in sorted(folder.iterdir())}
    return {key: v["param"] if isinstance(v, dict) else v for key, v in held.items()}


def _count_on(engine: Any, file: Path) -> None:
    state = load_mapped(file)
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, state[counter])


def _split(whole: Path, target: Path) -> None:
    """ZeRO-0's one file as one folder a parameter, in the form that `ds_to_universal` writes."""
    state = load_mapped(whole)
    saved, names = state.pop("optimizer"), state["trained_parameters"]
    plain = saved.get("optimizer_state_dict", saved)  # under bf16 and fp16 one level deeper
    high = [p for group in saved.get("fp32_groups", ()) for p in group]
    for index, name in enumerate(names):
        folder = target / PARAMETERS / name
        folder.mkdir(parents=True)
        moments = masters.adam_state(plain["state"][index], name)
        moments["fp32"] = high[index].detach() if high else state["module"][name]
        torch.save(moments.pop("step"), folder / "step.pt")
        for key, value in moments.items():
            torch.save({"param": value.float(), "cat_dim": 0}, folder / f"{key}.pt")
    groups = {"param_groups": plain["param_groups"]}
    torch.save(groups, target / PARAMETERS / "optimizer_state.pt")
    torch.save(state, target / WHOLE)


def _run_converter(source: Path, target: Path) -> None:
    """In a process of its own: the converter forks, and torch is already running threads here."""
    command = [
        sys.executable, "-m", "tuneloom.train.shards", "--input_folder", str(source),
        "--output_folder", str(target), "--num_extract_workers", "1", "--num_merge_workers", "1",
    ]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        last = ((ran.stderr or ran.stdout).strip().splitlines() or ["no output"])[-1]
        if ran.returncode < 0:
            name = signal.Signals(-ran.returncode).name
            last = f"{name} ended it; after SIGKILL look at this host's memory"
        raise TrainingError(f"resume: {source} could not be converted to another layout: {last}")


def _mend(folder: Path, world_size: int, stage: int) -> None:
    """Supply the model-state files, step counters and shapes that `stage` looks for."""
    states = sorted(folder.glob("*model_states.pt"))
    state = load(states[0])
    for file in states:
        file.unlink()
    parameters = [p for p in (folder / PARAMETERS).iterdir() if p.is_dir()]
    optimizer_file = folder / PARAMETERS / "optimizer_state.pt"
    optimizer = load(optimizer_file)
    counted = [p / "step.pt" for p in parameters if (p / "step.pt").exists()]
    step = load(counted[0]) if counted else optimizer["optimizer_state_dict"]["state"][0]["step"]
    step = step if torch.is_tensor(step) else torch.tensor(float(step))
    if not counted:  # ZeRO-3 writes flat tensors and no step of their own
        shapes = {name: shape for group in state["param_shapes"] for name, shape in group.items()}
        for parameter in parameters:
            _shape(parameter, shapes[parameter.name])
            torch.save(step, parameter / "step.pt")
    optimizer.setdefault("ds_version", state.get("ds_version"))
    optimizer.setdefault("clip_grad", 0.0)
    optimizer["optimizer_state_dict"] = {
        "state": {0: {"step": step}}, "param_groups": optimizer["param_groups"],
    }  # fmt: skip
    torch.save(optimizer, optimizer_file)
    state["module"] = {}  # weights come from the fp32 masters
    names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size)]
    for name in names if stage == 3 else [WHOLE]:
        torch.save(state, folder / name)


def _forget_scale(optimizer_file: Path) -> None:
    """The loss scale of another dtype: fp16 would go on unscaled, others with a scale."""
    optimizer = load(optimizer_file)
    for key in ("loss_scaler", "dynamic_loss_scale"):
        optimizer.pop(key, None)
    torch.save(optimizer, optimizer_file)


def _shape(parameter: Path, shape: Any) -> None:
    for moment in MOMENTS:
        held = load(parameter / f"{moment}.pt")
        flat = held["param"] if isinstance(held, dict) else held
        torch.save({"param": flat.reshape(shape), "cat_dim": 0}, parameter / f"{moment}.pt")
