"""`kvfabric simulate`: the real cores in a simulated cluster, for figures or to find faults."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvfabric_client.cli.common import console, print_json, table
from kvfabric_client.texts import duration, size

if TYPE_CHECKING:
    from kvfabric.simulation.search import Found
    from kvfabric.simulation.trial import Trial


MANY_NODES = 1000
DIRECTORY_KEYS = 10_000_000
SHORT_WINDOW_S = 60.0  # a long request's whole life and more


class Workload(enum.StrEnum):
    """Lengths of requests: see kvfabric.simulation.parameters."""

    mixed = "mixed"
    uniform = "uniform"
    both = "both"


def simulate(
    nodes: Annotated[int, typer.Option(min=2, max=4096, help="Instances, each with a node.")] = 16,
    sequences: Annotated[
        int, typer.Option(min=0, help="Requests over the run; 0: 1,000 a node, 100,000 at most.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="One seed, one history.")] = 1,
    workload: Annotated[
        Workload, typer.Option(help="Lengths of requests, run with and without lending.")
    ] = Workload.both,
    block_tokens: Annotated[int, typer.Option(min=16, help="Tokens of a block of KV.")] = 512,
    directory: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Shards of a directory that is measured, too; 10,000,000 from 1,000 nodes on.",
        ),
    ] = None,
    faults: Annotated[
        bool, typer.Option("--faults", help="Short runs of small clusters in which much fails.")
    ] = False,
    minutes: Annotated[
        float, typer.Option(min=0.0, help="With --faults: search on with new seeds for so long.")
    ] = 0.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file; -: print them.")
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Draw every node's memory over time; needs the extra `plots`."),
    ] = None,
) -> None:
    """Run the fabric's own cores under a simulated clock, network and disk.

    Without --faults: a workload with and without lending, and what lending gains. With
    --faults: nodes and managers die, messages are lost and doubled, the network is cut,
    clocks drift; books and bytes are audited. A failure prints the command that repeats it.
    """
    if faults:
        _search(seed, minutes, json_file)
        return
    count = sequences or min(1000 * nodes, 100_000)
    if directory is None:
        directory = DIRECTORY_KEYS if nodes >= MANY_NODES else 0
    _measure(nodes, count, seed, workload, block_tokens, directory, json_file, png)


def _measure(
    nodes: int,
    sequences: int,
    seed: int,
    workload: Workload,
    block_tokens: int,
    directory: int,
    json_file: Path | None,
    png: Path | None,
) -> None:
    from dataclasses import asdict

    from kvfabric.simulation import parameters, picture, report, scale
    from kvfabric.simulation.nodes import factory

    make = factory()
    names = ["mixed", "uniform"] if workload is Workload.both else [workload.value]
    trials: list[Trial] = []
    for name in names:
        for lending in (False, True):
            setup = parameters.Setup(
                nodes=nodes,
                sequences=sequences,
                seed=seed,
                workload=parameters.WORKLOADS[name],
                lending=lending,
                block_tokens=block_tokens,
            )
            trials.append(_run(setup, make))
    if png is not None:
        picture.draw(trials, png)
    found = report.report(setup, trials)
    if directory:
        found["directory"] = asdict(scale.measure_apart(nodes, directory))
    _put(found, json_file)
    if json_file is None or str(json_file) != "-":
        _show(found)
    if any(trial.violations for trial in trials):
        raise typer.Exit(1)


def _run(setup: Any, make: Any) -> Trial:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from kvfabric.simulation import trial

    how = "with lending" if setup.lending else "without lending"
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"{setup.workload.name}, {how}", total=1.0)
        return trial.run(
            setup, make, time.perf_counter, lambda share: progress.update(task, completed=share)
        )


def _show(found: dict[str, Any]) -> None:
    out = console()
    runs = found["runs"]
    heads = [f"{run['workload']}{', lending' if run['lending'] else ''}" for run in runs]
    rows = table("", *heads, right=tuple(heads))
    for title, text in _ROWS:
        rows.add_row(title, *(text(run) for run in runs))
    out.print(rows)
    for name, gain in found["gains"].items():
        out.print(
            f"{name}: with lending {gain['tokens_per_s']:.3f} x the tokens generated a second, "
            f"{gain['served_tokens_per_s']:.3f} x the tokens served, "
            f"{gain['imbalance']:.2f} x the imbalance"
        )
    if found["window_s"] < SHORT_WINDOW_S:
        out.print(
            f"[yellow]only {found['window_s']:.0f} s are simulated, in which instances hardly "
            "fill: for what lending gains take fewer nodes, or more sequences[/]"
        )
    if "directory" in found:
        large = found["directory"]
        out.print(
            f"a directory of {large['keys']:,} shards on {large['nodes']:,} nodes: "
            f"{size(large['memory_bytes'])}, {large['shard_us']:.1f} us a shard in deltas, "
            f"{large['locate_us_median']:.0f} us to locate 400 keys, longest pause "
            f"{large['most_pause_ms']:.0f} ms ({large['most_pause_for']})"
        )
    violations = [each for run in runs for each in run["violations"]]
    for each in violations:
        out.print(f"[red]violated: {each}")
    if not violations:
        out.print("violated invariants: none")


_ROWS: tuple[tuple[str, Any], ...] = (
    ("tokens generated a second", lambda r: f"{r['tokens_per_s']:,.0f}"),
    ("tokens served a second", lambda r: f"{r['served_tokens_per_s']:,.0f}"),
    ("longest context served", lambda r: f"{r['longest_context']:,}"),
    ("requests finished", lambda r: f"{r['finished']:,}"),
    ("too long for any room", lambda r: f"{r['rejected']:,}"),
    ("waiting at the end", lambda r: f"{r['waiting_at_end']:,}"),
    ("mean wait", lambda r: duration(r["waited_s"])),
    ("preempted", lambda r: f"{r['preempted']:,}"),
    ("sequences open at most", lambda r: f"{r['open_sequences']:,}"),
    ("memory used", lambda r: f"{r['memory_used']:.0%}"),
    ("imbalance (std. dev.)", lambda r: f"{r['memory_imbalance']:.0%}"),
    ("moved", lambda r: size(r["moved_bytes"])),
    ("lent at most", lambda r: size(r["lent_bytes"])),
    ("directory", lambda r: f"{r['directory_keys']:,} keys"),
    ("plans", lambda r: f"{r['plans']:,}, {r['decisions']:,} decisions"),
    ("a plan, median and most", lambda r: f"{r['plan_s_median']:.3f}, {r['plan_s_most']:.3f} s"),
    ("a heartbeat without shards", lambda r: f"{r['heartbeat_us']:.0f} us"),
    ("and for each shard it tells", lambda r: f"{r['heartbeat_us_per_shard']:.1f} us"),
)


def _search(seed: int, minutes: float, json_file: Path | None) -> None:
    from kvfabric.simulation.nodes import factory
    from kvfabric.simulation.search import search

    make = factory()
    out = console()
    until_s = time.monotonic() + minutes * 60
    reached: dict[str, int] = {}
    runs = 0
    found: Found | None = None
    while found is None:
        outcome = search(seed + runs, make)
        runs += 1
        for point, count in outcome.reached.items():
            reached[point] = reached.get(point, 0) + count
        if outcome.violation:
            found = outcome
        elif time.monotonic() >= until_s:
            break
    _put(
        {
            "first_seed": seed,
            "runs": runs,
            "reached": dict(sorted(reached.items())),
            "violation": found.violation if found else "",
            "seed": found.seed if found else None,
        },
        json_file,
    )
    if found is not None:
        out.print(f"[red]seed {found.seed}: {found.violation}")
        for line in found.history[-40:]:
            out.print(f"  {line}")
        out.print(f"repeat it: kvfabric simulate --faults --seed {found.seed}")
        raise typer.Exit(1)
    rows = table("point", "reached", right=("reached",))
    for point, count in sorted(reached.items()):
        rows.add_row(point, f"{count:,}")
    out.print(rows)
    out.print(f"{runs} runs from seed {seed} on, violated invariants: none")


def _put(found: dict[str, Any], json_file: Path | None) -> None:
    import json

    from kvfabric.errors import Refused

    if json_file is None:
        return
    if str(json_file) == "-":
        print_json(found)
        return
    try:
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    except OSError as error:
        raise Refused(f"cannot write {json_file}: {error}; name another file") from error
