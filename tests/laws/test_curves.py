"""Training curves to final losses: histories, W&B charts, TensorBoard event files (one of them TensorBoard's own)."""

from __future__ import annotations

import base64
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isofusion.errors import InputError
from isofusion.laws.tables.curves import Final, Tails
from isofusion.laws.tables.events import masked_crc, read_folder
from isofusion.laws.tables.readers import read_runs

# Written by tensorboard 2.21.0: hparams {n_params: 1e8, opt: adam}; val/loss 3.25 at step 1000 as simple_value (what
# torch's SummaryWriter writes) and 3.0 at step 2000 as a tensor (what TensorFlow 2 writes); tokens 2e9 as a tensor.
TENSORBOARD = base64.b64decode(
    "SAAAAAAAAAD+kkidCU8wujw/wdpBGg1icmFpbi5FdmVudDoyUi4KLHRlbnNvcmJvYXJkLnN1bW1hcnkud3JpdGVyLmV2ZW50X2ZpbGVfd3JpdGVy"
    "zfb4fbgAAAAAAAAAoNG1OgkAAAAAAADwPyqsAQqpAQocX2hwYXJhbXNfL3Nlc3Npb25fc3RhcnRfaW5mb0IGCAESAhIASoABCn4KB2hwYXJhbXMS"
    "cxpxChUKCG5fcGFyYW1zEgkRAAAAAITXl0EKDQoDb3B0EgYaBGFkYW0iQDIyODVhZWVmNWZjNjQzZDZlNzg3ZjVlMDczNDNmYTE2NTEyMzEzZWE3"
    "ZWIzNTgxZDAyOGZhMzY3MTExZDVlODIpD1K6PD/B2kGWRCMPHwAAAAAAAABRS0QYCQAAAAAAAPA/EOgHKhEKDwoIdmFsL2xvc3MVAABQQNTpTl0m"
    "AAAAAAAAAHNP4wAJAAAAAAAA8D8Q0A8qGAoWCgh2YWwvbG9zc0IKCAESACoEAABAQMtaB3IkAAAAAAAAAEIrgE0JAAAAAAAA8D8Q0A8qFgoUCgZ0"
    "b2tlbnNCCggBEgAqBChr7k6/30oU"
)


def events(path: Path, *scalars: tuple[int, str, float]) -> Path:
    """An event file with one simple_value per event, written the way TensorBoard does."""

    def message(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    out = b""
    for step, tag, value in scalars:
        summary = message(1, message(1, tag.encode()) + b"\x15" + struct.pack("<f", value))
        varint = b""
        while step > 0x7F:
            varint, step = varint + bytes([step & 0x7F | 0x80]), step >> 7
        data = b"\x09" + struct.pack("<d", 1.0) + b"\x10" + varint + bytes([step]) + message(5, summary)
        head = struct.pack("<Q", len(data))
        out += head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out)
    return path


def test_final_value_of_a_curve() -> None:
    curve = 3 + 2 / np.arange(1.0, 401)
    assert Final.parse(None).value(curve) == curve[-1]
    assert Final.parse("mean:10").value(curve) == pytest.approx(curve[-10:].mean(), rel=1e-15)
    average = weight = 0.0
    for loss in curve:  # TensorBoard's own recursion, bias-corrected at the end
        average, weight = 0.9 * average + 0.1 * loss, 0.9 * weight + 0.1
    assert Final.parse("ema:0.9").value(curve) == pytest.approx(average / weight, rel=1e-6)
    assert Final.parse("mean:10").value(curve[:3]) == pytest.approx(curve[:3].mean())


@pytest.mark.parametrize("text", ["first", "mean", "mean:0", "mean:2.5", "ema:1", "ema:x", "last:3", "mean:nan", "ema"])
def test_other_ends_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="give last, mean:K"):
        Final.parse(text)


def history(*rows: dict[str, Any]) -> io.StringIO:
    return io.StringIO("".join(json.dumps(row) + "\n" for row in rows))


