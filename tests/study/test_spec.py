from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from isofusion.config import ModelConfig
from isofusion.errors import InputError
from isofusion.model.count import count_parameters
from isofusion.study.spec import StudySpec, parameters_hint, parse_tokens, vocab_size

TUNING = '\n[tuning]\narms = ["early"]\nlr_multipliers = [0.5, 1, 2]\n\n[train]\n'


def test_expands_into_trunks_and_branches(toml: Path) -> None:
    spec = StudySpec.from_toml(toml)
    runs = spec.runs()
    assert [run.name for run in runs] == [
        *("early-s16-s0-trunk", "early-s16-s0-d10", "early-s16-s0-d20"),
        *("early-s32-s0-trunk", "early-s32-s0-d10", "early-s32-s0-d20"),
        *("late-s16-s0-trunk", "late-s16-s0-d10", "late-s16-s0-d20"),
    ]
    trunk, short, long = runs[:3]
    assert (trunk.end_step, trunk.forks, trunk.parent) == (16, (8, 16), None)
    assert (short.start_step, short.end_step, short.budget_tokens, short.parent) == (8, 10, 2560, trunk.name)
    assert (long.start_step, long.end_step) == (16, 20)
    assert trunk.model.vocab_size == 512  # filled in from the world's tokenizer
    assert trunk.model.patch_size == 8  # filled in from the data
    late = runs[6]
    assert (late.model.encoder_width, late.train.lr, late.train.encoder_lr_scale) == (16, 1e-3, 0.5)


def test_budgets_cost_trunk_once_and_cool_downs(toml: Path) -> None:
    spec = StudySpec.from_toml(toml, overrides=["study.budgets=[25600, 51200, 102400, 204800]"])
    one = [run for run in spec.runs() if run.arm == "early" and run.size == "s16"]
    slots = sum(run.end_step - run.start_step for run in one) * 2 * 128
    assert slots == 0.8 * 204800 + 0.2 * sum(spec.budgets)


OWN = ("s32 = { width = 32 }", 's32 = { width = 32, budgets = [2560, "7.68K"] }')


def test_a_size_may_have_budgets_of_its_own(read) -> None:
    """Everything about its runs follows them: branches, the trunk's end, extra seeds, corners of a sweep, warm-up."""
    extra = ("seeds = [0]", 'seeds = [0]\nextra_seeds = [{ arm = "early", size = "s32", seeds = [1] }]')
    runs = read(OWN, extra, ("\n[train]\n", TUNING)).runs()
    ends = {name: [r.end_step for r in runs if r.name.startswith(name)] for name in ("early-s16-s0", "early-s32-s")}
    assert ends["early-s16-s0"] == [16, 10, 20] * 3  # a sweep of two other rates
    assert ends["early-s32-s"] == [24, 10, 30] * 4
    none = ("budgets = [2560, 5120]\n", "")
    lone = read(none, ("{ width = 16", "{ budgets = [5120], width = 16"), OWN)
    assert [run.end_step for run in lone.runs() if run.kind == "branch"] == [20, 10, 30, 20]
    with pytest.raises(InputError, match=r'arm "early", size "s16": no token budgets; give .study. budgets'):
        read(none, OWN)
    with pytest.raises(InputError, match=r'tuning.: budget 5120 is not one of the budgets .* size "s32"'):
        read(OWN, ("\n[train]\n", TUNING.replace("\n[train]", "budgets = [5120]\n[train]")))


def test_extra_seeds_repeat_one_corner(read) -> None:
    extra = ("seeds = [0]", 'seeds = [0]\nextra_seeds = [{ arm = "late", size = "s16", seeds = [1, 2] }]')
    names = [run.name for run in read(extra).runs()]
    assert len(names) == 9 + 6
    assert {"late-s16-s1-trunk", "late-s16-s2-d20"} <= set(names)
    assert "early-s16-s1-trunk" not in names


