"""A plan as a compact table on a terminal."""

from rich.console import Console
from rich.table import Table

from tuneloom.launch.memory import USABLE
from tuneloom.launch.plan import Plan, gib

PARTS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state",
    "activations": "activations", "loss_head": "loss head", "temporary": "temporary peak",
    "context": "context",
}  # fmt: skip


def show(result: Plan, console: Console | None = None) -> None:
    """Print memory of one rank, then the run's size, disk and time, then advice."""
    console = console or Console(highlight=False)
    ranks = "1 rank" if result.ranks == 1 else f"{result.ranks} ranks, each"
    console.print(
        f"{result.parameters:,} parameters, {result.trainable:,} trained "
        f"({result.trainable / result.parameters:.2%}); {ranks} on {result.device.name}",
        soft_wrap=True,
    )
    console.print(memory_table(result))
    for name, text in facts(result):
        console.print(f"[bold]{name:<12}[/bold] {text}", soft_wrap=True)
    for line in result.advice:
        console.print(f"[yellow]advice[/yellow]       {line}", soft_wrap=True)


def memory_table(result: Plan) -> Table:
    """One row a part, with its share of the device."""
    memory, capacity = result.memory, result.device.bytes
    table = Table(box=None, pad_edge=False)
    table.add_column("memory of a rank")
    table.add_column("size", justify="right")
    table.add_column("of device", justify="right")
    for part, label in PARTS.items():
        size = getattr(memory, part)
        if size:
            table.add_row(label, gib(size), f"{size / capacity:.1%}")
    verdict = "fits" if memory.device <= USABLE * capacity else "does not fit"
    table.add_row("[bold]sum[/bold]", gib(memory.device), f"{memory.device / capacity:.1%}")
    table.add_row("device", gib(capacity), verdict)
    if memory.host:
        table.add_row("host, offloaded and copied", gib(memory.host), "")
    if memory.nvme:
        table.add_row("NVMe, offloaded", gib(memory.nvme), "")
    return table


def facts(result: Plan) -> list[tuple[str, str]]:
    """Name and sentence of each line under the table."""
    work = result.workload
    rows = "unknown" if work.rows is None else f"{work.rows:,}"
    mean = "" if work.tokens_per_row is None else f", {work.tokens_per_row:.0f} tokens each"
    total = "unknown" if work.tokens is None else f"{work.tokens:,}"
    steps = "unknown" if work.steps is None else f"{work.steps:,}"
    where = "of disk free" if result.device.here else "free on this machine's disk"
    best = f", {gib(result.best)} of it the best validation's weights" if result.best else ""
    lines = [
        ("data", f"{rows} rows{mean} ({work.why})"),
        ("run", f"{steps} steps of {work.tokens_per_step:,} tokens; {total} in all"),
        ("traffic", f"{result.traffic.this / 1e9:.2f} GB a step and rank"),
        ("checkpoint", f"{gib(result.checkpoint)} each, {gib(result.checkpoints)} at most{best}; "
                       f"{gib(result.free_disk)} {where}"),
        ("time", _time(result)),
    ]  # fmt: skip
    if (lost := result.failures) is not None:
        lines.append((
            "failures", f"one every {lost.every_hours:.3g} h at Llama 3 405B's rate; a save takes "
            f"{lost.save_seconds:.0f} s, best every {lost.interval_seconds / 60:.0f} min; with "
            f"restarts of {lost.restart_seconds:.0f} s {lost.goodput:.1%} productive",
        ))  # fmt: skip
    return lines


def _time(result: Plan) -> str:
    if result.speed is None:
        return "unknown: set plan.tokens_per_second, or run it once"
    if result.seconds is None:
        return f"unknown: the tokens are ({result.workload.why})"
    hours = result.seconds / 3600
    unit = "GPU-hours" if result.device.cuda else "rank-hours"
    span = f"{hours:.1f} h" if hours >= 1 else f"{result.seconds / 60:.1f} min"
    return (
        f"{span}, {hours * result.ranks:.1f} {unit} at "
        f"{result.speed.tokens_per_second:,.0f} tokens/s ({result.speed.source})"
    )
