"""Figures over steps by hand, and what is drawn of them."""

import io
import math
from xml.etree import ElementTree

import pytest
from pandas import Series
from PIL import Image, ImageChops

from apo_lora.run.curves import curve, figure_curve, read_steps, thinned
from apo_lora.run.directory import RunDir
from apo_lora.run.drawing import Line, canvas, css, css_classes, draw_counts, draw_curves, png, small_canvas, svg
from apo_lora.run.files import append_jsonl
from apo_lora.run.plots import overview, write_plots

NONE = math.nan


def test_the_record_becomes_columns_of_numbers(tmp_path):
    run = RunDir(tmp_path)
    assert read_steps(run).empty and "kl" in read_steps(run)
    append_jsonl(run.metrics, [{"step": 2, "kl": 9.0}, {"step": 1, "kl": None, "entropy": float("inf")}])
    append_jsonl(run.metrics, [{"step": 2, "kl": 0.5}])
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "k')  # cut by a kill
    steps = read_steps(run)
    assert list(steps.index) == [1, 2] and steps["kl"].tolist() == pytest.approx([NONE, 0.5], nan_ok=True)
    assert steps["entropy"].isna().all() and steps["accuracy"].isna().all()


def test_a_running_mean_is_over_the_steps_that_have_a_value():
    one = curve([Series([1.0, 3.0, NONE, 5.0, *[NONE] * 5, 7.0], index=range(1, 11))])
    assert one["mean"].tolist() == pytest.approx([1, 2, 2, 3, 3, 4, 5, 5, NONE, 7], nan_ok=True)
    assert one["raw"].isna().sum() == 6
    assert curve([Series([NONE, NONE])]).empty


def test_seeds_are_a_mean_and_a_band_as_far_as_all_of_them_go():
    never = Series([NONE] * 9, index=range(1, 10))
    both = curve([Series([0.2] * 6, index=range(1, 7)), Series([0.6] * 4, index=range(1, 5)), never])
    assert list(both.index) == [1, 2, 3, 4]
    assert both.loc[4].to_dict() == pytest.approx({"mean": 0.4, "low": 0.2, "high": 0.6})


def test_long_runs_are_thinned_without_picking_the_gaps():
    values = Series([NONE if step % 5 == 0 else step for step in range(1, 2002)], index=range(1, 2002))
    thin = thinned(curve([values]))
    assert 120 < len(thin) <= 240 and thin.index[-1] == 2001 and thin["raw"].notna().all()
    assert thinned(curve([values.head(3)])).index.tolist() == [1, 2, 3]


def test_lines_are_told_apart_without_colour_too():
    styles = [css_classes(place) for place in range(36)]
    assert len(set(styles)) == 36
    colours, dashes = zip(*(style.split() for style in styles[:6]), strict=True)
    assert len(set(colours)) == len(set(dashes)) == 6
    assert all(f".{name} " in css() for name in {*colours, *dashes} - {"dash-0"})


def drawn(values, summary="made up"):
    figure, axes = small_canvas("step")
    lines = [
        Line("a", 0, curve([Series(values, index=range(1, len(values) + 1))])),
        Line("b", 1, curve([Series([1.0] * 9), Series([3.0] * 9)])),
    ]
    draw_curves(axes, lines, value_range=(0, 4), alarm=0.5)
    return svg(figure, summary)


def test_an_svg_holds_what_a_strict_policy_allows():
    text = drawn([1.0, 2.0, *[NONE] * 8, 3.0], "<script> & \"quotes\" 'more'")
    assert not [word for word in ("style", "<script", "http", " id=", "url(", "xmlns", "#") if word in text]
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") == "<script> & \"quotes\" 'more'" and root.get("role") == "img"
    assert {element.tag for element in root.iter()} == {"svg", "g", "path", "text"}
    classes = [element.get("class") for element in root.iter() if element.get("class")]
    assert sorted(set(classes)) == ["band", "line", "raw"]
    assert {"var(--colour-0)", "var(--colour-1)", "var(--rule)", "var(--bad)"} <= {e.get("stroke") for e in root.iter()}
    (line, _) = [group.find("path").get("d") for group in root.iter("g") if group.get("class") == "line"]
    assert line.count("M") == 2 and line.endswith("h 0")  # a gap, and a dot behind it


def test_an_svg_shows_the_values():
    assert drawn([1.0, 2.0]) == drawn([1.0, 2.0]) != drawn([1.0, 3.0])


def test_frequent_points_are_larger():
    figure, axes = small_canvas("x")
    draw_counts(axes, {(0.0, 1.0): 1, (1.0, 2.0): 100}, [(0.0, 1.0), (1.0, 2.0)])
    (dots,) = [g for g in ElementTree.fromstring(svg(figure, "")).iter("g") if g.get("class") == "dots"]
    assert [float(path.get("stroke-width")) for path in dots.iter("path")] == [13.0, 4.0]


def test_a_png_shows_the_values():
    def picture(values):
        figure, axes = canvas(1, 1, size=(4, 3))
        draw_curves(axes[0, 0], [Line("a", 0, curve([Series(values)]))])
        return Image.open(io.BytesIO(png(figure))).convert("L")

    assert ImageChops.difference(picture([1.0, 2.0]), picture([2.0, 1.0])).getbbox()
    assert not ImageChops.difference(picture([1.0, 2.0]), picture([1.0, 2.0])).getbbox()


def test_a_run_without_a_step_has_no_plots(tmp_path):
    run = RunDir(tmp_path)
    assert write_plots(run) == [] and overview(run) is None
    append_jsonl(run.metrics, [{"step": 1, "reward": 1.0}])
    assert all(path.is_file() for path in write_plots(run)) and overview(run)


def test_what_is_measured_at_some_steps_has_its_interval_and_is_not_smoothed(tmp_path):
    run = RunDir(tmp_path)
    names = ("held_out_accuracy", "held_out_accuracy_low", "held_out_accuracy_high")
    append_jsonl(run.metrics, [{"step": step, "reward": 1.0} for step in (1, 2, 3)])
    steps = read_steps(run)
    assert figure_curve([steps], names[0]).empty and "held_out.png" not in {p.name for p in write_plots(run)}
    append_jsonl(run.metrics, [{"step": 4, "reward": 1.0, **dict(zip(names, (0.5, 0.3, 0.7), strict=True))}])
    append_jsonl(run.metrics, [{"step": 9, "reward": 1.0, **dict(zip(names, (0.8, 0.6, 0.9), strict=True))}])
    one = figure_curve([read_steps(run)], names[0])
    assert one.to_dict("index") == {
        4: {"mean": 0.5, "low": 0.3, "high": 0.7},
        9: {"mean": 0.8, "low": 0.6, "high": 0.9},
    }
    other = read_steps(run).assign(held_out_accuracy=lambda frame: frame["held_out_accuracy"] - 0.2)
    both = figure_curve([read_steps(run), other, steps], names[0])
    assert both.loc[9].to_dict() == pytest.approx({"mean": 0.7, "low": 0.6, "high": 0.8})
    assert run.plots / "held_out.png" in write_plots(run) and overview(run)
