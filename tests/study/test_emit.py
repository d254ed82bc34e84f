from __future__ import annotations

from pathlib import Path

from isofusion.study.emit import emit
from isofusion.study.spec import StudySpec

MINI = Path(__file__).parents[2] / "studies/world-mini.toml"


def test_sizes_that_get_one_width_keep_the_budgets_of_both(tmp_path: Path) -> None:
    """34.6K and 36.7K are more than 5 % apart and have one nearest width: the second had replaced the first."""
    path = tmp_path / "next.toml"
    path.write_text(emit(MINI, [(34.6e3, 1e6), (36.7e3, 2e6), (36.7e3, 4e6)], arm="early"))
    (size,) = StudySpec.from_toml(path).arms[0].sizes
    assert size.budgets == tuple(round(d / 1024) * 1024 for d in (1e6, 2e6, 4e6))
