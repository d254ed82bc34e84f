"""A study = arms x sizes x seeds x token budgets, read from TOML and expanded into runs (docs/study-file.md).

Each (arm, size, seed) is one trunk at constant learning rate; each budget D_k is a branch, the cool-down over its last
share (20 %), forked from the trunk at 0.8 D_k. So k budgets cost 0.8 D_max + 0.2 sum(D) token slots instead of sum(D)
(Haegele et al., arXiv 2405.18392). Budgets are token *slots*: the tokens a run really saw (D, without padding) are
measured. Steps are rounded to the nearest whole number: steps_k = round(D_k / (rows_per_step * row_len)).
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from isofusion.config import STORED, DataConfig, Frozen, ModelConfig, Positive, RunConfig, Seed, TrainConfig
from isofusion.errors import InputError
from isofusion.study.checks import apply_override, choice, distinct, known_keys, make

MULTIPLIERS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
WARMUP_SHARE = 0.1  # of the smallest budget (docs/study-file.md)
FEWEST = 3  # model sizes, and token budgets, that a law takes (laws.fit.fewest)
FEWEST_RUNS = 6  # one more than its five parameters (laws.fit.check_identified)
NEEDED = {"sizes": FEWEST, "budgets": FEWEST, "runs": FEWEST_RUNS}
REMARKS = ("title", "description", "assumed")  # words for people; changing them changes no run
SIZE_TRAIN_KEYS = ("lr", "warmup_steps", "encoder_lr_scale")
METRIC = "validation loss per domain after the cool-down, nats per target token"


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise ValueError(f"{value!r} is not a name: use letters, digits, '-', '_' and '.'")
    return value


def parse_tokens(value: Any) -> Any:
    """262144, "262144", "0.5M" -> token slots; K, M, B and T are decimal. Raises ValueError on anything else."""
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?\d+)?)\s*([KMBTkmbt]?)\s*", value)
        if not found:
            raise ValueError(f"{value!r} is not a token budget; write 500000, '500K', '0.5M', '2B' or '1T'")
        slots = float(found[1]) * MULTIPLIERS.get(found[2].upper(), 1.0)
        if slots == float("inf"):
            raise ValueError(f"{value!r} is more than a number can hold")
        return round(slots)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


Name = Annotated[str, AfterValidator(_name)]
Budget = Annotated[int, BeforeValidator(parse_tokens), Field(gt=0)]


class SizeSpec(Frozen):
    """One size of an arm, fully resolved; without `budgets` of its own it has the study's."""

    name: Name
    model: ModelConfig
    train: TrainConfig
    budgets: tuple[Budget, ...] = ()


class ArmSpec(Frozen):
    """One architecture and its sizes, smallest first as written."""

    name: Name
    sizes: tuple[SizeSpec, ...]

    def size(self, name: str) -> SizeSpec:
        return next(size for size in self.sizes if size.name == name)


class ExtraSeeds(Frozen):
    """A corner repeated with further seeds: the noise floor. Without `budgets`, all of its size's."""

    arm: str
    size: str
    seeds: tuple[Seed, ...]
    budgets: tuple[Budget, ...] = ()


class Tuning(Frozen):
    """A learning-rate sweep at the study's own schedule; empty means: all arms, end sizes, end budgets."""

    arms: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    budgets: tuple[Budget, ...] = ()
    lr_multipliers: tuple[Positive, ...]


