"""The trained weights out of the engine: an adapter in PEFT's layout, or a whole model, as
safetensors.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuneloom.train import distributed, masters
from tuneloom.train.distributed import World


def adapters(engine: Any, world: World) -> dict[str, Tensor]:
    """fp32 masters of what is trained, by name, on rank 0 (empty elsewhere); collective.

    The copies that a bf16 run computes with have lost 16 of the masters' bits.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            whole = masters.master(engine, parameter)
            if world.first:
                state[name] = whole.to("cpu", torch.float32, copy=True)
    return state


def gather(network: nn.Module, world: World) -> dict[str, Tensor]:
    """Whole tensors by name on rank 0 (empty elsewhere), one parameter at a time under ZeRO-3;
    collective.
    """
    import deepspeed

    state: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        sharded = hasattr(parameter, "ds_id")
        whole = deepspeed.zero.GatheredParameters([parameter]) if sharded else nullcontext()
        with whole:
            if world.first:
                state[name] = parameter.detach().to("cpu", copy=True)
    if world.first:
        state |= {name: buffer.detach().cpu() for name, buffer in network.named_buffers()}
    return state


def copy(source: Path, folder: Path) -> None:
    """Put what `save` wrote elsewhere, too; it appears whole or not at all."""
    aside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        shutil.copytree(source, aside)
    except BaseException:  # what fills the disk must not stay
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def save(engine: Any, tokenizer: Any, folder: Path, world: World) -> None:
    """Write `folder` with the weights, tokenizer and chat template; collective, written by rank 0.

    LoRA: adapter_config.json and adapter_model.safetensors, in fp32. Full: config.json and model
    safetensors, in `model.dtype`. The folder appears whole or not at all.
    """
    from peft import PeftModel

    network: nn.Module = engine.module
    adapted = isinstance(network, PeftModel)
    state = adapters(engine, world) if adapted else gather(network, world)
    aside = folder.with_name(f".{folder.name}.tmp")

    def write() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        try:
            _write(network, state, aside, adapted=adapted)
            tokenizer.save_pretrained(aside)
        except BaseException:  # what fills the disk must not stay
            shutil.rmtree(aside, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)

    distributed.on_first(write, where=folder)


def _write(network: Any, state: dict[str, Tensor], folder: Path, *, adapted: bool) -> None:
    if adapted:
        network.save_pretrained(folder, state_dict=state, safe_serialization=True)
        return
    from tuneloom.kernels.attention import NAME

    kept = set(_saved_names(network))
    state = {name: tensor for name, tensor in state.items() if name in kept}
    # The attention function's name is ours; the saved model must load anywhere.
    network.config._attn_implementation = "sdpa"
    try:
        network.save_pretrained(folder, state_dict=state, safe_serialization=True)
    finally:
        network.config._attn_implementation = NAME


def _saved_names(network: nn.Module) -> list[str]:
    """Parameter and persistent buffer names, tied duplicates once: those that transformers really
    tied, by the whole model's config, whose text config may say otherwise (Gemma 3).
    """
    tied: Any = network.all_tied_weights_keys
    return [name for name in network.state_dict() if name not in tied]


def store_probe(folder: Path, ids: Tensor, logits: Tensor, facts: dict[str, Any]) -> None:
    """What a fresh process compares with: token ids (1, S) and the live model's logits (S, V)
    fp32.
    """
    from safetensors.torch import save_file

    save_file({"ids": ids.cpu(), "logits": logits.float().cpu()}, folder / "probe.safetensors")
    (folder / "probe.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


@torch.no_grad()
def live_logits(network: nn.Module, ids: Tensor, device: torch.device) -> Tensor:
    """(S, V) logits of the live model on (1, S) ids; collective under ZeRO-3."""
    was_training = network.training
    network.eval()
    positions = torch.arange(ids.shape[1])[None].to(device)
    logits: Tensor = network(
        input_ids=ids.to(device), position_ids=positions, use_cache=False
    ).logits[0]
    network.train(was_training)
    return logits
