"""kvcli testbed: the embedded model's own commands."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from kvcli.cli import output
from kvcli.errors import KvcliError, unknown

app = typer.Typer(
    name="testbed", help="Train and measure the embedded testbed model.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints and the trained model.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="testbed or testbed-deep.")] = "testbed",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps, instead of the recipe's.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train a testbed model from its recipe.

    On one core about 20 minutes, testbed-deep several times that. The result is OUT/model; use it as --model OUT/model.

    \b
    Examples:
      kvcli testbed train --out my-testbed
      kvcli testbed train --out my-testbed --resume
      kvcli testbed train --recipe testbed-deep --out my-deep
      kvcli sweep --model ./my-testbed/model --task testbed --method snapkv --ratio 0.2
    """
    from kvcli.cli.running import quiet_libraries

    quiet_libraries()
    from kvcli.models.aliases import TESTBEDS
    from kvcli.testbed.train import RECIPES, Progress
    from kvcli.testbed.train import train as run

    if recipe not in RECIPES:
        raise unknown("recipe", recipe, RECIPES, given=f"--recipe {recipe}", listing="kvcli testbed train --help")
    chosen = dataclasses.replace(RECIPES[recipe], seed=seed, steps=steps or RECIPES[recipe].steps)
    try:
        with output.progress("training") as bar:

            def show(progress: Progress) -> None:
                facts = {"loss": f"loss {progress.loss:.3f}", "speed": f"{progress.tokens_per_second:,.0f} tokens/s"}
                if progress.accuracy:
                    facts["worst"] = f"worst family {100 * min(progress.accuracy.values()):.0f} %"
                bar.update(progress.step, progress.steps, **facts)

            folder = run(chosen, out, resume=resume, threads=threads, report=show)
    except FileExistsError as e:
        fix = "--resume to go on, or another --out"
        raise KvcliError(f"{out} holds a checkpoint", given=f"--out {out}", fix=fix) from e
    except ValueError as e:
        raise KvcliError(str(e), given=f"--out {out}", fix="another --out, or the same --steps and --seed") from e
    output.result(str(folder))
    model = folder if folder.is_absolute() else f"./{folder}"
    _, suite = TESTBEDS[recipe]
    output.next_command(f"kvcli sweep --model {model} --task {suite} --method tier1 --ratio 0.3")


@app.command()
def accuracy(
    model: Annotated[str, typer.Option("--model", "-m", help="testbed, or ./FOLDER of another one.")] = "testbed",
    samples: Annotated[int, typer.Option("--limit", "-n", min=1, help="Prompts per family and length.")] = 200,
    lengths: Annotated[str, typer.Option("--lengths", help="Prompt lengths in tokens.")] = "160,448,768,960",
    suite: Annotated[
        str, typer.Option("--suite", help="testbed, or testbed_deep: examples of other families among the shots.")
    ] = "testbed",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure full-cache accuracy per family and prompt length.

    Greedy generation, exact answer, on prompts no training run has drawn; the table of docs/testbed.md.

    \b
    Examples:
      kvcli testbed accuracy
      kvcli testbed accuracy --model ./my-testbed/model --limit 50
      kvcli testbed accuracy --model testbed-deep --suite testbed_deep --lengths 448,1024,1800
    """
    from kvcli.cli.options import integers
    from kvcli.cli.running import quiet_libraries

    quiet_libraries()
    from kvcli.engine.testbed_accuracy import measure

    sizes = integers("--lengths", lengths) or ()
    total = len(sizes)
    with output.progress("accuracy") as bar:
        rows = measure(model, samples, sizes, lambda done, label: bar.update(done, total * 8, cell=label), suite)
    if json:
        output.json_result(rows)
        return
    output.result(f"{model}: full cache, % right of {output.count(samples, 'prompt')} each")
    headers = ["family", *(f"{row['length']} tokens" for row in rows)]
    families = [(name, *(round(100 * row["accuracy"][name], 1) for row in rows)) for name in rows[0]["accuracy"]]
    output.result(output.table(headers, families))
    output.note(f"longest prompts: {', '.join(str(row['longest']) for row in rows)} tokens")
    output.next_command(f"kvcli sweep --model {model} --task {suite} --method tier1 --ratio 0.3")
