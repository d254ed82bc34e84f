"""One GPU: tokens/s, MFU by the exact ledger, memory against its prediction, and several small runs at once.

    python benchmarks/gpu.py [--sections main,check,text,sizes,jobs,graphs] [--seconds 480] [--out FILE.json] [--add]
                             [--peer nanogpt=FOLDER] [--peer nanochat=FOLDER] [--peer olmo-core=FOLDER] [--smoke]

main   early 932M; late 1B; 8 experts (top-1) at 932M active, beside the dense model at equal rows
check  small models on the GPU: their losses beside the CPU's, and waits for the device inside a step
text   early 932M on text alone, beside a plain Llama step and the `--peer` check-outs in the same shape, at equal rows
sizes  all six sizes of early and late fusion: tokens/s, MFU, memory; late over early at equal FLOPs (the paper's Fig 4)
jobs   1, 4 and 8 small runs sharing the card: tokens/s of all of them together
graphs small steps as one CUDA graph, and with eight times the rows: what graphs and stacked seeds could give at most

Rows are 1,024 slots, 45-45-10 captions, interleaved, text, bf16; a step takes as many as are predicted to fit, and
fewer where they do not. The floor of every step is its FLOPs over the GEMM rate measured here; `mfu` is against that,
`mfu_datasheet` against the printed peak. Every row also says how often its step waited for the device.

Experts and dense are compared at equal rows, one batch each: one optimizer step costs the same for any number of rows.
Where the dense model takes more rows, the experts' step is also measured at as many in micro-batches; that costs them
one forward pass more, which the exact balance loss needs.

Sections run in this order, in a process each: an error that leaves the device unusable, a crash or a model that takes
longer than MODEL_SECONDS costs that model, and a new process goes on behind it. What does not fit in `--seconds`, all
sections together, is listed as left out; a section may take two minutes more to end. The JSON is written after every
model, and `--add` adds to it. Exit status 3 where something failed, which is listed. In two calls of less than 10
minutes each, compilation included:

    python benchmarks/gpu.py --sections main,check,text --seconds 400
    python benchmarks/gpu.py --sections sizes,jobs,graphs --seconds 400 --add

`--smoke`: tiny models, to test this file on any machine; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from adapters import PEERS
from gpu_graphs import SMALL, graphs
from gpu_jobs import jobs
from gpu_models import (
    KINDS,
    TEXT,
    Peak,
    Row,
    Setting,
    check,
    first_that_runs,
    measure,
    micro_rows_that_fit,
    rows_that_fit,
    setting,
)
from gpu_plain import peer, plain
from gpu_results import (
    DENSE,
    EXPERTS,
    LATE,
    PAIRS,
    Section,
    find,
    graphs_line,
    load,
    nothing_yet,
    say,
    summary,
    waits_text,
    write,
)

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SECTIONS = ("main", "check", "text", "sizes", "jobs", "graphs")  # in this order
TEXT_ROWS = 32  # at most, where logits of all rows exist at once, as in the plain step
MODEL_SECONDS = 180.0  # that one model may take, compilation included
GRACE = 120.0  # seconds that a section may take to end after its time is up
LISTED = 3  # exit status of a section that ended, with failures in the JSON


def run_check(section: Section, s: Setting) -> None:
    os.environ.setdefault("ISOFUSION_KERNELS", "torch")  # on the CPU, for a dozen steps: to compile some takes longer
    for kind in KINDS:
        found = section.attempt(kind, partial(check, s, kind))
        if found is not None:
            section.content.setdefault("check", {})[kind] = found
            section.save()
            say(f"check, {kind}: largest difference of a loss {found['largest_difference']:.2e} nats")
            say(f"check, {kind}: {waits_text(found['waits'])}")


def largest(s: Setting, name: str, peak: Peak, most: int | None = None, **how: Any) -> Row:
    """One model at the largest number of rows that runs, `most` at most."""
    return first_that_runs(rows_that_fit(s, s.model(name), most), partial(measure, s, name, peak, **how))


def run_main(section: Section, s: Setting) -> None:
    """From what everything else is compared with to what is least missed."""
    peak = section.peak()
    dense = section.row(DENSE, partial(largest, s, DENSE, peak))
    section.row(LATE, partial(largest, s, LATE, peak))
    experts = section.row(EXPERTS, partial(largest, s, EXPERTS, peak))
    if dense is None or experts is None or experts["rows"] >= dense["rows"]:
        return
    few, many = experts["rows"], dense["rows"]
    section.row(f"{DENSE}, {few} rows", partial(measure, s, DENSE, peak, few))

    def in_micro_batches() -> Row:
        fitting = micro_rows_that_fit(s, s.model(EXPERTS), many, few)
        return first_that_runs(fitting, partial(measure, s, EXPERTS, peak, many))

    section.row(f"{EXPERTS}, {many} rows in micro-batches", in_micro_batches)


def run_text(section: Section, s: Setting, peak: Peak, most: int, peers: Mapping[str, Path]) -> None:
    """The dense model on text alone, and everybody it is compared with, at equal numbers of rows."""
    own = section.row(f"{DENSE}, text", partial(largest, s, DENSE, peak, most, mixture=TEXT))
    allowed = [rows for rows in s.rows if rows <= (own["rows"] if own else most)]
    work = {name: partial(peer, s, name, folder, DENSE, peak) for name, folder in peers.items()}
    if not s.smoke:  # a compiler is not always there
        work["plain Llama compiled"] = partial(plain, s, DENSE, peak, True)
    work["plain Llama eager"] = partial(plain, s, DENSE, peak, False)
    measured = {own["rows"]} if own else set()
    for name, one in work.items():
        row = section.row(name, partial(first_that_runs, allowed, one))
        if row is not None and row["rows"] not in measured:
            rows = row["rows"]
            section.row(f"{DENSE}, text, {rows} rows", partial(measure, s, DENSE, peak, rows, mixture=TEXT))
            measured.add(rows)


def run_jobs(section: Section, s: Setting) -> None:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # each of them compiles
    rows: list[Row] = section.content.setdefault("jobs", [])
    for count in (1, 2) if s.smoke else (1, 4, 8):
        found = section.attempt(f"{count} at once", partial(jobs, s, count))
        if found is not None:
            one = rows[0]["tokens_per_s"] if rows else found["tokens_per_s"] if count == 1 else None
            rows.append({**found, "of_one": found["tokens_per_s"] / one if one else None})
            section.save()
            beside = f", {found['tokens_per_s'] / one:.2f} of one run" if one else ""
            say(f"{count} runs at once: {found['tokens_per_s']:,.0f} tokens/s{beside}")


def run_sizes(section: Section, s: Setting) -> None:
    """From the smallest pair up; a model that the file holds already is not measured again."""
    peak = section.peak()
    for name in (name for pair in PAIRS for name in pair):
        if find(section.content["rows"], name) is None:
            section.row(name, partial(largest, s, name, peak))


def run_graphs(section: Section, s: Setting) -> None:
    for arm, size in SMALL[:1] if s.smoke else SMALL:
        found = section.attempt(f"{arm} {size}", partial(graphs, s, arm, size))
        if found is not None:
            section.content.setdefault("graphs", []).append(found)
            section.save()
            say(graphs_line(found))


def run_section(args: argparse.Namespace, s: Setting, name: str) -> None:
    limit = None if name == "jobs" else MODEL_SECONDS  # its runs have a limit of their own, and must end before it
    section = Section(name, args.out, s, args.seconds, args.again, limit)
    if name == "main":
        run_main(section, s)
    elif name == "check":
        run_check(section, s)
    elif name == "text":
        dense = find(section.content["rows"], DENSE)
        run_text(section, s, section.peak(), min(TEXT_ROWS, dense["rows"] if dense else TEXT_ROWS), args.peer)
    elif name == "sizes":
        run_sizes(section, s)
    elif name == "jobs":
        run_jobs(section, s)
    else:
        run_graphs(section, s)
    section.save()


# ---- a process for each section -------------------------------------------------------------------------------------


def section_command(args: argparse.Namespace, name: str, seconds: float) -> list[str]:
    command = [sys.executable, __file__, "--sections", name, "--seconds", f"{seconds:.1f}", "--out", str(args.out)]
    for peer_name, folder in args.peer.items():
        command += ["--peer", f"{peer_name}={folder}"]
    return [*command, "--part", *(["--smoke"] if args.smoke else [])]


def run_apart(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Each section in a process of its own, within the time that the others left.

    One that dies is listed as failed: the model it was at, and a new process goes on behind that; or the whole section.
    """
    began, todo, again = time.monotonic(), list(names), False
    while todo:
        name, left = todo[0], args.seconds - (time.monotonic() - began)
        command = section_command(args, name, left) + ["--again"] * again
        failure = run_process(command, left) if left > 0 else None
        content = load(args.out)
        at = content.pop("running", None)
        if left <= 0 and name not in content["left_out"]:
            content["left_out"].append(name)
        if failure is not None:
            content["failed"].setdefault(at or name, failure)
            say(f"{at or name}: {failure.splitlines()[0]}")
        write(args.out, content)
        again = failure is not None and at is not None
        if not again:
            del todo[0]


