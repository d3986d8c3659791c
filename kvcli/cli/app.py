"""The command line: names of commands to modules, imported when used; errors to one message and an exit code.

Each module of COMMANDS defines `command` (a function with typer annotations; its docstring is its help) or, for a
group of commands, `app` (a typer.Typer). Nothing here imports them before they are typed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kvcli import __version__
from kvcli.errors import Exit, KvcliError, unknown

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("kvcli.cli.run", "Measure one method at one kept ratio on one task."),
    "sweep": ("kvcli.cli.sweep", "Measure a grid of methods, kept ratios and tasks."),
    "bench": ("kvcli.cli.bench", "Measure what methods save in time and memory."),
    "report": (
        "kvcli.cli.report",
        "Write a report: verdicts, tables with intervals and paired differences, figures, provenance.",
    ),
    "plot": ("kvcli.cli.plot", "Draw figures of a result folder or of bench's measurements."),
    "attn-map": ("kvcli.cli.attn_map", "Draw what a model attends to and what methods throw away."),
    "export": ("kvcli.cli.export", "Write results as CSV, Parquet, lm-eval or Every Eval Ever files."),
    "show": ("kvcli.cli.show", "Print one prompt with kept tokens marked and all outputs."),
    "list": ("kvcli.cli.list", "List methods, tasks, models, presets or result folders."),
    "prefetch": (
        "kvcli.cli.prefetch",
        "Bring models and data sets into the local caches, for machines without a network.",
    ),
    "status": ("kvcli.cli.status", "Show how far a result folder is."),
    "rescore": ("kvcli.cli.rescore", "Score stored outputs again, without the model."),
    "check": ("kvcli.cli.check", "Check a result folder for damage and compact its records."),
    "profile-heads": ("kvcli.cli.profile_heads", "Measure how much each attention head retrieves."),
    "new-method": ("kvcli.cli.new_method", "Write a working method and its test, to begin your own from."),
    "testbed": ("kvcli.cli.testbed", "Train and measure the embedded testbed model."),
}
"""Command name -> (module, first line of its help), in the order of the help."""

TYPED: list[str] = []
"""The arguments of this process's command line, for run.json and for hints."""

_HELP = """Measure what KV cache compression does to language models.

Examples:
  kvcli sweep --model testbed --method shotkv --ratio 0.1
  kvcli sweep --method tier1 --ratio 0.1..0.9:0.2 --out runs/first
  kvcli report runs/first
"""

_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
"""Base of typer's usage errors: of the Click that this typer carries, or of the click package in older ones."""

_GONE = (errno.ENOENT, errno.ESTALE, errno.ENODEV, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Commands(TyperGroup):
    """Lists commands from the table; imports a command's module when it is the one that was typed."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = {name: TyperCommand(name, help=summary) for name, (_, summary) in COMMANDS.items()}

    def get_help_option(self, ctx: Any) -> Any:
        """--help with the default False: for its own None typer would load pydantic, a third of a help's time."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False
        return option

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0] in COMMANDS:
            return args[0], _load(args[0]), args[1:]
        if args[0].startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        problem = unknown("command", args[0], COMMANDS, given=_typed(args), listing="kvcli --help")
        problem.fix = f"kvcli {problem.fix.removeprefix('kvcli ')}"
        raise problem


def _load(name: str) -> Any:
    from importlib import import_module

    from typer.main import get_command

    module = import_module(COMMANDS[name][0])
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name)(module.command)
    command = get_command(app)
    command.name = name
    for one in (command, *getattr(command, "commands", {}).values()):
        one.help = _reflowed(one.help or "")
        _plain_options(one)
    return command


def _plain_options(command: Any) -> None:
    """In help, a switch shows no type, and a default said in words stands there without parentheses around it."""
    for option in command.params:
        if getattr(option, "is_flag", False):
            option.metavar = ""
        if isinstance(option.show_default, str):
            option.help = f"{option.help or ''} \\[default: {option.show_default}]".strip()  # brackets are markup
            option.show_default = False
    made = command.get_help_option

    def help_option(ctx: Any) -> Any:
        option = made(ctx)
        if option is not None:
            option.metavar = ""
        return option

    command.get_help_option = help_option


def _reflowed(text: str) -> str:
    """Paragraphs as one line each, so that help wraps at the terminal's width; those marked \\b keep their lines."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(map(_paragraph, paragraphs))


def _paragraph(text: str) -> str:
    plain = text.removeprefix("\b\n")
    if plain.startswith("Examples:"):
        room = shutil.get_terminal_size().columns - 2
        return "\b\n" + "\n".join(piece for line in plain.split("\n") for piece in _broken(line, room))
    return text if plain != text else text.replace("\n", " ")


def _broken(line: str, room: int) -> Iterator[str]:
    """A command too long for its line goes on in the next, before an option, behind a backslash: it can be copied."""
    if len(line) <= room:
        yield line
        return
    words = re.findall(r"""(?:"[^"]*"|'[^']*'|\S)+""", line)
    line = "  " + words[0]
    for i, word in enumerate(words[1:], 1):
        ahead = [word, *words[i + 1 : i + 2]] if word.startswith("-") else [word]  # an option and its value
        if len(" ".join([line, *ahead])) > room - 2 and line.strip():
            yield f"{line} \\"
            line = "      " + word
        else:
            line = f"{line} {word}"
    yield line


