"""`isofusion data show world` and `isofusion data inspect SOURCE`: see what a model would see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
show_app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(show_app, name="show", help="Draw data for people.")

LINE = 96  # characters of a drawn row


@app.callback()
def data() -> None:
    """Look at data: samples, counts, packed rows."""


@show_app.callback()
def show() -> None:
    """Draw data for people."""


@show_app.command("world")
def show_world(
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write.")] = Path("world.png"),
    n: Annotated[int, typer.Option("--n", min=1, max=400, help="Captioned images to draw.")] = 12,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which documents.")] = 0,
    world_seed: Annotated[int, typer.Option("--world-seed", min=0, help="Which world.")] = 0,
    image_size: Annotated[int, typer.Option("--image-size", min=1, help="Side of an image in pixels.")] = 48,
    patch_size: Annotated[int, typer.Option("--patch-size", min=1, help="Side of a patch in pixels.")] = 8,
) -> None:
    """Write a contact sheet of the built-in world: images with captions, interleaved documents, texts."""
    from isofusion.config import WorldConfig
    from isofusion.data.world import World
    from isofusion.data.world.show import contact_sheet
    from isofusion.errors import InputError

    sheet = contact_sheet(World(WorldConfig(seed=world_seed), image_size, patch_size), n, seed)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out, format="PNG")
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    typer.echo(f"{out}  ({sheet.width} x {sheet.height} px)")


@app.command("inspect")
def inspect_command(
    source: Annotated[str, typer.Argument(help="'world', a folder, a file, or a glob in quotes.")],
    format: Annotated[
        str | None, typer.Option("--format", help="webdataset, interleaved or text; else detected.")
    ] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="caption, interleaved or text.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="tokenizer.json, or train:VOCAB; default train:4096.")
    ] = None,
    row_len: Annotated[int, typer.Option("--row-len", min=8, help="Slots of a packed row.")] = 512,
    image_size: Annotated[int, typer.Option("--image-size", min=1, help="Images are resized to this square.")] = 48,
    patch_size: Annotated[int, typer.Option("--patch-size", min=1, help="Side of a patch in pixels.")] = 8,
    rows: Annotated[int, typer.Option("--rows", min=0, max=64, help="Packed rows to draw.")] = 4,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Samples to print.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Count a source and show it: samples, tokens, image sizes, what is bad, the layout of packed rows."""
    from isofusion.data.inspect import inspect
    from isofusion.errors import InputError

    found = inspect(
        source, format=format, domain=domain, tokenizer=tokenizer, row_len=row_len, image_size=image_size,
        patch_size=patch_size, rows=rows, samples=samples,
    )  # fmt: skip
    wrong = [entry for entry in found if "error" in entry]
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False, ensure_ascii=False))
    else:
        for entry in found:
            if "error" not in entry:
                _print(entry)
    if wrong:
        names = ", ".join(entry["name"] for entry in wrong)
        messages = "\n".join(entry["error"] for entry in wrong)
        raise InputError(f"{len(wrong)} of {len(found)} sets of files cannot be read ({names}):\n{messages}")


def _print(entry: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=escape(entry["name"]), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in _facts(entry):
        table.add_row(name, escape(value))
    console.print(table)
    for line in entry["bad_examples"]:
        console.print(f"  [red]bad[/red] {escape(line)}")
    for sample in entry["samples"]:
        console.print(f"  [bold]{escape(sample['key'])}[/bold] {escape(sample['text'])}")
    if entry["rows"]:
        console.print("  rows: [cyan]text =[/cyan]  [magenta]image #[/magenta]  padding .  a document starts at \\[")
    for row in entry["rows"]:
        console.print("  ", _bar(row, min(LINE, console.width - 2)), sep="", no_wrap=True)
    console.print()


def _facts(entry: dict[str, Any]) -> list[tuple[str, str]]:
    from isofusion.study.progress import size

    facts = [("format", f"{entry['format']}, domain {entry['domain']}")]
    text, images, packing = entry["text"], entry["images"], entry["packing"]
    if entry["documents"] is not None:
        facts.append(("files", f"{len(entry['files'])}, {size(entry['bytes'])}"))
        facts.append(("documents", f"{entry['documents']:,}"))
        bad = ", ".join(f"{reason} {count}" for reason, count in entry["bad"].items())
        facts.append(("bad", f"{bad} ({entry['bad_share']:.2%})" if bad else "none"))
        if images:
            sides = " x ".join(f"{images[s]['min']}-{images[s]['max']}" for s in ("width", "height"))
            facts.append(("images", f"{images['count']:,} ({images['unique']:,} different), {sides} px"))
        spread = text["slots_per_document"]
        facts.append(("text", f"{size(text['bytes'])}, {text['tokens']:,} tokens"))
        facts.append(("slots a document", f"{spread['min']} to {spread['max']}, median {spread['median']}"))
    else:
        facts.append(("documents", f"endless, {text['documents_per_row']:.1f} a row"))
        facts.append(("images", f"{images['per_row']:.1f} a row, {text['image_share']:.0%} of the tokens"))
        facts.append(("oracle", f"{text['oracle_nats_per_target']:.3f} nats a target"))
        facts.append(("entities named", f"{text['exposures_per_row']:.1f} a row"))
    facts.append(("tokenizer", f"{entry['tokenizer']['name']}, {entry['tokenizer']['vocab_size']:,} tokens"))
    rows = f"{packing['rows_per_epoch']:,} rows an epoch of" if packing["rows_per_epoch"] else "rows of"
    cut = f", {packing['cut_documents']:,} documents cut" if packing["cut_documents"] else ""
    shape = f"images {packing['image_size']} px = {packing['patches_per_image']} patches"
    facts.append(("packed", f"{rows} {packing['row_len']} slots, {packing['filled']:.1%} filled{cut}; {shape}"))
    return facts


def _bar(row: list[list[Any]], line: int) -> Any:
    """A packed row drawn to `line` characters; legible without colour."""
    from rich.text import Text

    total = sum(slots for _, _, slots in row)
    style = {"text": ("=", "cyan"), "image": ("#", "magenta"), "pad": (".", "dim")}
    bar, at, previous = Text(), 0, -1
    for kind, document, slots in row:
        width = round((at + slots) * line / total) - round(at * line / total)
        at += slots
        char, colour = style[kind]
        if width and kind != "pad" and document != previous:
            bar.append("[", style=f"bold {colour}")
            width, previous = width - 1, document
        bar.append(char * width, style=colour)
    return bar
