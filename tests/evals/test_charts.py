"""Charts are well-formed SVG, escape what is in them, and keep their ticks round."""

import itertools
import math
from xml.etree import ElementTree

import pytest

from tuneloom.evals import charts
from tuneloom.evals.charts import Part, Range, Series


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.0004, 0.0011), (3.2, 3.3), (-5, 1e6), (7, 7), (0, 0)]
)
def test_ticks_are_few_evenly_spaced_and_enclose_the_values(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert 2 <= len(found) <= 9
    assert found[0] <= low and found[-1] >= high - 1e-9
    assert max(gaps) == pytest.approx(min(gaps))
    assert len({charts.label(v, step=gaps[0]) for v in found}) == len(found)


def test_steps_are_whole_numbers() -> None:
    assert all(tick == int(tick) for tick in charts.ticks(1, 4, whole=True))


def test_a_label_has_the_decimals_of_its_step() -> None:
    assert charts.label(0.25, step=0.25) == "0.25"
    assert charts.label(1500.0, step=500) == "1,500"
    assert charts.label(0.2, step=0.2) == "0.2"
    assert charts.label(2_500_000.0, step=500_000) == "2.5e6"


def test_a_long_line_is_thinned_to_means_and_nan_is_left_out() -> None:
    points = [(float(i), float(i)) for i in range(4000)]
    thin = charts.thinned(points, 400)
    assert len(thin) == 400 and thin[0] == (4.5, 4.5)
    assert charts.thinned([(0.0, math.nan), (1.0, 2.0)]) == [(1.0, 2.0)]


def test_a_running_mean_looks_back_only() -> None:
    points = [(1.0, 4.0), (2.0, 2.0), (3.0, 0.0)]
    assert charts.smoothed(points, window=2) == [(1.0, 4.0), (2.0, 3.0), (3.0, 1.0)]


def test_every_chart_is_xml_with_a_name_and_hostile_text_stays_text() -> None:
    evil = '"><script>x</script>&'
    drawn = [
        charts.line_chart(
            [Series(evil, [(1, 2.0), (2, math.nan), (3, 4.0)], "c-1", dots=True)],
            title=evil,
            description=evil,
            y=evil,
        ),
        charts.interval_chart([Range(evil, 0.5, 0.4, 0.6, "c-1")], title=evil, description=evil),
        charts.stacked_bar([Part(evil, 0.25, "c-1")], title=evil, description=evil),
    ]
    for chart in drawn:
        root = ElementTree.fromstring(str(chart))
        assert root.get("role") == "img" and evil in str(root.get("aria-label"))
        assert not [e for e in root.iter() if e.tag.endswith("script")]


def test_no_point_no_chart() -> None:
    nothing = [Series("loss", [(1, math.nan)], "c-1")]
    assert charts.line_chart(nothing, title="Loss", description="", y="") == ""


def test_shares_of_the_bar_fill_its_width() -> None:
    parts = [Part("a", 0.75, "c-1"), Part("b", 0.25, "c-2")]
    root = ElementTree.fromstring(str(charts.stacked_bar(parts, title="t", description="d")))
    widths = [float(e.get("width", 0)) for e in root.iter() if e.tag.endswith("rect")]
    assert widths == [780.0, 260.0]