def _version(asked: bool) -> None:
    if asked:
        from kvcli.cli import output

        output.result(f"kvcli {__version__}")
        raise typer.Exit


def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        context.get_help()


def _build(args: Sequence[str]) -> Any:
    """The top command. Without options for completion behind a command's name: to read them, typer loads pydantic."""
    from typer.main import get_command

    app = typer.Typer(
        name="kvcli",
        cls=_Commands,
        help=_reflowed(_HELP),
        add_completion=not args or args[0].startswith("-"),
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback(invoke_without_command=True)(_top)
    command = get_command(app)
    _plain_options(command)
    return command


def _invoke(args: list[str]) -> int:
    command = _build(args)
    if "_KVCLI_COMPLETE" in os.environ:
        command(prog_name="kvcli")  # prints completions and exits
    try:
        with command.make_context("kvcli", list(args)) as context:
            command.invoke(context)
    except typer.Exit as e:
        return int(e.exit_code)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _ClickException as e:
        problem = _usage(e, args)
        if problem.what:
            raise problem from e
        # else a group typed without a command, and its help is already printed
    return Exit.DONE


def _typed(args: Sequence[str]) -> str:
    import shlex

    return shlex.join(["kvcli", *args])


def _usage(e: Any, args: Sequence[str]) -> KvcliError:
    """A usage error of typer in kvcli's own words."""
    text = getattr(e, "message", "") if getattr(e, "possibilities", None) else e.format_message()
    what = (text[:1].lower() + text[1:]).strip().rstrip(".").removeprefix("got ")
    context: typer.Context | None = getattr(e, "ctx", None)
    named = f"kvcli {args[0]}" if args and args[0] in COMMANDS else "kvcli"
    listing = f"{context.command_path if context else named} --help"
    close = sorted(getattr(e, "possibilities", None) or [])
    fix = f"{' or '.join(close)}     ({listing} shows all)" if close else listing
    newest = _newest_run() if what == "missing argument 'RUN'" else None
    if newest is not None:
        fix = f"{named} {newest}     (the newest; kvcli list runs shows all)"
    return KvcliError(what, given=_typed(args), fix=fix)


def _newest_run(root: Path = Path("runs")) -> Path | None:
    """The result folder that was written last."""
    from kvcli.results import store

    found = [path for path in root.iterdir() if store.is_run(path)] if root.is_dir() else []
    return max(found, key=lambda path: (max(p.stat().st_mtime for p in path.iterdir()), path.name), default=None)


def _environment(e: OSError) -> KvcliError | None:
    """The clear message for a full disk or a missing folder; None for anything else."""
    where = str(e.filename) if e.filename else ""
    if e.errno in _FULL:
        fix = "free some space, then type the same command again"
        return KvcliError("the disk is full", given=where, fix=fix, code=Exit.ENVIRONMENT)
    if e.errno in _GONE:
        fix = "check that path, then type the same command again     (KVCLI_DEBUG=1 shows where it was needed)"
        return KvcliError(e.strerror or "a file is missing", given=where, fix=fix, code=Exit.ENVIRONMENT)
    return None


def _reader_left(e: BaseException) -> bool:
    """True when stdout's reader went away (`kvcli list | head`); rich turns that into SystemExit(1)."""
    return isinstance(e, BrokenPipeError) or isinstance(e.__context__, BrokenPipeError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code. Bugs leave it as exceptions with their traceback."""
    from kvcli.cli import output

    args = list(sys.argv[1:] if argv is None else argv)
    TYPED[:] = args
    output.set_up()
    try:
        code = _invoke(args)
        output.flush()
        return code
    except KvcliError as e:
        return _fail(e)
    except KeyboardInterrupt as e:
        _debug(e)
        output.note("interrupted")
        return Exit.INTERRUPTED
    except (OSError, SystemExit) as e:
        if _reader_left(e):
            output.drop_stdout()
            return Exit.DONE
        known = _environment(e) if isinstance(e, OSError) else None
        if known is None:
            raise
        known.__cause__ = e
        return _fail(known)


def _fail(error: KvcliError) -> int:
    from kvcli.cli import output

    _debug(error)
    output.error(error)
    return error.code


def _debug(error: BaseException) -> None:
    if os.environ.get("KVCLI_DEBUG", "") not in ("", "0"):
        from traceback import format_exception

        from kvcli.cli import output

        output.note("".join(format_exception(error)).rstrip())
