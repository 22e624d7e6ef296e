"""The commands of `prefopt`, in the order of `prefopt --help`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prefopt.cli.plot_option import WithPlot

if TYPE_CHECKING:
    from prefopt.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache = typer.Typer(no_args_is_help=True)

# An override with dashes in front reaches our own error, which says how it is written.
TAKES_OVERRIDES = {"ignore_unknown_options": True}

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys to change: train.learning_rate=5e-6 loss=ipo", show_default=False),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.", show_default=False)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from prefopt import __version__

        print(f"prefopt {__version__}")
        raise typer.Exit


@app.callback()
def prefopt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train language models from preference data, and know which loss to trust.

    Start with [bold]prefopt train quickstart[/bold]: a small complete world, no download, no GPU.
    """


@app.command(context_settings=TAKES_OVERRIDES)
def train(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Run a recipe; run it again to resume."""
    loaded = _loaded(recipe, overrides)

    from prefopt.cli.printing import console
    from prefopt.train import run_training

    run_training(loaded, console())


@app.command(context_settings=TAKES_OVERRIDES)
def check(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Look before training: data edges, truncation, memory."""
    loaded = _loaded(recipe, overrides)

    from prefopt.cli.printing import console
    from prefopt.preflight import check_recipe

    check_recipe(loaded, console())


@app.command(context_settings=TAKES_OVERRIDES)
def sweep(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option("--processes", "-n", min=1, help="Runs at a time.", show_default="one per GPU")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each run.", show_default="cores / processes")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on Ray: local, auto, or the address of a cluster.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="List the runs and what their betas amount to.")] = False,
    commands: Annotated[bool, typer.Option("--commands", help="Print shell commands for any scheduler.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Do failed runs again.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before a large sweep.")] = False,
) -> None:
    """Compare losses: every run of a sweep on equal terms, and a report. Run it again to resume."""
    import sys

    from prefopt.cli.printing import console
    from prefopt.sweep.commands import SweepOptions, preview, show_commands
    from prefopt.sweep.commands import sweep as run_sweep

    options = SweepOptions(processes, threads, ray, retry, yes)
    if plan:
        preview(recipe, overrides or (), console())
    elif commands:
        show_commands(recipe, overrides or (), options, console())
    elif not run_sweep(recipe, overrides or (), options, console()):
        sys.exit(1)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of runs or sweeps.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="RUN/report")] = None,
    figures: Annotated[bool, typer.Option(help="Also draw PNG and SVG for papers.")] = True,
) -> None:
    """Say which loss to trust: an HTML page, Markdown, figures and tables."""
    from prefopt.cli.printing import console
    from prefopt.report.commands import write_report
    from prefopt.screen import Screen

    paths = [Path(run).expanduser() for run in runs]
    beside = paths[0] / "report" if len(paths) == 1 else Path("report")
    written = write_report(paths, output or beside, figures=figures)
    screen = Screen(console())
    for number, line in enumerate(written.answer):
        screen.named("" if number else "answer", line)
    for number, line in enumerate(written.warnings):
        screen.named("" if number else "note", line)
    screen.named("report", str(written.html))


@app.command("eval")
def evaluate(run: RunArgument) -> None:
    """Evaluate a finished run on held-out data."""
    from prefopt.cli.runs import find_run

    folder = find_run(run)

    from prefopt.cli.printing import console, show_measures
    from prefopt.evaluate_run import evaluate_run

    out = console()
    show_measures(out, evaluate_run(folder, out))


@app.command()
def export(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="Folder to write to.", show_default="RUN/export")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Convert the weights.", show_default="as trained"),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also push the model to the hub.")
    ] = None,
) -> None:
    """Merge the adapter, convert, and write or push a plain model."""
    from prefopt.cli.runs import find_run

    folder = find_run(run)

    from prefopt.export import export_run

    print(export_run(folder, output=output, dtype=dtype, push_to_hub=push_to_hub))


@app.command(cls=WithPlot)
def losses(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME [KEY=VALUE]...]...",
            help="Losses with their hyper-parameters, sums (dpo+0.5*sft), or your own f: my.module:function.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        str | None,
        typer.Option(metavar="[FILE]", help="Draw f, f' and p_f: .png, .svg or .pdf; losses.png if no file follows."),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(metavar="NAME:BETA", help="Print the betas that regularise as this one does: dpo:0.1"),
    ] = None,
    at: Annotated[float, typer.Option(metavar="P", help="Strength of preference that --match also matches.")] = 0.75,
    radius: Annotated[float, typer.Option(metavar="R", help="Sample f on [-R, R].")] = 20.0,
    json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
) -> None:
    """List every loss, explain and profile one, or compare several."""
    from prefopt.cli.losses import losses

    losses(words or (), plot=plot, match=match, at=at, radius=radius, as_json=json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="One recipe, printed to start from.", show_default=False)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe.")] = False,
) -> None:
    """List the shipped recipes, or print one."""
    from prefopt.cli.recipes import show_recipe, show_recipes, show_schema

    if schema:
        show_schema()
    elif name is None:
        show_recipes()
    else:
        show_recipe(name)