def test_history_with_a_loss_logged_now_and_then() -> None:
    """W&B's scan_history: the evaluation loss stands in few rows, and a counter of tokens in others."""
    rows = [
        {"run": run, "_step": step, "params": n, **({"eval/loss": 5 - step / 10 - n / 1e9} if step % 4 == 0 else {})}
        | ({"tokens": 1e6 * step} if step % 4 != 2 else {})
        for step in range(11)
        for run, n in (("a", 1e8), ("b", 2e8))
    ]
    runs, notes = read_runs(history(*rows))
    np.testing.assert_allclose(runs.loss, [4.1, 4.0])
    np.testing.assert_allclose(runs.n, [1e8, 2e8])
    np.testing.assert_allclose(runs.d, [8e6, 8e6])  # when the last loss was logged, not the newest of all
    assert any("2 runs is the last logged value (3 values logged)" in note for note in notes)
    runs, _ = read_runs(history(*rows), final="mean:2", tokens_per_step="2M")
    np.testing.assert_allclose(runs.loss, [4.3, 4.2])
    np.testing.assert_allclose(runs.d, [16e6, 16e6])  # the last step with a loss is 8


def test_a_table_with_steps_is_a_curve_only_when_asked() -> None:
    text = "run,step,n,d,loss\na,1,1e8,1e9,3.5\na,2,1e8,2e9,3.2\nb,1,2e8,1e9,3.3\nb,2,2e8,2e9,3.0\n"
    assert len(read_runs(io.StringIO(text))[0]) == 4
    runs, _ = read_runs(io.StringIO(text), final="last")
    assert (runs.loss.tolist(), runs.d.tolist()) == ([3.2, 3.0], [2e9, 2e9])
    with pytest.raises(InputError, match="no column for run"):
        read_runs(io.StringIO(text.replace("run,", "who,")), final="last")
    with pytest.raises(InputError, match="--tokens-per-step needs the column that counts steps"):
        read_runs(io.StringIO(text.replace("step,", "when,")), final="last", tokens_per_step=1000)


def test_resumed_runs_count_their_later_rows_and_unsorted_ones_are_refused() -> None:
    def rows(*steps: int) -> str:
        lines = [f"a,{step},1e8,1e9,{5 - i / 10}\n" for i, step in enumerate(steps)]
        return "run,_step,n,d,loss\n" + "".join(lines)

    runs, notes = read_runs(io.StringIO(rows(0, 1, 2, 3, 2, 3, 4)), final="mean:3")
    np.testing.assert_allclose(runs.loss, np.mean([4.6, 4.5, 4.4]))
    assert any("steps go back in a" in note for note in notes)
    with pytest.raises(InputError, match=r"run 'a': its rows end at step 1 after step 4; sort the table"):
        read_runs(io.StringIO(rows(4, 3, 2, 1)))


def test_a_diverged_or_silent_run_is_a_bad_row() -> None:
    text = "run,_step,n,d,loss\na,0,1e8,1e9,4\na,1,1e8,1e9,NaN\na,2,1e8,1e9,\nb,0,2e8,1e9,3\nc,0,2e8,1e9,\n"
    with pytest.raises(InputError) as error:
        read_runs(io.StringIO(text))
    assert "run 'a': the loss is not finite from step 1 on" in str(error.value)
    assert "run 'c': no loss was logged" in str(error.value)
    runs, notes = read_runs(io.StringIO(text), drop_bad=True)
    assert (len(runs), "dropped 2 of 3 rows" in notes[-1]) == (1, True)
    healed = text.replace("a,2,1e8,1e9,\n", "a,2,1e8,1e9,3.5\n").replace("c,0,2e8,1e9,\n", "")
    assert read_runs(io.StringIO(healed))[0].loss.tolist() == [3.5, 3.0]
    with pytest.raises(InputError, match=r"line 2: 'x' is not a number"):
        read_runs(io.StringIO(text.replace(",4\n", ",x\n")))