def test_extra_seeds_may_have_fewer_budgets(read) -> None:
    names = [run.name for run in read(("seeds = [0]", extra(budgets=[5120]))).runs()]
    assert [name for name in names if "-s1-" in name] == ["late-s16-s1-trunk", "late-s16-s1-d20"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", {("early", "s16", 10), ("early", "s16", 20), ("early", "s32", 10), ("early", "s32", 20),
              ("late", "s16", 10), ("late", "s16", 20)}),
        ('sizes = ["s16"]', {("early", "s16", 10), ("early", "s16", 20), ("late", "s16", 10), ("late", "s16", 20)}),
        ('arms = ["late"]\nbudgets = [5120]', {("late", "s16", 20)}),
    ],
)  # fmt: skip
def test_a_sweep_takes_what_is_named_or_all_arms_and_the_ends(read, setting: str, expected: set) -> None:
    """Of three budgets and three sizes the middle ones are left out where nothing is named."""
    between = ("s32 = { width = 32 }", "s24 = { width = 24 }\ns32 = { width = 32 }")
    spec = read(
        ("\n[train]\n", TUNING.replace('arms = ["early"]', setting)), between, ("[2560, 5120]", "[2560, 3840, 5120]")
    )
    tuned = {(run.arm, run.size, run.end_step) for run in spec.runs() if run.variant and run.kind == "branch"}
    assert tuned == expected


def test_the_vocabulary_comes_from_the_tokenizer(toml: Path, tmp_path: Path) -> None:
    model = {"vocab": {"a": 0, "b": 40}}
    for name, tree in (
        ("words", {"model": model, "added_tokens": [{"id": 41}]}),
        ("list", {"model": {"vocab": [[], []]}}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    (tmp_path / "other.json").write_text('{"model": 3}')
    assert vocab_size("world") == 512
    assert vocab_size("train:300") == 300
    assert vocab_size("words.json", str(tmp_path)) == vocab_size(str(tmp_path / "words.json")) == 42
    assert vocab_size("list.json", str(tmp_path)) == 2
    assert vocab_size("none.json", str(tmp_path)) is None  # only loading it can tell
    with pytest.raises(InputError, match=r"other\.json: not a tokenizer\.json"):
        vocab_size("other.json", str(tmp_path))
    assert StudySpec.from_toml(toml, overrides=["data.tokenizer=train:300"]).runs()[0].model.vocab_size == 300


def test_runs_are_weighed_by_about_their_active_parameters() -> None:
    common = {"depth": 3, "head_dim": 32, "patch_size": 4, "vocab_size": 2000}
    for model in (
        ModelConfig(width=256, **common),
        ModelConfig(width=128, fusion="late", encoder_width=256, encoder_depth=5, **common),
        ModelConfig(width=256, n_experts=8, top_k=2, **common),
    ):
        assert parameters_hint(model) == pytest.approx(count_parameters(model).n_active, rel=0.03)


def test_tuning_runs_have_their_own_names_and_rates(read) -> None:
    runs = read(("\n[train]\n", TUNING)).runs()
    tuned = [run for run in runs if run.variant]
    assert len(tuned) == 2 * 2 * 3  # sizes x factors other than 1 x (trunk + two budgets)
    half = next(run for run in tuned if run.name == "early-s16-s0-lr0.5x-d10")
    assert half.train.lr == 2.5e-3
    assert half.parent == "early-s16-s0-lr0.5x-trunk"
    assert len({run.name for run in runs}) == len(runs)


def test_rounds_budgets_to_whole_steps(toml: Path) -> None:
    spec = StudySpec.from_toml(toml, overrides=['study.budgets=["2.6K", 5000]'])
    assert [run.end_step for run in spec.runs()[1:3]] == [10, 20]


def test_overrides_reach_every_level(toml: Path) -> None:
    spec = StudySpec.from_toml(toml, overrides=["train.lr=0.25", "arms.early.sizes.s32.width=48", "study.title=hi"])
    assert spec.title == "hi"
    assert spec.arms[0].size("s32").model.width == 48
    assert spec.arms[0].size("s32").train.lr == 0.25


@pytest.mark.parametrize(("text", "value"), [("0.5M", 500_000), ("2B", 2_000_000_000), ("1_000", 1000), (7, 7)])
def test_reads_token_counts(text: object, value: int) -> None:
    assert parse_tokens(text) == value


def extra(**changes: object) -> str:
    one = {"arm": "late", "size": "s16", "seeds": [1]} | changes
    return "extra_seeds = [{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in one.items()) + " }]"


