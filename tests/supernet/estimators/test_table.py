from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supernet.estimators.table import Table
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies.base import Run

SPACE = NasBench201()
CELL = "|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|"


def prepared(path: Path, space: Any = SPACE) -> Table:
    table = Table(str(path))
    table.prepare(SimpleNamespace(space=space), Run.unwritten(), None)  # type: ignore[arg-type]
    return table


def test_accuracies_are_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(f"architecture,test\n{CELL},87.5\n")
    table = prepared(path)
    assert table.oracle and table.estimate(SPACE.from_string(CELL)) == (87.5, 0.125)
    other = SPACE.from_string(CELL.replace("skip_connect", "nor_conv_1x1"))
    with pytest.raises(ValueError, match="does not hold"):
        table.estimate(other)


def test_what_is_no_table_is_refused_before_the_search(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="estimator=table needs estimator.path=FILE"):
        Table(None)
    with pytest.raises(ValueError, match="is not a file"):
        prepared(tmp_path / "missing.csv")
    path = tmp_path / "table.csv"
    path.write_text(f"architecture,test\n{CELL},87.5\n")
    with pytest.raises(ValueError, match="no notation that a benchmark table could use"):
        prepared(path, MBConv())
