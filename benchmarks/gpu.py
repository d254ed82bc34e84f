"""One GPU: tokens/s, MFU by the exact ledger, memory against its prediction, and several small runs at once.

    python benchmarks/gpu.py [--sections check,main,jobs,sizes] [--seconds 480] [--out FILE.json] [--add] [--smoke]
                             [--peer nanogpt=FOLDER] [--peer nanochat=FOLDER] [--peer olmo-core=FOLDER]

check  small models on the GPU: their losses beside the CPU's, and waits for the device inside a step
main   early 932M; on text alone, beside a plain Llama step and the `--peer` check-outs in the same shape, at equal
       rows; late 1B; 8 experts (top-1) at 932M active, beside the dense model at equal rows
jobs   1, 4 and 8 small runs sharing the card: tokens/s of all of them together
sizes  all six sizes of early and late fusion: tokens/s, MFU, memory; late over early at equal FLOPs (the paper's Fig 4)

Rows are 1,024 slots, 45-45-10 captions, interleaved, text, bf16; a step takes as many as are predicted to fit, and
fewer where they do not. The floor of every step is its FLOPs over the GEMM rate measured here; `mfu` is against that,
`mfu_datasheet` against the printed peak. Every row also says how often its step waited for the device.

Experts and dense are compared at equal rows, one batch each: one optimizer step costs the same for any number of rows.
Where the dense model takes more rows, the experts' step is also measured at as many in micro-batches; that costs them
one forward pass more, which the exact balance loss needs.

Several sections run in a process each, one after another, so that an error that leaves the device unusable, or a crash,
costs only its own. What does not fit in `--seconds`, all sections together, is listed as left out; a section may take
two minutes more to end. The JSON is written after every model, and `--add` adds to it. Exit status 3 where something
failed, which is listed. In two calls of less than 10 minutes each, compilation included:

    python benchmarks/gpu.py --sections check,main --seconds 400
    python benchmarks/gpu.py --sections jobs,sizes --seconds 400 --add

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
from gpu_results import DENSE, EXPERTS, LATE, PAIRS, Section, find, load, nothing_yet, say, summary, waits_text, write

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SECTIONS = ("check", "main", "jobs", "sizes")  # in this order
TEXT_ROWS = 32  # at most, where logits of all rows exist at once, as in the plain step
GRACE = 120.0  # seconds that a section may take to end after its time is up
LISTED = 3  # exit status of a section that ended, with failures in the JSON


def run_check(section: Section, s: Setting) -> None:
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


def run_main(section: Section, s: Setting, peers: Mapping[str, Path]) -> None:
    """From what everything else is compared with to what is likeliest to fail."""
    peak = section.peak()
    dense = section.row(DENSE, partial(largest, s, DENSE, peak))
    run_text(section, s, peak, min(TEXT_ROWS, dense["rows"] if dense else TEXT_ROWS), peers)
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
    work = {f"plain Llama {'compiled' if c else 'eager'}": partial(plain, s, DENSE, peak, c) for c in (True, False)}
    if s.smoke:  # a compiler is not always there
        del work["plain Llama compiled"]
    work |= {name: partial(peer, s, name, folder, DENSE, peak) for name, folder in peers.items()}
    others = [section.row(name, partial(first_that_runs, allowed, one)) for name, one in work.items()]
    taken = {row["rows"] for row in others if row is not None} - {own["rows"] if own else 0}
    for rows in sorted(taken, reverse=True):
        section.row(f"{DENSE}, text, {rows} rows", partial(measure, s, DENSE, peak, rows, mixture=TEXT))


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


def run_section(args: argparse.Namespace, s: Setting, name: str) -> None:
    section = Section(name, args.out, s, args.seconds)
    if name == "check":
        run_check(section, s)
    elif name == "main":
        run_main(section, s, args.peer)
    elif name == "jobs":
        run_jobs(section, s)
    else:
        run_sizes(section, s)
    section.save()


# ---- a process for each section -------------------------------------------------------------------------------------


def section_command(args: argparse.Namespace, name: str, seconds: float) -> list[str]:
    command = [sys.executable, __file__, "--sections", name, "--seconds", f"{seconds:.1f}", "--out", str(args.out)]
    for peer_name, folder in args.peer.items():
        command += ["--peer", f"{peer_name}={folder}"]
    return [*command, "--part", *(["--smoke"] if args.smoke else [])]


def run_apart(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Each section in a process of its own, within the time that the others left; one that dies is listed as failed."""
    began = time.monotonic()
    for name in names:
        left = args.seconds - (time.monotonic() - began)
        failure = run_process(section_command(args, name, left), left) if left > 0 else None
        content = load(args.out)
        if left <= 0 and name not in content["left_out"]:
            content["left_out"].append(name)
        if failure is not None:
            content["failed"][name] = failure
            say(f"{name}: {failure.splitlines()[0]}")
        write(args.out, content)


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
    args = parser.parse_args(argv)
    args.peer = dict(args.peer)
    wanted = args.sections.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")
    s = setting(args.smoke)
    names = [name for name in SECTIONS if name in wanted]
    write(args.out, load(args.out) if args.add or args.part else nothing_yet())
    if len(names) == 1:
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