BRANCHES = [f"{arm}-s0-d{steps}" for arm in ("early-s16", "early-s32", "late-s16") for steps in (10, 20)]
BAD = [
    (('fusion = "late"', 'fusion = "lat"'), ['arm "late"', "fusion", "'lat'"]),
    (
        ("encoder_width = 16", "encoder_width = 20"),
        ['arm "late"', "encoder_width 20 is not a multiple", "head_dim (8)"],
    ),
    (("s32 = { width = 32 }", "s32 = { width = 30 }"), ['arm "early", size "s32"', "width 30 is not a multiple"]),
    (("warmup_steps = 1", "warmup_step = 1"), ["[train]", 'unknown key "warmup_step"', 'did you mean "warmup_steps"?']),
    (("depth = 2", "depht = 2"), ["depht"]),
    (("title = ", "titel = "), ["[study]", "titel", "title"]),
    (("val_rows = 2", "val_row = 2"), ["[data]", "val_row", "val_rows"]),
    (("lr = 1e-3", "lrr = 1e-3"), ['arm "late", size "s16"', "lrr"]),
    (("[2560, 5120]", "[-2560, 5120]"), ["budgets.0", "greater than 0", "-2560"]),
    (("[2560, 5120]", "[5120, 2560]"), ["ascending"]),
    (("[2560, 5120]", '["many"]'), ["not a token budget", "0.5M"]),
    (("[2560, 5120]", "[256, 5120]"), ["budget 256 is only 1 steps", "too short"]),
    (("[2560, 5120]", "[5120, 5121]"), ["round to the same step"]),
    (("{ width = 32 }", "{ width = 32, budgets = [5120, 2560] }"), ['arm "early", size "s32"', "ascending"]),
    (("{ width = 32 }", "{ width = 32, budgets = [256, 512] }"), ['size "s32"', "budget 256 is only 1 steps"]),
    (("{ width = 32 }", "{ width = 32, budgets = 5120 }"), ['arm "early", size "s32"', "budgets"]),
    (("warmup_steps = 1", "warmup_steps = 2"), ["warmup_steps 2 is more than 10 %", "at most 1"]),
    (('name = "late"', 'name = "early"'), ['arm name "early" appears more than once']),
    (('name = "late"', 'name = "../late"'), ["is not a name"]),
    (("seeds = [0]", "seeds = [0, 0]"), ["seeds must be distinct"]),
    (("seeds = [0]", 'exclude = ["early-s16-s0-d11"]'), ["exclude", "does not exist", "early-s16-s0-d1"]),
    (("seeds = [0]", 'extra_seeds = [{ arm = "erly", size = "s16", seeds = [1] }]'), ['"erly"', 'mean "early"']),
    (("image_size = 48", "image_size = 52"), ["[data]", "image_size 52 is not a multiple of patch_size 8"]),
    (("rows_per_step = 2", "rows_per_step = 2\ncooldown_share = 1.0"), ["cooldown_share must be below 1"]),
    (("lr = 5e-3", "lr = -1"), ["[train]", "lr", "greater than 0", "got -1"]),
    (("depth = 2", "depth = 2\nbalance_weight = inf"), ["balance_weight", "finite number"]),
    (
        ("rows_per_step = 2", "rows_per_step = 2\nweight_decay = inf"),
        ["[train]", "weight_decay", "less than 1"],
    ),
    (("seeds = [0]", "seeds = [-1]"), ["[study]", "seeds.0", "greater than or equal to 0", "got -1"]),
    (("val_rows = 2", "val_rows = 2\nval_seed = -1"), ["[data]", "val_seed", "greater than or equal to 0"]),
    (("seeds = [0]", "seeds = [99999999999999999999]"), ["seeds.0", "less than 4294967296"]),
    (("[data]", "[data"), ["not valid TOML", "line"]),
    (("[2560, 5120]", '["1e400"]'), ["[study]", "budgets.0", "'1e400' is more than a number can hold"]),
    (("[2560, 5120]", '["9e307T"]'), ["budgets.0", "more than a number can hold"]),
    (("[model]", "[[model]]"), ["[model]: must be a table"]),
    (("[train]", "[[train]]"), ["[train]: must be a table"]),
    (("[arms.train]", "[[arms.train]]"), ['arm "late": train: must be a table']),
    (('"caption"', '"captions"'), ["[data]: sources.captions.domain: input should be 'caption'", "got 'captions'"]),
    (('domain = "caption"', "domian = 1"), ["sources.captions.domian"]),
    (("budgets = [2560, 5120]", 'budgets = "64K"'), ["[study]: budgets: write a list, [...], got '64K'"]),
    (("seeds = [0]", f"exclude = {json.dumps(BRANCHES)}"), ["[study]: exclude leaves no run to fit a law to"]),
    (("seeds = [0]", extra(size="s17")), ["extra_seeds: size", '"s17"', "s16"]),
    (("seeds = [0]", "seeds = [0]\n" + extra(seeds=[1, 0])), ["extra_seeds: seeds [0] already run everywhere"]),
    (("seeds = [0]", extra(budgets=[2560, 9])), ["budget 9 is not one of the budgets [2560, 5120]"]),
    (("\n[train]\n", TUNING.replace('arms = ["early"]', "budgets = [9]")), ["budget 9 is not one of"]),
    (("\n[train]\n", TUNING.replace('arms = ["early"]', 'sizes = ["s17"]')), ["[tuning]: size", '"s17"']),
    (("\n[train]\n", TUNING.replace("early", "erly")), ["[tuning]: arm", '"erly"', "early"]),
    (('name = "late"\n', ""), ["arm number 2", '"name" is missing']),
    (("s16 = { width = 16 }\ns32 = { width = 32 }", ""), ['arm "early": needs sizes']),
    (("[arms.sizes]\ns16 = { width = 16 }\ns32 = { width = 32 }", "sizes = 16"), ['arm "early": needs sizes']),
    (("s32 = { width = 32 }", "s32 = 32"), ['arm "early", size "s32": must be a table', "got 32"]),
    (("val_rows = 2", 'tokenizer = "train:2k"'), ["[data]: tokenizer 'train:2k'", "train:VOCAB"]),
    (("val_rows = 2", 'tokenizer = "train:299"'), ["[data]: tokenizer 'train:299'", ">= 300"]),
    (('format = "world"', 'format = "webdataset", train = ["a.tar"]'), ["no source has validation files"]),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[str(change[1])[:40] for change, _ in BAD])