class StudySpec(Frozen):
    """A study with every default filled in; the same TOML gives the same canonical JSON."""

    name: Name
    title: str = ""
    description: str = ""
    assumed: str = ""
    seeds: tuple[Seed, ...] = (0,)
    budgets: tuple[Budget, ...] = ()
    holdout: Literal["largest-size", "none"] = "largest-size"
    compute: Literal["exact", "6nd"] = "exact"
    extra_seeds: tuple[ExtraSeeds, ...] = ()
    exclude: tuple[str, ...] = ()
    data: DataConfig
    arms: tuple[ArmSpec, ...]
    tuning: Tuning | None = None

    @classmethod
    def from_toml(cls, path: str | Path, *, data: str | Path | None = None, overrides: Iterable[str] = ()) -> StudySpec:
        """Read, complete and check a study; `overrides` are `key=value` with dotted keys (`train.lr=0.01`).

        Raises InputError naming the file, the arm and the key.
        """
        path = Path(path)
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark first
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; ready studies are in the folder studies/") from None
        except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as a study: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{path}: not valid TOML: {error}") from None
        for override in overrides:
            apply_override(tree, override)
        if data is not None:
            if not Path(data).is_dir():
                raise InputError(f"--data {data}: no such folder")
            tree.setdefault("data", {})["folder"] = str(data)
        if isinstance(section := tree.get("data"), dict):
            paths = {key: section[key] for key in ("folder", "tokenizer") if isinstance(section.get(key), str)}
            section |= {key: os.path.expanduser(path) for key, path in paths.items()}
        try:
            spec = cls._from_tree(tree)
            spec.check()
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return spec

    @classmethod
    def _from_tree(cls, tree: dict[str, Any]) -> StudySpec:
        known_keys(tree, ("study", "data", "model", "train", "arms", "tuning"), "")
        for section in ("study", "data", "arms"):
            if section not in tree:
                raise InputError(f"[{section}] is missing" + ("; write one [[arms]] each" if section == "arms" else ""))
        head, arms = tree["study"], tree["arms"]
        if not isinstance(arms, list) or not all(isinstance(arm, dict) for arm in arms):
            raise InputError("arms: write one [[arms]] table for each arm")
        known_keys(head, [key for key in cls.model_fields if key not in ("data", "arms", "tuning")], "[study]")
        known_keys(tree.get("model", {}), ModelConfig.model_fields, "[model]")
        data = make(DataConfig, tree["data"], "[data]")
        model = {"patch_size": data.patch_size, **tree.get("model", {})}
        if "vocab_size" not in model and (size := vocab_size(data.tokenizer, data.folder)) is not None:
            model["vocab_size"] = size
        train = tree.get("train", {})
        make(TrainConfig, train, "[train]")
        resolved = tuple(_arm(arm, position, model, train) for position, arm in enumerate(arms))
        tuning = make(Tuning, tree["tuning"], "[tuning]") if "tuning" in tree else None
        return make(cls, {**head, "data": data, "arms": resolved, "tuning": tuning}, "[study]")

    def check(self) -> None:
        """What needs the whole study: names, references, warm-up, steps. Raises InputError."""
        if not self.arms:
            raise InputError("a study needs at least one [[arms]]")
        if set(self.data.unvalidated) == {source.domain for source in self.data.sources}:
            raise InputError(
                "[data]: no source has validation files, so no loss would be measured; give val = ['FOLDER/val-*.tar'] "
                "or the like to at least one source of every domain"
            )
        distinct([arm.name for arm in self.arms], "arm")
        _ascending(self.budgets, "[study]")
        for arm in self.arms:
            for size in arm.sizes:
                _ascending(size.budgets, here := f'arm "{arm.name}", size "{size.name}"')
                if not self.budgets_of(size):
                    raise InputError(f"{here}: no token budgets; give [study] budgets, or this size budgets of its own")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"[study]: seeds must be distinct and not empty, got {list(self.seeds)}")
        for extra in self.extra_seeds:
            arm = self.arm(extra.arm, "extra_seeds")
            choice(extra.size, [s.name for s in arm.sizes], "extra_seeds: size")
            self._known_budgets(extra.budgets, arm, arm.size(extra.size), "extra_seeds")
            if again := set(extra.seeds) & set(self.seeds):
                raise InputError(f"[study]: extra_seeds: seeds {sorted(again)} already run everywhere")
        if self.tuning:
            for name in self.tuning.arms:
                self.arm(name, "[tuning]")
            sizes = sorted({size.name for arm in self.arms for size in arm.sizes})
            for name in self.tuning.sizes:
                choice(name, sizes, "[tuning]: size")
            for arm, size in self._tuned():
                self._known_budgets(self.tuning.budgets, arm, size, "[tuning]")
        runs = self.runs()
        names = [run.name for run in runs]
        distinct(names, "run")
        branches = [run for run in runs if run.kind == "branch"]
        for name in self.exclude:
            choice(name, [run.name for run in branches], "[study]: exclude")
        if {run.name for run in branches if not run.variant} <= set(self.exclude):
            raise InputError("[study]: exclude leaves no run to fit a law to; keep some branches of the study in")

    def _known_budgets(self, budgets: tuple[int, ...], arm: ArmSpec, size: SizeSpec, where: str) -> None:
        for budget in budgets:
            if budget not in (known := self.budgets_of(size)):
                raise InputError(
                    f"{where}: budget {budget} is not one of the budgets {list(known)} of arm "
                    f'"{arm.name}", size "{size.name}"'
                )

    def notes(self) -> list[str]:
        """What is allowed and may yet be an oversight."""
        found = [
            f"no source of domain {domain} has validation files (val = [...]): the study trains on it, and neither its "
            f"loss nor its law will be known; the mean over domains leaves it out"
            for domain in self.data.unvalidated
        ]
        said: dict[str, list[str]] = {}
        branches = [run for run in self.runs() if run.kind == "branch" and not run.variant]
        for arm in self.arms:
            fitted = [run for run in branches if run.arm == arm.name and run.name not in self.exclude]
            have, rest = _counts(fitted), _counts(_without_largest(fitted))
            few = next((what for what, fewest in NEEDED.items() if rest[what] < fewest), None)
            if have["sizes"] < FEWEST or have["budgets"] < FEWEST:
                text = (
                    f"no law can be fitted to {have['sizes']} x {have['budgets']} (sizes x budgets): "
                    f"it takes {FEWEST} x {FEWEST}"
                )
            elif have["runs"] < FEWEST_RUNS:
                text = f"no law can be fitted to {have['runs']} runs: it takes {FEWEST_RUNS}"
            elif self.holdout == "largest-size" and few is not None:
                largest = "the largest" if few == "sizes" else "the largest size"
                text = (
                    f"no hold-out can test a law of {have[few]} {few}: without {largest}, too few are left to fit one"
                )
            else:
                continue
            said.setdefault(text, []).append(arm.name)
        return found + [f"{text} (arm {', '.join(arms)})" for text, arms in said.items()]

    def arm(self, name: str, where: str = "arm") -> ArmSpec:
        choice(name, [arm.name for arm in self.arms], f"{where}: arm")
        return next(arm for arm in self.arms if arm.name == name)

    def budgets_of(self, size: SizeSpec) -> tuple[int, ...]:
        """Token slots, ascending."""
        return size.budgets or self.budgets

    def slots_per_step(self, train: TrainConfig) -> int:
        return train.rows_per_step * self.data.row_len

    def steps(self, budget: int, train: TrainConfig) -> tuple[int, int]:
        """(fork step, last step) of the branch for a budget in token slots."""
        end = round(budget / self.slots_per_step(train))
        return round((1 - train.cooldown_share) * end), end

    def runs(self) -> list[RunConfig]:
        """Every run: each trunk followed by its branches. Raises InputError (warm-up, budgets too short)."""
        out: list[RunConfig] = []
        for arm in self.arms:
            for size in arm.sizes:
                for seed in self.seeds:
                    out += self._trunk_and_branches(arm, size, seed, self.budgets_of(size))
        for extra in self.extra_seeds:
            arm = self.arm(extra.arm)
            size = arm.size(extra.size)
            for seed in extra.seeds:
                out += self._trunk_and_branches(arm, size, seed, extra.budgets or self.budgets_of(size))
        return out + self._tuning_runs()

    def _tuned(self) -> list[tuple[ArmSpec, SizeSpec]]:
        """The sizes of the learning-rate sweep."""
        if self.tuning is None:
            return []
        arms = [arm for arm in self.arms if not self.tuning.arms or arm.name in self.tuning.arms]
        return [
            (arm, size)
            for arm in arms
            for size in arm.sizes
            if size.name in (self.tuning.sizes or {arm.sizes[0].name, arm.sizes[-1].name})
        ]

    def _tuning_runs(self) -> list[RunConfig]:
        out: list[RunConfig] = []
        for arm, size in self._tuned():
            assert self.tuning is not None
            known = self.budgets_of(size)
            budgets = self.tuning.budgets or tuple(sorted({known[0], known[-1]}))
            for factor in self.tuning.lr_multipliers:
                if factor == 1:  # the study's own runs are that point of the sweep
                    continue
                tuned = size.model_copy(update={"train": size.train.model_copy(update={"lr": size.train.lr * factor})})
                out += self._trunk_and_branches(arm, tuned, self.seeds[0], budgets, f"lr{factor:g}x")
        return out

    def _trunk_and_branches(
        self, arm: ArmSpec, size: SizeSpec, seed: int, budgets: tuple[int, ...], variant: str = ""
    ) -> list[RunConfig]:
        where, train, slots = f'arm "{arm.name}", size "{size.name}"', size.train, self.slots_per_step(size.train)
        points = [(budget, *self.steps(budget, train)) for budget in sorted(budgets)]
        for budget, fork, end in points:
            if fork < 1 or end <= fork:
                raise InputError(
                    f"{where}: budget {budget} is only {end} steps of {slots} token slots, too short for a trunk and "
                    f"a cool-down of {train.cooldown_share:g}; raise the budget or lower train.rows_per_step"
                )
        if len({end for _, _, end in points}) != len(points) or len({fork for _, fork, _ in points}) != len(points):
            raise InputError(f"{where}: budgets {list(budgets)} round to the same step ({slots} slots a step)")
        smallest = self.budgets_of(size)[0]
        shortest = round(smallest / slots)
        if train.warmup_steps > WARMUP_SHARE * shortest:
            raise InputError(
                f"{where}: warmup_steps {train.warmup_steps} is more than 10 % of the smallest budget "
                f"({smallest} slots = {shortest} steps); use at most {int(WARMUP_SHARE * shortest)}"
            )
        common: dict[str, Any] = {  # all of it checked with the study
            "study": self.name,
            "arm": arm.name,
            "size": size.name,
            "seed": seed,
            "variant": variant,
            "model": size.model,
            "data": self.data,
            "train": train,
        }
        forks = tuple(fork for _, fork, _ in points)
        trunk = make(RunConfig, {**common, "kind": "trunk", "end_step": forks[-1], "forks": forks}, where, STORED)
        tail = {"kind": "branch", "parent": trunk.name}
        return [trunk] + [
            make(
                RunConfig, {**common, **tail, "start_step": fork, "end_step": end, "budget_tokens": goal}, where, STORED
            )
            for goal, fork, end in points
        ]