@cache.command(context_settings=TAKES_OVERRIDES)
def build(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Compute the reference once and keep it."""
    loaded = _loaded(recipe, overrides)

    from prefopt.cli.printing import console
    from prefopt.reference.commands import build_cache

    build_cache(loaded, console())


@cache.command(context_settings=TAKES_OVERRIDES)
def verify(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rehash: Annotated[
        bool, typer.Option("--rehash", help="Hash the reference's weights again; trust nothing.")
    ] = False,
) -> None:
    """Compute a sample again and compare it with the cache."""
    loaded = _loaded(recipe, overrides)

    from prefopt.cli.printing import console
    from prefopt.reference.commands import verify_cache

    verify_cache(loaded, console(), rehash=rehash)


@cache.command(context_settings=TAKES_OVERRIDES)
def info(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Show what the cache holds for a recipe."""
    loaded = _loaded(recipe, overrides)

    from prefopt.cli.printing import console
    from prefopt.reference.commands import cache_info

    cache_info(loaded, console())


@cache.command("list")
def list_caches() -> None:
    """List the caches of this user: size and last use."""
    from prefopt.cli.printing import console
    from prefopt.reference.storage_commands import list_caches

    list_caches(console())


@cache.command(context_settings=TAKES_OVERRIDES)
def compact(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Merge small shards into few large ones."""
    loaded = _loaded(recipe, overrides)

    from prefopt.cli.printing import console
    from prefopt.reference.storage_commands import compact_cache

    compact_cache(loaded, console())


@cache.command()
def prune(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]...", help="Keep what these recipes need; drop the rest of their caches."),
    ] = None,
    unused: Annotated[
        str | None, typer.Option(metavar="DAYSd", help="Remove whole caches not used for so long: 90d.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Drop completions that recipes do not need, or caches that nobody uses."""
    loaded = [_loaded(recipe, None) for recipe in recipes or ()]
    if bool(loaded) == (unused is not None):
        raise typer.BadParameter("name recipes whose completions stay, or --unused 90d")

    from prefopt.cli.printing import console
    from prefopt.reference.storage_commands import prune_cache, prune_unused

    if unused is not None:
        prune_unused(unused, console(), dry_run=dry_run)
    else:
        prune_cache(loaded, console(), dry_run=dry_run)


FileArgument = Annotated[
    str, typer.Argument(metavar="FILE", help="A path, or a URL that fsspec opens: s3://bucket/cache.tar")
]
ElsewhereArgument = Annotated[
    str,
    typer.Argument(metavar="WHERE", help="OWNER/NAME of a dataset on the hub, or a folder's URL: s3://bucket/cache"),
]


@cache.command("export", context_settings=TAKES_OVERRIDES)
def export_cache(recipe: RecipeArgument, target: FileArgument, overrides: Overrides = None) -> None:
    """Write a cache as one file with checksums."""
    loaded = _loaded(recipe, overrides)

    from prefopt.cli.printing import console
    from prefopt.reference.storage_commands import export_to

    export_to(loaded, target, console())


@cache.command("import", context_settings=TAKES_OVERRIDES)
def import_cache(recipe: RecipeArgument, source: FileArgument, overrides: Overrides = None) -> None:
    """Take what a cache lacks from an exported file."""
    loaded = _loaded(recipe, overrides)

    from prefopt.cli.printing import console
    from prefopt.reference.storage_commands import import_from

    import_from(loaded, source, console())


@cache.command(context_settings=TAKES_OVERRIDES)
def push(recipe: RecipeArgument, target: ElsewhereArgument, overrides: Overrides = None) -> None:
    """Send what the hub or a URL lacks; a new repository is private."""
    loaded = _loaded(recipe, overrides)

    from prefopt.cli.printing import console
    from prefopt.reference.storage_commands import push_to

    push_to(loaded, target, console())


@cache.command(context_settings=TAKES_OVERRIDES)
def pull(recipe: RecipeArgument, source: ElsewhereArgument, overrides: Overrides = None) -> None:
    """Take what a cache lacks from the hub or a URL."""
    loaded = _loaded(recipe, overrides)

    from prefopt.cli.printing import console
    from prefopt.reference.storage_commands import pull_from

    pull_from(loaded, source, console())


app.add_typer(cache, name="cache", help="Build, verify, move or clear the reference cache.")


def _loaded(recipe: str, overrides: list[str] | None) -> Recipe:
    """Check the recipe before anything heavy is imported."""
    from prefopt.recipe import load_recipe

    return load_recipe(recipe, overrides or ())
