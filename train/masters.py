"""The fp32 side of training: whole masters and optimizer state, wherever a ZeRO stage keeps them.

The network computes in `model.dtype`; what is trained is held in fp32 beside it. DeepSpeed has a
way to each master under ZeRO 1 to 3 and none without ZeRO, where its optimizer for bf16 and fp16
keeps two parallel lists and fp32 needs no second copy.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuneloom.errors import ConfigError


def master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """The whole fp32 value of one trained parameter, on all ranks; collective under ZeRO."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() > 0:
        whole: Tensor = safe_get_full_fp32_param(parameter)
        return whole.detach()
    for low, high in unsharded(engine):
        if low is parameter:
            return high.detach()
    raise AssertionError("not a trained parameter of this engine")


def swapped(engine: Any) -> bool:
    """True when parameters or optimizer state live on an NVMe drive."""
    parts = (engine.zero_offload_optimizer(), engine.zero_offload_param())
    return any(part is not None and part.device == "nvme" for part in parts)


def write_whole(engine: Any, folder: Path, *, first: bool) -> None:
    """One folder a trained parameter with fp32, exp_avg, exp_avg_sq and step, written by rank 0;
    collective, one tensor at a time. Raises what rank 0 could not write when all have taken part.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    state = engine.basic_optimizer.state
    step = torch.as_tensor(next(iter(state.values()))["step"], dtype=torch.float32)
    failures: list[Exception] = []

    def write(path: Path, value: Any) -> None:
        if first and not failures:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(value, path)
            except (OSError, RuntimeError) as error:  # the other ranks wait in the next gather
                failures.append(error)

    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            write(folder / name / "fp32.pt", _as_universal(master(engine, parameter)))
            for key in ("exp_avg", "exp_avg_sq"):
                moment = safe_get_full_optimizer_state(parameter, key)
                write(folder / name / f"{key}.pt", _as_universal(moment))
            write(folder / name / "step.pt", step)
    groups = [
        {k: v for k, v in group.items() if k != "params"}
        for group in engine.basic_optimizer.param_groups
    ]
    write(folder / "optimizer_state.pt", {"param_groups": groups})
    if failures:
        raise failures[0]


def _as_universal(tensor: Tensor) -> dict[str, Any]:
    return {"param": tensor.detach().cpu(), "cat_dim": 0}


def unsharded(engine: Any) -> list[tuple[nn.Parameter, Tensor]]:
    """Without ZeRO: each trained parameter with its fp32 master (itself in fp32), as the optimizer
    orders them.
    """
    wrapper = engine.optimizer
    high = [p for group in wrapper.param_groups for p in group["params"]]
    low = [p for group in getattr(wrapper, "fp16_groups", [high]) for p in group]
    return list(zip(low, high, strict=True))


def names(engine: Any) -> list[str]:
    """Without ZeRO: names of the trained parameters, as the optimizer orders them."""
    named = {id(p): name for name, p in engine.module.named_parameters()}
    return [named[id(low)] for low, _ in unsharded(engine)]


def dtypes(engine: Any) -> dict[str, list[str]]:
    """Dtypes of this rank's masters and of its optimizer state, as held."""
    state = engine.basic_optimizer.state  # under ZeRO-3 its groups are emptied, its state is not
    moments = [v for entry in state.values() for k, v in entry.items() if _is_moment(k, v)]
    return {"masters": _names(list(state)), "optimizer_state": _names(moments)}


def _is_moment(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and key != "step"


def _names(tensors: list[Any]) -> list[str]:
    return sorted({str(t.dtype).removeprefix("torch.") for t in tensors})


def adam_state(entry: dict[str, Any], name: str) -> dict[str, Tensor]:
    """step, exp_avg and exp_avg_sq of a parameter; raises ConfigError for another optimizer's."""
    if not {"step", "exp_avg", "exp_avg_sq"} <= set(entry):
        raise ConfigError(
            f"zero.stage: the optimizer state of {name} ({', '.join(sorted(entry))}) cannot move "
            "between ZeRO-0 and the other stages, only AdamW's can; keep zero.stage as it was"
        )
    step = torch.as_tensor(entry["step"], dtype=torch.float32)
    return {"step": step, "exp_avg": entry["exp_avg"], "exp_avg_sq": entry["exp_avg_sq"]}


def place_steps(optimizer: Any) -> None:
    """Give each parameter a step tensor of its own where its update looks for it: beside it where
    that is fused, else on the host. DeepSpeed loads one for all of a group, on the host (0.19.8),
    and fused Adam stops at that (torch 2.13).
    """
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, entry in optimizer.state.items():
        if torch.is_tensor(entry.get("step")):
            place = parameter.device if fused else torch.device("cpu")
            entry["step"] = entry["step"].to(place, copy=True)