def _sizes(runs: list[RunConfig]) -> Any:
    """Index [m] of each run's size as a law tells sizes apart: by N, one within 5 %."""
    import numpy as np

    from isofusion.laws.table import clusters
    from isofusion.model.count import count_parameters

    return clusters(np.array([count_parameters(run.model).n_active for run in runs], dtype=float))


def _without_largest(runs: list[RunConfig]) -> list[RunConfig]:
    index = _sizes(runs)
    return [run for run, i in zip(runs, index, strict=True) if i < index.max()]


def _counts(runs: list[RunConfig]) -> dict[str, int]:
    """What a law of these runs (of one arm) is fitted to; token budgets within 5 % are one."""
    import numpy as np

    from isofusion.laws.table import distinct

    budgets = np.array([run.end_step * run.train.rows_per_step for run in runs], dtype=float)
    return {"sizes": len(set(_sizes(runs))), "budgets": distinct(budgets), "runs": len(runs)}


def _ascending(budgets: tuple[int, ...], where: str) -> None:
    if list(budgets) != sorted(set(budgets)):
        raise InputError(f"{where}: budgets must be distinct and ascending, got {list(budgets)}")


def parameters_hint(model: ModelConfig) -> int:
    """Rough active parameters, for scheduling longest first without torch; `model.count` has the exact numbers."""
    per_token = max(model.top_k, 1) if model.n_experts else 1
    block = 4 * model.width**2 + 3 * per_token * model.width * model.hidden()
    total = model.depth * block + 2 * model.vocab_size * model.width
    if model.encoder_width:
        w = model.encoder_width
        total += model.encoder_layers * (4 * w**2 + 3 * w * model.hidden(w))
    return total