def test_bad_input_is_one_clear_message(read, change: tuple[str, str], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read(change)
    message = str(caught.value)
    assert "changed.toml: " in message
    assert "\n" not in message
    assert "pydantic" not in message
    for word in words:
        assert word in message, message


NUMBERS = {
    "train": ("lr", "encoder_lr_scale", "cooldown_share", "eps", "weight_decay", "clip", "warmup_steps"),
    "model": ("balance_weight", "rope_theta", "norm_eps", "base_width"),
    "data": ("max_bad_share", "val_rows"),
    "data.world": ("zipf", "seed"),
}


@pytest.mark.parametrize("value", ["inf", "nan", "-inf", "1e400"])
def test_no_setting_is_endless_or_no_number(toml: Path, value: str) -> None:
    lists = {"train.betas": f"[{value}, 0.9]", "tuning.lr_multipliers": f"[1, {value}]", "study.budgets": f"[{value}]"}
    lists["data.sources"] = f'[{{ name = "x", domain = "caption", format = "world", weight = {value} }}]'
    single = {f"{table}.{key}": value for table, keys in NUMBERS.items() for key in keys}
    for key, given in (lists | single).items():
        with pytest.raises(InputError, match=r"finite|than") as caught:
            StudySpec.from_toml(toml, overrides=[f"{key}={given}"])
        name = key.rpartition(".")[2]
        assert name in str(caught.value)


def test_a_mark_of_the_editor_and_a_home_folder(toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StudySpec.from_toml(toml)
    toml.write_bytes(b"\xef\xbb\xbf" + toml.read_bytes().replace(b"\n", b"\r\n"))
    assert StudySpec.from_toml(toml) == plain
    monkeypatch.setenv("HOME", str(tmp_path))
    data = StudySpec.from_toml(
        toml, overrides=["data.folder=~/mine", "data.tokenizer=~/tok.json", "model.vocab_size=9"]
    ).data
    assert (data.folder, data.tokenizer) == (f"{tmp_path}/mine", f"{tmp_path}/tok.json")


def test_missing_file_and_folder(toml: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        StudySpec.from_toml(toml.with_name("none.toml"))
    with pytest.raises(InputError, match=r"--data .*no such folder"):
        StudySpec.from_toml(toml, data=toml.parent / "none")


def test_bad_override(toml: Path) -> None:
    for text in ("train.lr", "arms.nobody.width=3"):
        with pytest.raises(InputError, match="--set"):
            StudySpec.from_toml(toml, overrides=[text])


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "studies").glob("*.toml")), ids=lambda p: p.stem)
def test_ready_studies_are_valid(path: Path) -> None:
    assert len(StudySpec.from_toml(path).runs()) > 0


