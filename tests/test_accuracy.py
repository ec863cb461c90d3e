"""Area-adjusted accuracy: the worked example of Olofsson et al. 2014 (tables 8 and 9, section 5.2)."""

from __future__ import annotations

import numpy as np
import pytest

from rsosm_cli.errors import UsageError
from rsosm_cli.products.accuracy import allocate, assess

CLASSES = ("deforestation", "forest gain", "stable forest", "stable non-forest")
MATRIX = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
PIXELS = (200_000, 150_000, 3_200_000, 6_450_000)
HECTARES = tuple(p * 0.09 for p in PIXELS)


def test_worked_example_of_the_paper():
    found = assess(MATRIX, HECTARES, CLASSES)
    assert found.overall.value == pytest.approx(0.947, abs=5e-4)
    assert found.overall.margin == pytest.approx(0.02, abs=5e-3)
    assert [round(u.value, 2) for u in found.users] == [0.88, 0.73, 0.93, 0.96]
    assert [round(u.margin, 2) for u in found.users] == [0.07, 0.10, 0.04, 0.02]
    assert [round(p.value, 2) for p in found.producers] == [0.75, 0.85, 0.93, 0.96]
    assert [round(p.margin, 2) for p in found.producers[::2]] == [0.21, 0.03]
    assert found.areas[0].value == pytest.approx(21_158, abs=1)
    assert found.areas[0].margin == pytest.approx(6_158, abs=1)
    assert [round(a.value) for a in found.areas] == [21158, 11686, 285770, 581386]
    assert [round(a.margin) for a in found.areas] == [6158, 3756, 15510, 16282]
    assert sum(a.value for a in found.areas) == pytest.approx(sum(HECTARES))


def test_a_mapped_class_without_points_is_named():
    matrix = MATRIX.copy()
    matrix[1] = 0
    with pytest.raises(UsageError, match="map class forest gain"):
        assess(matrix, HECTARES, CLASSES)


def test_a_class_that_is_not_mapped_has_a_producers_accuracy_of_zero():
    found = assess(np.array([[8, 2], [0, 0]]), (100.0, 0.0), ("a", "b"))
    assert found.producers[1].value == 0
    assert np.isnan(found.users[1].value)
    assert found.areas[1].value == pytest.approx(20)


def test_allocation_meets_the_number_and_spares_no_class():
    drawn = allocate(300, PIXELS)
    assert drawn.sum() == 300
    assert drawn.min() >= 30
    assert drawn.argmax() == 3
    assert allocate(7, (1e6, 1, 0, 1)).tolist() == [3, 2, 0, 2]
    with pytest.raises(UsageError, match="too few for the 4 classes"):
        allocate(5, PIXELS)