def cost_hint(run: RunConfig) -> float:
    """Relative cost of a run's own steps; the constant stands for the overhead that tiny models are made of."""
    slots = (run.end_step - run.start_step) * run.train.rows_per_step * run.data.row_len
    return slots * (parameters_hint(run.model) * (1.5 if run.model.n_experts else 1.0) + 1e5)


def vocab_size(tokenizer: str, folder: str | None = None) -> int | None:
    """Vocabulary of a tokenizer setting, or None when only loading it can tell (then model.vocab_size is needed)."""
    if tokenizer == "world":
        return 512
    if tokenizer.startswith("train:"):
        size = tokenizer.removeprefix("train:")
        if not size.isdecimal() or int(size) < 300:
            raise InputError(
                f'[data]: tokenizer {tokenizer!r}: write "train:VOCAB" with VOCAB >= 300, e.g. "train:2048"'
            )
        return int(size)
    paths = [Path(tokenizer)] + ([Path(folder) / tokenizer] if folder else [])
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        return None  # the data reader says what is missing; a cost estimate needs no file
    try:
        tree = json.loads(found.read_text(encoding="utf-8"))
        vocab = tree["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        return 1 + max(ids + [token["id"] for token in tree.get("added_tokens", [])])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"[data]: tokenizer {found}: not a tokenizer.json of the `tokenizers` library") from None


def _arm(arm: dict[str, Any], position: int, model: dict[str, Any], train: dict[str, Any]) -> ArmSpec:
    where = f'arm "{arm["name"]}"' if "name" in arm else f"arm number {position + 1}"
    if "name" not in arm:
        raise InputError(f'{where}: "name" is missing')
    known_keys(arm, ["name", "sizes", "train", *ModelConfig.model_fields], where)
    if not arm.get("sizes") or not isinstance(arm["sizes"], dict):
        raise InputError(f"{where}: needs sizes, e.g. [arms.sizes] s16 = {{ width = 16 }}")
    common = {**model, **{key: value for key, value in arm.items() if key in ModelConfig.model_fields}}
    arm_train = arm.get("train", {})
    known_keys(arm_train, TrainConfig.model_fields, f"{where}: train")
    make(TrainConfig, {**train, **arm_train}, f"{where}: train")
    sizes = []
    for name, entry in arm["sizes"].items():
        here = f'{where}, size "{name}"'
        if not isinstance(entry, dict):
            raise InputError(f"{here}: must be a table such as {{ width = 16 }}, got {entry!r}")
        known_keys(entry, [*ModelConfig.model_fields, *SIZE_TRAIN_KEYS, "budgets"], here)
        own = {key: value for key, value in entry.items() if key in SIZE_TRAIN_KEYS}
        rest = {key: value for key, value in entry.items() if key not in (*SIZE_TRAIN_KEYS, "budgets")}
        resolved = make(TrainConfig, {**train, **arm_train, **own}, here)
        if resolved.cooldown_share >= 1:
            raise InputError(f"{here}: cooldown_share must be below 1, a branch needs a trunk to fork from")
        config = make(ModelConfig, {**common, **rest}, here)
        budgets = entry.get("budgets", ())
        sizes.append(make(SizeSpec, {"name": name, "model": config, "train": resolved, "budgets": budgets}, here))
    return make(ArmSpec, {"name": arm["name"], "sizes": sizes}, where)