def test_an_override_that_every_size_hides_is_refused(tmp_path: Path) -> None:
    ready = Path(__file__).parents[2] / "studies" / "world-mini.toml"
    toml = tmp_path / "study.toml"
    toml.write_text(re.sub(r"^(s\d+ = \{.*) \}$", r"\1, lr = 5e-3 }", ready.read_text(), flags=re.MULTILINE))
    with pytest.raises(InputError, match=r"--set train\.lr=0\.01: every size of every arm sets its own lr"):
        StudySpec.from_toml(toml, overrides=["train.lr=0.01"])
    spec = StudySpec.from_toml(toml, overrides=["arms.early.sizes.s16.lr=0.01"])
    assert next(run for run in spec.runs() if run.arm == "early" and run.size == "s16").train.lr == 0.01


def test_budgets_that_every_size_hides_are_refused(toml: Path) -> None:
    """They had been taken and had changed no run."""
    own = re.sub(r"^(s\d+ = \{.*) \}$", r"\1, budgets = [2560, 5120] }", toml.read_text(), flags=re.MULTILINE)
    toml.write_text(own)
    with pytest.raises(InputError, match=r"study\.budgets=.*: every size of every arm sets its own budgets, .*s16"):
        StudySpec.from_toml(toml, overrides=["study.budgets=[5120]"])
    toml.write_text(own.replace("1e-3, budgets = [2560, 5120]", "1e-3, budgets = []"))  # as good as none
    spec = StudySpec.from_toml(toml, overrides=["study.budgets=[5120]"])
    assert [run.end_step for run in spec.runs() if run.kind == "branch"] == [10, 20, 10, 20, 20]


def test_a_ladder_too_small_for_a_law_is_said_before_it_is_trained(read) -> None:
    assert read().notes() == [
        "no law can be fitted to 2 x 2 (sizes x budgets): it takes 3 x 3 (arm early)",
        "no law can be fitted to 1 x 2 (sizes x budgets): it takes 3 x 3 (arm late)",
    ]


@pytest.mark.parametrize(
    ("sizes", "note"),
    [
        ({16: [10, 20], 32: [10, 20], 48: [10, 40]}, "no hold-out can test a law of 3 sizes: without the largest, too"),
        ({16: [100, 200], 32: [102, 205], 48: [104, 208]}, "no law can be fitted to 3 x 2 (sizes x budgets): it takes"),
        ({16: [10, 40], 32: [20], 48: [10, 20]}, "no law can be fitted to 5 runs: it takes 6"),
        (
            {16: [10, 20], 32: [10, 20], 48: [10, 20], 64: [40]},
            "no hold-out can test a law of 3 budgets: without the largest size, too",
        ),
        (
            {16: [10, 20], 32: [40], 48: [10, 20], 64: [10]},
            "no hold-out can test a law of 6 runs: without the largest size, too",
        ),
        ({64: [10], 16: [10, 20], 32: [10, 40], 48: [10, 20]}, None),
    ],
)
def test_what_is_no_grid_is_counted_as_it_is_fitted(read, sizes: dict[int, list[int]], note: str | None) -> None:
    """Budgets in steps. Those 5 % apart are one to a law, and what is left without the largest size is looked at."""
    table = [
        f"s{w} = {{ width = {w}, budgets = {[256 * steps for steps in budgets]} }}" for w, budgets in sizes.items()
    ]
    early = ("s16 = { width = 16 }\ns32 = { width = 32 }", "\n".join(table))
    notes = [text for text in read(('"none"', '"largest-size"'), early).notes() if "(arm early)" in text]
    assert [text[: len(note or "")] for text in notes] == ([] if note is None else [note])


def test_sizes_of_nearly_one_n_are_one_size(read) -> None:
    early = ("s32 = { width = 32 }", "s17 = { width = 16, ffn_multiple = 8 }\ns32 = { width = 32 }")
    (note,) = (text for text in read(early, ("[2560, 5120]", "[2560, 5120, 10240]")).notes() if "early" in text)
    assert note == "no law can be fitted to 2 x 3 (sizes x budgets): it takes 3 x 3 (arm early)"


def test_the_study_of_the_guide_reads_and_can_be_judged(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(guide.partition("```toml\n")[2].partition("```")[0])
    assert StudySpec.from_toml(path, overrides=["model.vocab_size=4096"]).notes() == []
    path.write_text(path.read_text().replace("s48 =", "# s48 ="))
    assert StudySpec.from_toml(path, overrides=["model.vocab_size=4096"]).notes() == [
        "no hold-out can test a law of 3 sizes: without the largest, too few are left to fit one (arm early, late)"
    ]