def run_process(command: Sequence[str], seconds: float) -> str | None:
    """None, or how the process failed and the tail of its stderr. Ended GRACE seconds after its time is up."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stderr=errors)
        late = False
        try:
            process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            status = stop(process)
        if status in (0, LISTED) and not late:
            return None
        errors.seek(0)
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        how = f"did not end within {seconds + GRACE:.0f} seconds" if late else how
        return f"{how}\n{errors.read()[-2000:].strip()}".strip()


def stop(process: subprocess.Popen[bytes]) -> int:
    """Its exit status; it is asked to end, and ended, where it runs."""
    process.terminate()
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def peer_argument(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if name not in PEERS or not folder or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=FOLDER, a check-out of one of {', '.join(PEERS)}")
    return name, Path(folder).resolve()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=480.0, help="no new model is begun after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--add", action="store_true", help="keep what other sections wrote into the file")
    parser.add_argument("--peer", type=peer_argument, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # adds, and leaves the end to its parent
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)  # after a process that died
    args = parser.parse_args(argv)
    args.peer = dict(args.peer)
    wanted = args.sections.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")
    s = setting(args.smoke)
    names = [name for name in SECTIONS if name in wanted]
    write(args.out, load(args.out) if args.add or args.part else nothing_yet())
    if args.part:
        run_section(args, s, names[0])
    else:
        run_apart(args, names)
    content = load(args.out)
    if not args.part:
        summary(content)
        say(args.out)
    return LISTED if content["failed"] else 0


if __name__ == "__main__":
    logging.disable(logging.INFO)  # the peers report their models on the root logger
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it started end with it
    sys.exit(main())
