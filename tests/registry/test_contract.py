"""Digests tell weights, tokenizers, templates apart; a contract refuses what it is not for."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tuneloom.errors import ConfigError, DataError, RefusedError
from tuneloom.registry import contract as contracts
from tuneloom.registry.adapters import is_adapter, is_model, model_folder, open_adapter
from tuneloom.registry.contract import (
    Base,
    Contract,
    Golden,
    check_base,
    check_renderings,
    check_tokenizer,
    check_weights,
)
from tuneloom.registry.digests import (
    NONE,
    non_finite,
    template_digest,
    tokenizer_digest,
    weights_digest,
)


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.random((4, 3), np.float32) for name in ("a.weight", "b.weight", "c.weight")}


def one_file(folder: Path, content: dict[str, np.ndarray], **metadata: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(content, folder / "model.safetensors", metadata=metadata)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def sharded(folder: Path, content: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    names = {name: f"model-{i:05d}.safetensors" for i, name in enumerate(content)}
    for name, file in names.items():
        save_file({name: content[name]}, folder / file)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


GOLDEN = Golden(record={"text": "x"}, prompt_ids=[1, 2], ids=[1, 2, 3], targets=[[2, 3]])


def example(**changes: Any) -> Contract:
    given: dict[str, Any] = {
        "kind": "adapter",
        "run": "run-1",
        "method": "lora",
        "base": Base(path="base", digest="d" * 64),
        "weights": "w" * 64,
        "dtype": "fp32",
        "tokenizer": "t" * 64,
        "template": "none",
        "renderer": "r" * 64,
        "max_length": 128,
        "over_length": "drop",
        "objective": "sft",
        "golden": [
            Golden(record={"text": "x"}, prompt_ids=[1, 2], ids=[1, 2, 3], targets=[[2, 3]])
        ],
    }
    return Contract(**{**given, **changes})


def test_the_same_weights_have_one_digest_however_they_are_sharded(tmp_path: Path) -> None:
    whole = one_file(tmp_path / "whole", tensors(), format="pt", note="written again")
    assert weights_digest(whole) == weights_digest(sharded(tmp_path / "shards", tensors()))


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_any_change_of_a_tensor_changes_the_digest(tmp_path: Path, change: str) -> None:
    before, after = tensors(), tensors()
    if change == "value":
        after["b.weight"][3, 2] = np.nextafter(after["b.weight"][3, 2], 2)
    elif change == "name":
        after["d.weight"] = after.pop("c.weight")
    elif change == "shape":
        after["a.weight"] = after["a.weight"].reshape(3, 4)
    else:
        after["a.weight"] = after["a.weight"].view(np.int32)
    one, other = one_file(tmp_path / "one", before), one_file(tmp_path / "other", after)
    assert weights_digest(one) != weights_digest(other)


def test_a_second_copy_that_no_loader_reads_does_not_count(tmp_path: Path) -> None:
    folder = one_file(tmp_path / "model", tensors())
    before = weights_digest(folder)
    save_file(tensors(seed=1), folder / "consolidated.safetensors")
    assert weights_digest(folder) == before


def test_a_folder_without_safetensors_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(DataError, match=f"{tmp_path}.*safetensors"):
        weights_digest(tmp_path)


def test_two_sets_of_weights_that_a_loader_chooses_from_are_refused(tmp_path: Path) -> None:
    folder = one_file(sharded(tmp_path / "both", tensors()), tensors(seed=1))
    with pytest.raises(DataError, match=r"holds model\.safetensors beside .*index\.json"):
        weights_digest(folder)


def test_an_index_of_one_file_that_bears_the_plain_name_is_that_file(tmp_path: Path) -> None:
    """As MLX saves a model of one shard."""
    folder = one_file(tmp_path / "mlx", tensors())
    before = weights_digest(folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors(), "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_digest(folder) == before


def test_an_adapters_digest_is_of_the_file_that_peft_reads(tmp_path: Path) -> None:
    folder = one_file(tmp_path / "decoy", tensors())
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(DataError, match=r"no adapter_model\.safetensors"):
        weights_digest(folder)
    save_file(tensors(seed=1), folder / "adapter_model.safetensors")
    assert weights_digest(folder) == weights_digest(one_file(tmp_path / "same", tensors(seed=1)))


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "model.bin"])
def test_an_index_names_safetensors_files_beside_it_and_nothing_else(
    tmp_path: Path, name: str
) -> None:
    folder = sharded(tmp_path / "shards", tensors())
    index = {"metadata": {}, "weight_map": {"a.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="no safetensors file beside it"):
        weights_digest(folder)


def test_a_shard_that_the_index_names_and_that_is_not_there_is_a_data_error(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "shards", tensors())
    (folder / "model-00001.safetensors").unlink()
    with pytest.raises(DataError, match=r"model-00001\.safetensors: not there.*copy it again"):
        weights_digest(folder)


@pytest.mark.parametrize("damage", ["short", "header", "empty"])
def test_a_damaged_file_is_a_data_error_that_names_it(tmp_path: Path, damage: str) -> None:
    file = one_file(tmp_path / "model", tensors()) / "model.safetensors"
    content = file.read_bytes()
    damaged = {
        "short": content[:-8],
        "header": struct.pack("<Q", 5) + b"nojso" + content[13:],
        "empty": b"",
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        weights_digest(file.parent)


def test_nan_and_infinity_are_found_in_fp32_and_fp16_and_integers_are_not_floats(
    tmp_path: Path,
) -> None:
    content = tensors()
    content["b.weight"][1, 1] = np.nan
    content["half"] = np.array([1, np.inf], np.float16)
    content["largest"] = np.array([np.finfo(np.float32).max], np.float32)
    content["ids"] = np.array([-1, 2**31 - 1], np.int32)
    folder = one_file(tmp_path / "model", content)
    assert sorted(non_finite(folder)) == ["b.weight", "half"]


def test_nan_is_found_in_bf16(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    good, bad = torch.ones(3, dtype=torch.bfloat16), torch.full((2,), torch.inf)
    save_torch({"good": good, "bad": bad.bfloat16()}, tmp_path / "model.safetensors")
    assert non_finite(tmp_path) == ["bad"]


def test_padding_settings_do_not_change_a_tokenizer_but_a_merge_does(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"merges": ["a b"]}, "padding": None}))
    before = tokenizer_digest(tmp_path)
    path.write_text(json.dumps({"padding": {"length": 8}, "model": {"merges": ["a b"]}}))
    assert tokenizer_digest(tmp_path) == before
    path.write_text(json.dumps({"model": {"merges": ["a c"]}, "padding": None}))
    assert tokenizer_digest(tmp_path) != before


def test_a_template_has_one_digest_in_either_of_its_places(tmp_path: Path) -> None:
    loose, inside = tmp_path / "loose", tmp_path / "inside"
    for folder in (loose, inside):
        folder.mkdir()
    (loose / "chat_template.jinja").write_text("{{ messages }}\n")
    content = json.dumps({"chat_template": "{{ messages }}\n"})
    (inside / "tokenizer_config.json").write_text(content)
    assert template_digest(loose) == template_digest(inside) != NONE
    assert template_digest(tmp_path) == NONE


def test_a_contract_reads_back_as_it_was_written(tmp_path: Path) -> None:
    contracts.write(tmp_path, example())
    assert contracts.read(tmp_path) == example()
    assert [file.name for file in tmp_path.iterdir()] == [contracts.FILE]


def test_a_folder_without_contract_has_none_and_a_broken_one_is_a_data_error(
    tmp_path: Path,
) -> None:
    assert contracts.read(tmp_path) is None
    (tmp_path / contracts.FILE).write_text('{"version": 1, "kind": "adapter"')
    with pytest.raises(DataError, match="not a contract"):
        contracts.read(tmp_path)


def test_another_base_is_refused_with_both_digests() -> None:
    with pytest.raises(RefusedError) as refused:
        check_base(example(), "runs/1/export/adapter", digest="e" * 64, given="other-base")
    assert "d" * 16 in str(refused.value) and "e" * 16 in str(refused.value)
    assert "other-base" in str(refused.value)
    assert refused.value.exit_code == 4
    check_base(example(), "runs/1/export/adapter", digest="d" * 64, given="base")


def test_other_weights_than_the_exported_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="export the run again"):
        check_weights(example(), tmp_path, digest="0" * 64)
    check_weights(example(), tmp_path, digest="w" * 64)


def test_another_template_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    held = example(tokenizer=tokenizer_digest(tmp_path))
    check_tokenizer(held, tmp_path, holder="adapter")
    (tmp_path / "chat_template.jinja").write_text("changed")
    with pytest.raises(RefusedError, match="adapter: trained with a template of digest none"):
        check_tokenizer(held, tmp_path, holder="adapter")


def test_a_golden_rendering_that_differs_is_refused_with_its_place() -> None:
    check_renderings(example(), "adapter", render=lambda record: ([1, 2], [1, 2, 3]))
    with pytest.raises(RefusedError, match=r"rendering 0 differs from token 1 on .*\[2\].*\[9\]"):
        check_renderings(example(), "adapter", render=lambda record: ([1, 9], [1, 2, 3]))
    with pytest.raises(RefusedError, match="differs from token 3"):
        check_renderings(example(), "adapter", render=lambda record: ([1, 2], [1, 2, 3, 4]))


def test_an_adapter_is_refused_as_a_base_and_a_model_as_an_adapter(tmp_path: Path) -> None:
    model = one_file(tmp_path / "model", tensors())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16}')
    assert (is_model(model), is_adapter(model)) == (True, False)
    assert (is_model(adapter), is_adapter(adapter)) == (False, True)
    with pytest.raises(ConfigError, match=r"base: .* is an adapter, not a base"):
        model_folder(str(adapter), key="base")
    with pytest.raises(ConfigError, match="holds a whole model"):
        open_adapter(model)
    assert (open_adapter(adapter).rank, open_adapter(adapter).contract) == (8, None)


def test_what_is_neither_folder_nor_hub_id_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: .*no hub id"):
        model_folder(str(tmp_path / "missing" / "folder"))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        model_folder(str(tmp_path))
