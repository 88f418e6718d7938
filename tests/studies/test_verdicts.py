"""The ladder to a verdict, and the judgement that carries it."""

import json
import math
import statistics

import pytest

from workbench.errors import InputError
from workbench.lib.measures.statistics import Interval, mean_interval, paired_interval, tost
from workbench.studies.verdicts import (
    NOT_REPRODUCED,
    NOT_RESOLVED,
    NOT_TESTABLE,
    REPRODUCED,
    VERDICTS,
    Judgement,
    all_above,
    any_below,
    decide,
)

GAIN = paired_interval([3.0, 5.0, 4.5], [1.0, 2.0, 2.5])


def test_the_first_verdict_that_holds_is_the_one():
    assert decide((REPRODUCED, True), (NOT_REPRODUCED, True)) == REPRODUCED
    assert decide((NOT_REPRODUCED, True), (REPRODUCED, True)) == NOT_REPRODUCED
    assert decide((REPRODUCED, False), (NOT_TESTABLE, True)) == NOT_TESTABLE
    assert decide((REPRODUCED, False), (NOT_REPRODUCED, False)) == decide() == NOT_RESOLVED


def test_a_judgement_on_an_interval_has_its_ends():
    found = Judgement.on(GAIN, REPRODUCED, "It is higher.", {"by": {"a": GAIN}, "all": [GAIN, 1.0], "n": 3})
    assert (found.effect, found.ci) == (GAIN.estimate, (GAIN.low, GAIN.high))
    assert found.details == {"by": {"a": GAIN.as_dict()}, "all": [GAIN.as_dict(), 1.0], "n": 3}
    json.dumps(found.details)
    assert Judgement.on(GAIN, REPRODUCED, "It is higher.").details == {}


def test_a_verdict_is_one_of_four():
    assert all(Judgement(verdict, 0.0, (0, 0), "").verdict == verdict for verdict in VERDICTS)
    with pytest.raises(InputError, match="verdict 'proved' is unknown"):
        Judgement("proved", 0.0, (0, 0), "")


def test_every_one_and_one_of_them():
    high, low = Interval(2.0, 1.0, 3.0, 3, 0.95), Interval(-2.0, -3.0, -1.0, 3, 0.95)
    single = mean_interval([5.0])
    assert all_above([high, high]) and not all_above([high, low]) and not all_above([high, single])
    assert all_above([high], 0.5) and not all_above([high], 1.0)
    assert any_below([high, low]) and not any_below([high, single]) and any_below([high], 3.5)
    assert math.isinf(single.low)


def test_a_judgement_keeps_the_level_and_the_spread_of_its_effect():
    wide = paired_interval([3.0, 5.0, 4.5], [1.0, 2.0, 2.5], level=0.9)
    found = Judgement.on(wide, REPRODUCED, "")
    assert (found.level, found.claimed) == (0.9, None)
    assert found.sd == pytest.approx(statistics.stdev([2.0, 3.0, 2.0]))
    assert (-wide).sd == wide.sd
    assert math.isnan(Judgement.on(paired_interval([1.0], [2.0]), NOT_RESOLVED, "").sd)


def test_a_judgement_on_a_test_of_equivalence_has_its_ninety_percent():
    test = tost([3.0, 5.0, 4.5], [1.0, 2.0, 2.5], margin=4.0, paired=True)
    found = Judgement.on(test, REPRODUCED, "", claimed=(-4.0, 4.0))
    assert (found.effect, found.ci, found.level) == (test.diff, test.ci90, 0.9)
    assert found.sd == pytest.approx(statistics.stdev([2.0, 3.0, 2.0]))
    assert found.claimed == (-4.0, 4.0)


@pytest.mark.parametrize("claimed", [(1.0, 1.0), (2.0, 1.0), (-math.inf, math.inf), (math.nan, 1.0)])
def test_where_the_claim_has_the_effect_is_somewhere(claimed):
    with pytest.raises(InputError, match=r"claimed is .* but must be"):
        Judgement(REPRODUCED, 0.0, (0, 0), "", claimed=claimed)