def test_memory_follows_the_runs_and_not_the_rows() -> None:
    tails = Tails("t", Final.parse("ema:0.5"), 2)
    for step in range(5000):
        tails.add("a", step, 3.0)
    assert len(tails.runs["a"].points) == Final.parse("ema:0.5").window == 20
    tails.add("b", 0, 3.0)
    with pytest.raises(InputError, match="more than 2 runs"):
        tails.add("c", 0, 3.0)


CHART = (
    '"Step","big - 2 - val/loss","big - 2 - val/loss__MIN","big - 2 - val/loss__MAX","small-1 - val/loss",'
    '"small-1 - val/loss__MIN","small-1 - val/loss__MAX"\n'
    '"0","5.5","5.5","5.5","6","6","6"\n"100","","","","4.5","4.4","4.6"\n"120","3.5","3.5","3.5","","",""\n'
)


def test_chart_exported_from_wandb_with_a_side_table(tmp_path: Path) -> None:
    meta = tmp_path / "meta.csv"
    meta.write_text("run,params,tokens,trunk\nsmall-1,70M,2B,s\nbig - 2,160M,3B,b\n")
    runs, notes = read_runs(io.StringIO(CHART), meta=meta)
    assert runs.loss.tolist() == [3.5, 4.5]
    assert runs.n.tolist() == [160e6, 70e6]
    assert runs.d.tolist() == [3e9, 2e9]
    assert runs.group.tolist() == ["b", "s"]
    assert any("the last logged value" in note for note in notes)
    runs, _ = read_runs(io.StringIO(CHART), meta={"run": ["big - 2", "small-1"], "n": [1e8, 2e8]}, tokens_per_step=1e6)
    assert runs.d.tolist() == [120e6, 100e6]
    tokens = CHART.replace('"Step"', '"train/tokens"')
    assert read_runs(io.StringIO(tokens), n_from_name=r"(\d)")[0].d.tolist() == [120, 100]
    with pytest.raises(InputError, match=r"run 'big - 2': no parameters known; give a column \(--n\), a side table"):
        read_runs(io.StringIO(CHART))
    with pytest.raises(InputError, match=r"no metric 'loss'.*Metrics: val/loss"):
        read_runs(io.StringIO(CHART), columns={"loss": "loss"})
    several = io.StringIO('"Step","a - acc","a - bpb"\n0,1,2\n')
    with pytest.raises(InputError, match=r"2 metrics .acc, bpb.; choose one with --loss"):
        read_runs(several)


