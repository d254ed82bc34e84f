"""`isofusion count`: parameters by role, FLOPs and memory of the paper's models or of any other."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from isofusion.cli.plan import quantity
from isofusion.config import ModelConfig
from isofusion.errors import InputError

OWN = (
    *("depth", "head_dim", "vocab", "patch", "ffn_multiple"),
    *("encoder_width", "encoder_head_dim", "experts", "top_k", "routing"),
)
"""Options that only a model of one's own takes, with --width."""


def command(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Models of the paper, e.g. early-275m late-1b.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All models of the paper (the default without a name).")] = False,
    width: Annotated[int | None, typer.Option(help="A model of your own: its width.")] = None,
    depth: Annotated[int, typer.Option(help="Blocks (both towers of late fusion).")] = 24,
    head_dim: Annotated[int, typer.Option(help="Features per head.")] = 64,
    vocab: Annotated[int, typer.Option(help="Vocabulary size.")] = 50432,
    patch: Annotated[int, typer.Option(help="Patch side in pixels.")] = 14,
    ffn_multiple: Annotated[int, typer.Option(help="The feed-forward hidden size is a multiple of this.")] = 256,
    encoder_width: Annotated[int | None, typer.Option(help="Makes it late fusion: width of its image encoder.")] = None,
    encoder_head_dim: Annotated[int | None, typer.Option(help="Features per head of the encoder.")] = None,
    experts: Annotated[int, typer.Option(help="Experts per block; 0 is a dense model.")] = 0,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 1,
    routing: Annotated[str, typer.Option(help="agnostic or modality-routed.")] = "agnostic",
    tokens: Annotated[
        float, typer.Option(parser=quantity, metavar="<number>", help="Token budget D, text and patches: 1e11, 100B.")
    ] = 1e9,
    image_share: Annotated[float, typer.Option(help="Share of D that is patches.")] = 0.544,
    context: Annotated[int, typer.Option(help="Slots per row; documents are taken to fill it.")] = 1024,
    patches: Annotated[int, typer.Option(help="Patches per image.")] = 256,
    slots: Annotated[int, typer.Option(help="Slots per device and step, for the memory estimate.")] = 8192,
    precision: Annotated[str, typer.Option(help="fp32 or bf16, for the memory estimate.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda, for the memory estimate.")] = "cuda",
    recompute: Annotated[int, typer.Option(help="Blocks whose activations are computed twice, to save memory.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Count real modules on torch's meta device too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Parameters by role, FLOPs per token and per budget, memory; the paper's own sizes beside them."""
    from isofusion.model.paper import PAPER_MODELS

    if tokens <= 0:
        raise InputError(f"--tokens {tokens:g} must be positive")
    if not 0 <= image_share <= 1:
        raise InputError(f"--image-share {image_share:g} must lie between 0 and 1")
    if min(context, slots, patches) <= 0:
        raise InputError(f"--context {context}, --slots {slots} and --patches {patches} must be positive")
    if precision not in ("fp32", "bf16"):
        raise InputError(f"--precision {precision} is unknown; choose fp32 or bf16")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device} is unknown; choose cpu or cuda")
    lost = [f"--{option.replace('_', '-')}" for option in OWN if _given(ctx, option)]
    if width is None and lost:
        raise InputError(f"{', '.join(lost)}: only a model of your own takes that; give its --width")
    chosen: dict[str, ModelConfig] = {}
    for name in names or ([] if width else PAPER_MODELS):
        if name not in PAPER_MODELS:
            raise InputError(f'no model "{name}"; choose from {", ".join(PAPER_MODELS)}, or give --width')
        chosen[name] = PAPER_MODELS[name]
    if every:
        chosen = dict(PAPER_MODELS) | chosen
    if width is not None:
        settings: dict[str, Any] = {
            "fusion": "late" if encoder_width else "early",
            "width": width,
            "depth": depth,
            "head_dim": head_dim,
            "vocab_size": vocab,
            "patch_size": patch,
            "ffn_multiple": ffn_multiple,
            "encoder_width": encoder_width,
            "encoder_head_dim": encoder_head_dim,
            "n_experts": experts,
            "top_k": top_k,
            "routing": routing,
        }
        try:
            chosen["custom"] = ModelConfig(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(
                f"model {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
            ) from error
    step = {"slots": slots, "precision": precision, "device": device, "recompute": recompute}
    rows = [describe(n, c, tokens, image_share, context, patches, step, check) for n, c in chosen.items()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        _table(rows, tokens, image_share)


def _given(ctx: typer.Context, option: str) -> bool:
    source = ctx.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def describe(
    name: str,
    cfg: ModelConfig,
    tokens: float,
    image_share: float,
    context: int,
    patches: int,
    step: dict[str, Any],
    check: bool,
) -> dict[str, Any]:
    """One model as a JSON-able row. Deviations are in percent; FLOPs are of training; `step`: see `memory_bytes`."""
    from dataclasses import asdict

    from isofusion.model.count import BatchShape, count_parameters, flops, modules_on_meta, six_nd
    from isofusion.model.memory import memory_bytes
    from isofusion.model.paper import PAPER_SIZES

    n = count_parameters(cfg)
    image_tokens = round(tokens * image_share)
    text = round(tokens) - image_tokens
    slots = step["slots"]
    images = round(slots * image_share) // patches * patches
    held = BatchShape(slots - images, images, images // patches, slots - images, slots * (context + 1) // 2)
    pairs = round(tokens * (context + 1) / 2 + image_tokens * (patches - 1) / 2)
    shape = BatchShape(text, image_tokens, image_tokens // patches, text, pairs)
    exact = flops(cfg, shape)
    approximate = six_nd(cfg, tokens, image_share)
    row: dict[str, Any] = {
        "name": name,
        **asdict(n),
        "flops_per_token": exact["total"] / tokens,
        "flops": exact["total"],
        "flops_by_role": exact,
        "flops_6nd_per_token": approximate / tokens,
        "flops_6nd": approximate,
        "memory_bytes": memory_bytes(cfg, **step, shape=held),
        "config": cfg.model_dump(mode="json"),
    }
    if name in PAPER_SIZES:
        paper = PAPER_SIZES[name]
        row["paper"] = {
            "formula": paper.formula_total,
            "formula_deviation": 100 * (n.n_active / paper.formula_total - 1),
            "label": paper.label,
            "label_deviation": 100 * (n.n_active / paper.label - 1),
            "lr": paper.lr,
        }
    if check:
        module = modules_on_meta(cfg)
        row["modules_agree"] = module == n
        if module != n:
            from isofusion.errors import RunFailure

            raise RunFailure(f"{name}: closed form {dict(n.by_role)} differs from the modules {dict(module.by_role)}")
    return row


def _table(rows: list[dict[str, Any]], tokens: float, image_share: float) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from isofusion.study import progress

    def size(value: float) -> str:
        return (
            f"{value / 1e9:.3f}B" if value >= 1e9 else f"{value / 1e6:.1f}M" if value >= 1e6 else f"{value / 1e3:.1f}K"
        )

    console = Console()
    if not console.is_terminal:  # in a pipe nothing is cut to 80 columns
        console = Console(width=160)
    counts = ("n_encoder", "n_decoder", "n_total", "n_active", "n_nonembedding")
    table = Table("model", title="Parameters", title_justify="left", box=SIMPLE_HEAD)
    for head in ("encoder", "decoder", "total", "active", "non-emb."):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["name"], *(size(row[key]) if row[key] else "–" for key in counts))
    console.print(table)
    compared = [row for row in rows if "paper" in row]
    if compared:
        table = Table("model", title="Active parameters against the paper", title_justify="left", box=SIMPLE_HEAD)
        for head in ("active", "formula", "deviation", "label", "deviation"):
            table.add_column(head, justify="right", no_wrap=True)
        for row in compared:
            paper = row["paper"]
            formula, label = f"{paper['formula_deviation']:+.2f} %", f"{paper['label_deviation']:+.2f} %"
            table.add_row(
                row["name"], size(row["n_active"]), size(paper["formula"]), formula, size(paper["label"]), label
            )
        console.print(table)
    title = f"Training cost for D = {tokens:.3g} tokens, {image_share:.1%} of them patches"
    table = Table("model", title=title, title_justify="left", box=SIMPLE_HEAD)
    for head in ("FLOPs/token", "FLOPs", "6ND FLOPs", "memory"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        memory = progress.size(row["memory_bytes"]["total"])
        cells = (f"{row[key]:.3g}" for key in ("flops_per_token", "flops", "flops_6nd"))
        table.add_row(row["name"], *cells, memory)
    console.print(table)
    for row in rows if len(rows) <= 3 else []:
        console.print(f"{row['name']}: " + ", ".join(f"{role} {size(n)}" for role, n in row["by_role"].items()))
    if any(row.get("modules_agree") for row in rows):
        console.print("Real modules on the meta device agree with these counts.")
