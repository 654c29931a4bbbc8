"""The report, as text and in a real browser (headless Chromium): nothing loaded, nothing executed.

Debian: apt-get install chromium. Without it the browser tests are skipped, or fail where
TUNELOOM_REQUIRE_BROWSER=1 says that it has to be there.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuneloom.cli import main
from tuneloom.evals import evaluation
from tuneloom.evals.evaluation import (
    Baseline,
    Constant,
    Difference,
    Evaluation,
    Example,
    Label,
    Proportion,
    Side,
    proportion,
)

EVIL = "<script>document.title='owned'</script><img src=http://192.0.2.1/x onerror=alert(1)>"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr", "--window-size=1200,1400",
)  # fmt: skip


def side(name: str, right: int, loss: float) -> Side:
    share = proportion(right, 200)
    return Side(
        name=name,
        exact_match=share,
        label_accuracy=share,
        loss=loss,
        target_tokens=600,
        seconds=4.0,
    )


def an_evaluation(**changes: Any) -> Evaluation:
    gain = Difference(value=0.85, low=0.79, high=0.89, p_value=1e-50, only_base=0, only_tuned=170)
    loss = Difference(value=-7.8, low=-7.9, high=-7.7, p_value=1e-60, only_base=0, only_tuned=200)
    found = Evaluation(
        task="debian-test",
        n=200,
        metric="label_accuracy",
        base=side("base", 0, 8.2),
        tuned=side("tuned", 170, 0.4),
        difference={"label_accuracy": gain, "exact_match": gain, "loss": loss},
        baseline=Baseline(
            method="TF-IDF", train_rows=800, label_accuracy=proportion(190, 200), seconds=2.0
        ),
        baseline_missing=None,
        constant=Constant(answer="perl", label_accuracy=proportion(100, 200)),
        labels=[
            Label(label="perl", n=100, base=0, tuned=90),
            Label(label=EVIL, n=100, base=0, tuned=80),
        ],
        seen_in_training=0,
        left_out=3,
        data={"path": "datasets/debian", "split": "test", "digest": "d" * 64},
        models={"renderer": "r" * 64},
        device="cpu",
        examples=[Example(id="1", question=EVIL, answer="perl", base=EVIL, tuned="perl")],
    )
    return found.model_copy(update=changes)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it, with hostile text wherever text comes from data."""
    from tuneloom.config import build
    from tuneloom.train.config import TrainConfig

    folder = tmp_path / "runs" / "demo-1"
    (folder / "drill").mkdir(parents=True)
    mapping = {
        "epochs": 1,
        "run": {"id": "demo-1"},
        "model": {"path": "examples/tiny-base"},
        "method": {"kind": "lora"},
        "objective": {"kind": "sft"},
        "data": {"path": EVIL},
    }
    config = build(TrainConfig, mapping).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows: list[dict[str, Any]] = []
    for step in range(1, 61):
        rows.append({
            "step": step, "train/loss": 8 / step, "train/grad_norm": 1.0, "train/lr": 1e-3,
            "train/skipped": 0, "speed/tokens_per_second": 5000.0 + step,
            "memory/peak_gib": 0.9, "time/productive": 1.5, "time/data": 0.5,
        })  # fmt: skip
    rows.append({"step": 60, "eval/loss": 0.321})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    account = {
        "rows": 900, "used": 890, "dropped": {"over_length": 10}, "tokens": 40_000,
        "trained": 3_000, "masked": 36_000, "truncated": 0, "dropped_tokens": 1_000,
    }  # fmt: skip
    files = {
        "run.json": {"run_id": "demo-1", "state": "done", "started": "2026-11-22T13:00:06Z",
                     "world_size": 2, "device": "cpu",
                     "dataset": {"path": EVIL, "digest": "e" * 64, "rows": 800}},
        "ledger.json": {"sources": {EVIL: account}, "padded": 0, "total": account},
        "effects.json": {"step": 2, "receipts": [
            {"option": "method=lora", "acted": True, "evidence": {"with_gradient": 56}}]},
        "drill/drill.json": {"ok": True, "peft_max_diff": 1e-6, "merged_max_diff": 1e-5,
                             "tolerance": 1e-3, "adapter_effect": 2.0, "conclusive": True,
                             "bytes": 1_252_376},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    sample = {"step": 60, "prompt": EVIL, "expected": "perl", "answer": EVIL}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    evaluation.write(folder, an_evaluation())
    return folder


def page(run: Path, *options: str) -> str:
    assert main(["report", f"run={run}", *options]) == 0
    return (run / "report.html").read_text("utf-8")


def test_the_page_leads_with_the_verdict_and_both_figures(run: Path) -> None:
    text = page(run)
    lead = text[text.index('class="lead') : text.index('class="keys"')]
    assert "Better than its base" in lead
    assert "85.0 %" in lead and "0.0 %" in lead and "79.4 to 89.3 %" in lead
    assert "200 held-out rows" in lead and "None of them was trained on" in lead
    assert "It does better than the tuned model: for this task alone, use it." in lead


def test_a_line_separator_in_a_sample_is_no_line_end(run: Path) -> None:
    sample = {"step": 60, "prompt": "p", "expected": "perl", "answer": "one\u2028two\x85three"}
    with (run / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        file.write(json.dumps(sample) + "\n")
    assert page(run).count("one\u2028two\x85three") == 2


def test_everything_recorded_is_on_the_page(run: Path) -> None:
    text = page(run)
    for expected in (
        "Where the time went", "over_length 10", "36,000", "First-checkpoint drill",
        "1,252,376 bytes", "method=lora", "with gradient 56", "validation loss ended at 0.321",
        "75.0 %", "3 rows of the split were not scored", "2026-11-22 13:00 UTC",
    ):  # fmt: skip
        assert expected in text, expected


def test_hostile_data_is_text_and_nothing_is_loaded(run: Path) -> None:
    text = page(run)
    assert "<script" not in text and "<img" not in text
    assert text.count("&lt;script&gt;document.title") >= 7
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", text.replace("&#34;", ""))
    assert links and all(link.startswith(("#", "http://192.0.2.1")) for link in links)
    outside = [link for link in links if not link.startswith("#")]
    assert all(f"&lt;img src={link}" in text for link in outside)


def test_a_run_that_was_not_evaluated_says_so_and_shows_no_figure(run: Path) -> None:
    shutil.rmtree(run / "evals")
    text = page(run)
    assert "Not evaluated" in text and f"tuneloom evaluate run={run}" in text
    assert "Base against tuned" not in text and 'class="number' not in text


@pytest.mark.parametrize(
    ("changes", "word", "reason"),
    [
        ({"seen_in_training": 5}, "Not shown to be better", "5 of these rows were trained on"),
        ({"base": None, "difference": {}}, "Nothing to compare with", "there is no base"),
        (
            {"constant": Constant(answer="perl", label_accuracy=proportion(165, 200))},
            "Not shown to be better",
            "always answering &#39;perl&#39; gets 0.825 right",
        ),
        ({"baseline": None, "baseline_missing": "no scikit"}, "Better", "No baseline: no scikit."),
    ],
)
def test_the_verdict_is_no_better_than_the_evidence(
    run: Path, changes: dict[str, Any], word: str, reason: str
) -> None:
    evaluation.write(run, an_evaluation(**changes))
    text = page(run)
    assert word in text and reason in text


def test_a_loss_leads_where_there_is_nothing_to_answer(run: Path) -> None:
    bare: dict[str, Proportion | None] = {"exact_match": None, "label_accuracy": None}
    found = an_evaluation()
    assert found.base is not None
    changes = {
        "metric": "loss",
        "base": found.base.model_copy(update=bare),
        "tuned": found.tuned.model_copy(update=bare),
        "difference": {"loss": found.difference["loss"]},
        "labels": [], "examples": [], "baseline": None, "constant": None,
    }  # fmt: skip
    evaluation.write(run, found.model_copy(update=changes))
    text = page(run)
    assert "Loss per target token fell by 7.800" in text and "8.200" in text


def test_a_failed_run_says_why(run: Path) -> None:
    facts = {"run_id": "demo-1", "state": "failed", "error": ["options that did nothing: x"]}
    (run / "run.json").write_text(json.dumps(facts))
    text = page(run)
    assert "Run failed" in text and "options that did nothing: x" in text


def test_a_folder_with_nothing_but_a_config_gives_a_page_without_figures(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = page(run)
    assert "Not evaluated" in text and "<svg" not in text


def test_the_named_task_leads_and_an_unknown_one_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation.write(run, an_evaluation(task="second", n=123))
    assert "123 held-out rows" in page(run, "task=second")
    assert "200 held-out rows" in page(run, "task=debian-test")
    assert main(["report", f"run={run}", "task=third"]) == 2
    assert "no 'third', only: " in capsys.readouterr().err


def test_a_torn_last_line_is_left_out_and_a_broken_one_is_a_data_error(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 61, "train/lo')
    assert "Training loss went from" in page(run)
    metrics.write_text('{"step": 1\n' + whole)
    assert main(["report", f"run={run}"]) == 3
    assert "metrics.jsonl:1: broken JSON" in capsys.readouterr().err


def test_what_is_no_run_is_refused_with_exit_2(tmp_path: Path) -> None:
    assert main(["report", f"run={tmp_path}"]) == 2


# in a real browser


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser; skips, or fails where it is required."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        reason = "chromium is not installed: apt-get install chromium"
        if os.environ.get("TUNELOOM_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def browse(chromium: str, profile: Path, file: Path, *options: str) -> tuple[str, list[str]]:
    """What Chromium prints, and the console messages of the page."""
    done = subprocess.run(
        [chromium, *FLAGS, f"--user-data-dir={profile}", *options, file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
def test_the_browser_shows_the_headings_and_complains_of_nothing(
    run: Path, chromium: str, tmp_path: Path
) -> None:
    page(run)
    dom, console = browse(chromium, tmp_path / "profile", run / "report.html", "--dump-dom")
    assert console == []
    assert "<title>demo-1: Better than its base</title>" in dom
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", dom)
    assert headings == [
        "Better than its base", "Base against tuned", "Training", "Where the time went", "Data",
        "Samples during training", "Proofs", "Record",
    ]  # fmt: skip
    assert dom.count("<svg") == 6 and "<script" not in dom and "<img" not in dom


@pytest.mark.browser
def test_the_pages_own_policy_would_stop_a_script_and_we_would_see_it(
    run: Path, chromium: str, tmp_path: Path
) -> None:
    text = page(run).replace("</body>", f"{EVIL}</body>")
    broken = tmp_path / "broken.html"
    broken.write_text(text, encoding="utf-8")
    dom, console = browse(chromium, tmp_path / "profile", broken, "--dump-dom")
    assert "<title>demo-1: Better than its base</title>" in dom
    assert any("Content Security Policy" in line for line in console)


@pytest.mark.browser
@pytest.mark.parametrize(("scheme", "paper"), [(1, (255, 255, 255)), (0, (18, 21, 26))])
def test_the_page_is_drawn_in_light_and_in_dark(
    run: Path, chromium: str, tmp_path: Path, scheme: int, paper: tuple[int, int, int]
) -> None:
    from PIL import Image

    page(run)
    shot = tmp_path / "page.png"
    browse(
        chromium, tmp_path / "profile", run / "report.html", f"--screenshot={shot}",
        f"--blink-settings=preferredColorScheme={scheme}",
    )  # fmt: skip
    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    counts = {colour: count for count, colour in colours}
    assert max(counts, key=lambda colour: counts[colour]) == paper
    blue = sum(n for (r, g, b), n in counts.items() if b > r + 60 and b > g + 20)
    assert len(counts) > 200 and blue > 3000  # the tuned figure and its bars


@pytest.mark.browser
def test_the_page_prints(run: Path, chromium: str, tmp_path: Path) -> None:
    page(run)
    pdf = tmp_path / "page.pdf"
    browse(chromium, tmp_path / "profile", run / "report.html", f"--print-to-pdf={pdf}")
    content = pdf.read_bytes()
    pages = content.count(b"/Type /Page\n") + content.count(b"/Type /Page ")
    assert content.startswith(b"%PDF") and 2 <= pages <= 12