def test_checksum_is_the_published_one() -> None:
    crc = 0xE3069283  # CRC-32C of "123456789", the check value of RFC 3720
    assert masked_crc(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_a_file_of_tensorboard_itself(tmp_path: Path) -> None:
    run = tmp_path / "run-a"
    run.mkdir()
    (run / "events.out.tfevents.1.host.1.0").write_bytes(TENSORBOARD)
    ((name, scalars),) = read_folder(tmp_path)
    assert (name, scalars.hparams) == ("run-a", {"n_params": 1e8, "opt": "adam"})
    assert {tag: (list(s), list(v)) for tag, (s, v) in scalars.tags.items()} == {
        "val/loss": ([1000.0, 2000.0], [3.25, 3.0]),
        "tokens": ([2000.0], [2e9]),
    }
    for source in (tmp_path, str(run), next(run.iterdir())):
        runs, _ = read_runs(source)
        assert (runs.n.tolist(), runs.d.tolist(), runs.loss.tolist()) == ([1e8], [2e9], [3.0])


def test_tensorboard_folder_of_runs(tmp_path: Path) -> None:
    for size, n in (("s", 1e8), ("m", 2e8)):
        scalars = [(step, "val/loss", 5 - step / 100 - n / 1e9) for step in range(0, 301, 100)]
        scalars += [(step, "tokens", 1e6 * step) for step in range(0, 601, 100)]
        events(tmp_path / size / "events.out.tfevents.1", *scalars)
        events(tmp_path / size / "events.out.tfevents.2", (200, "val/loss", 2.5), (400, "val/loss", 2.0))  # resumed
    (tmp_path / "s" / "1700000000.5").mkdir()  # torch's add_hparams writes a folder below the run
    (tmp_path / "s" / "1700000000.5" / "events.out.tfevents.3").write_bytes(TENSORBOARD[:288])
    meta = {"run": ["s", "m"], "n": [1e8, 2e8]}
    assert read_runs(tmp_path, meta=meta)[0].d.tolist() == [4e8, 4e8]  # at the last loss
    runs, notes = read_runs(tmp_path, meta=meta, tokens_per_step=2e6, final="mean:3")
    np.testing.assert_allclose(runs.loss, [(5 - 1 - 0.2 + 4.5) / 3, (5 - 1 - 0.1 + 4.5) / 3])
    assert (runs.n.tolist(), runs.d.tolist()) == ([2e8, 1e8], [8e8, 8e8])
    assert any("steps go back in m, s" in note for note in notes)
    with pytest.raises(InputError, match=r"run 'm', column 'n_params': empty"):  # only s has hyper-parameters
        read_runs(tmp_path, tokens_per_step=1e6)
    with pytest.raises(InputError, match=r"no run logs acc; name its tag with --loss. Tags: val/loss, tokens"):
        read_runs(tmp_path, columns={"loss": "acc"})


def test_hyper_parameters_below_the_run_and_runs_without_a_loss(tmp_path: Path) -> None:
    loss = ((1, "loss", 3.0), (1, "tokens", 1e9))
    events(tmp_path / "one" / "events.out.tfevents.1", *loss)
    (tmp_path / "one" / "1700000000.5").mkdir()
    (tmp_path / "one" / "1700000000.5" / "events.out.tfevents.2").write_bytes(TENSORBOARD[:288])
    events(tmp_path / "other" / "events.out.tfevents.1", (1, "accuracy", 0.5))
    runs, notes = read_runs(tmp_path)
    assert runs.n.tolist() == [1e8]
    assert "run 'other' logs no loss and is left out" in notes
    assert read_runs(tmp_path / "one")[0].n.tolist() == [1e8]  # the same where the folder itself is the run


def test_runs_of_a_folder_are_chosen_by_what_they_logged(tmp_path: Path) -> None:
    for name, kind in (("a", 0.0), ("b", 1.0), ("c", 1.0)):
        scalars = [(1, "n", 1e8), (1, "d", 1e9), (1, "arm", kind), (1, "loss", 3.0 - kind)]
        events(tmp_path / name / "events.out.tfevents.1", *scalars)
    runs, notes = read_runs(tmp_path, where=["arm=1"])
    assert runs.loss.tolist() == [2.0, 2.0]
    assert "--where arm=1: 2 of 3 runs" in notes
    with pytest.raises(InputError, match=r"--arm, --domain choose from a study's results\.csv, and this is a folder"):
        read_runs(tmp_path, arm="1", domain="text")
    with pytest.raises(InputError, match=r"no row has arm=2; 'arm' holds 1\.0 \(2\), 0\.0 \(1\)"):
        read_runs(tmp_path, where=["arm=2"])


def test_cut_and_damaged_event_files(tmp_path: Path) -> None:
    path = events(tmp_path / "a" / "events.out.tfevents.1", (1, "loss", 3.0), (2, "loss", 2.5))
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    runs, notes = read_cut(tmp_path)
    assert runs.loss.tolist() == [3.0]
    assert any("ends inside a record" in note for note in notes)
    for at, words in ((3, "not a TensorBoard event file, or damaged"), (30, "wrong checksum")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(InputError, match=words):
            read_cut(tmp_path)
    data = b"\x2a\xff\x01\x01"  # a summary said to be 255 bytes long
    head = struct.pack("<Q", len(data))
    path.write_bytes(head + struct.pack("<I", masked_crc(head)) + data + struct.pack("<I", masked_crc(data)))
    with pytest.raises(InputError, match="no TensorBoard event"):
        read_cut(tmp_path)


def read_cut(folder: Path) -> Any:
    return read_runs(folder, meta={"run": ["a"], "n": [1e8], "d": [1e9]})
