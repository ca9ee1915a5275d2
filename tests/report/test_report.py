"""The HTML report: its figures by hand, its size, and that nothing in it leaves the page. The page itself is looked at
in test_report_browser.py."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from pandas import DataFrame
from PIL import Image
from report_runs import GROUP, answer_row, metrics_row, shown_sources, write_run

from apo_lora.apo import stcr_multipliers
from apo_lora.commands.main import main
from apo_lora.evaluation.gallery import MOST_BYTES
from apo_lora.report.charts import credit_seen, stcr_curve
from apo_lora.report.cost import cost, duration
from apo_lora.report.page import render
from apo_lora.report.runs import differences, grouped, prompt_groups, read_runs
from apo_lora.run.directory import RunDir
from apo_lora.run.files import append_jsonl
from apo_lora.run.learning_signal import SIGNAL_ALARM_STEPS, verdict


@pytest.fixture
def run_folder(tmp_path):
    return write_run(tmp_path / "run")


# --- figures ---------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path):
    folders = [
        write_run(tmp_path / "a", "train.seed=1"),
        write_run(tmp_path / "b", "train.seed=2"),
        write_run(tmp_path / "c", "apo.dads=null", "apo.stcr=null"),
    ]
    groups = grouped(read_runs(folders))
    assert [(group.label, len(group.runs)) for group in groups] == [("GRPO + DADS + STCR", 2), ("GRPO", 1)]
    assert groups[0].seeds == "1, 2"
    assert differences([group.recipe for group in groups]) == {
        "apo.dads": ["complement_exp", None],
        "apo.stcr": [1.01, None],
    }


def test_groups_of_one_method_are_named_by_what_differs(tmp_path):
    folders = [write_run(tmp_path / name, f"train.learning_rate={name}") for name in ("1e-3", "1e-4")]
    labels = [group.label for group in grouped(read_runs(folders))]
    assert labels == ["GRPO + DADS + STCR, learning_rate 0.001", "GRPO + DADS + STCR, learning_rate 0.0001"]


def test_the_drawn_multipliers_are_those_of_a_group(tmp_path):
    lengths, correct = torch.tensor([[100.0, 40.0, 100.0, 130.0, 2100.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    expected = stcr_multipliers(correct, lengths, 1.01)[0, 1:].tolist()
    drawn = dict(stcr_curve(1.01, -1000.0, 4000.0))
    assert min(drawn.values()) == 1.0 and max(drawn.values()) > 1.9
    assert [drawn[excess] for excess in (-50, 0, 50, 2000)][::3] == pytest.approx(expected[::3])


def test_credit_is_counted_per_group(run_folder):
    (run,) = read_runs([run_folder])
    seen = credit_seen(prompt_groups(run))
    assert seen.completions == 12 * 2 * GROUP
    assert dict(seen.weights) == {(0.25, 0.493): 48}  # two right of eight: 1 - exp(-e / 4)
    assert {excess: count for (excess, _), count in seen.multipliers.items()} == dict.fromkeys(range(0, 60, 10), 24)
    assert seen.amplified == 24 * 5 and 1.1 < seen.mean_multiplier < 1.3


def test_a_group_that_a_kill_cut_short_is_left_out(run_folder):
    (run,) = read_runs([run_folder])
    lines = run.folder.completions.read_text().splitlines(keepends=True)
    run.folder.completions.write_text("".join(lines[:-3]) + lines[-3][:50])
    assert len(list(prompt_groups(run))) == 23


@pytest.mark.parametrize(("zero", "level"), [(0.5, "enough"), (0.6, "gone")])
def test_the_verdict_follows_the_alarm(zero, level):
    steps = DataFrame({"zero_variance_groups": [zero] * 20, "all_right_groups": [zero] * 20}, index=range(1, 21))
    assert verdict(steps).level == level
    assert verdict(steps.head(SIGNAL_ALARM_STEPS - 1)).level == "enough"
    assert verdict(steps.head(0)).level == "unknown"


@pytest.mark.parametrize("pattern", ["0" * 30, "1" * 9 + "0" + "1" * 9, "0" * 5 + "1" * 10, "1" * 12 + "0" * 8])
def test_the_verdict_names_a_stretch_where_the_screen_warned(pattern):
    from apo_lora.run.callbacks import Screen

    screen, warnings = Screen(logging_steps=1000), []
    screen.bar = SimpleNamespace(write=lambda line: warnings.append(line) if "warning" in line else None)
    steps = [metrics_row(n, zero_variance_groups=float(flag)) for n, flag in enumerate(pattern, start=1)]
    for row in steps:
        screen.on_log(None, SimpleNamespace(global_step=row["step"], max_steps=999), None, logs=row)
    assert (verdict(DataFrame(steps).set_index("step")).level in ("gone", "came back")) == bool(warnings)


def test_time_is_shared_out_and_memory_is_the_highest(run_folder):
    (run,) = read_runs([run_folder])
    run.steps.loc[3, "peak_memory_bytes"] = 3 * 2**30
    spent = cost([run])
    assert [phase.share for phase in spent.phases] == [0.5, 0.0, 0.25, 0.25]
    assert (spent.seconds, spent.whole, spent.tokens_per_second) == (4.0, "48 s", 1000.0)
    assert spent.peak_memory == "3.00"
    run.environment["gpu"] = {"name": "some GPU", "memory_bytes": 8 * 2**30}
    assert cost([run]).peak_memory == "3.00 of 8.0"
    assert [duration(seconds) for seconds in (119, 600, 9000)] == ["119 s", "10 min", "2.5 h"]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_large_pictures_and_long_texts_stay_under_the_limit(tmp_path):
    folder = write_run(tmp_path / "run", answers=False)
    noise = Image.effect_noise((900, 600), 90)
    rows = []
    for row in range(150):
        noise.rotate(row).save(folder / "images" / f"{row}.jpg")
        rows += [
            answer_row(row + 10, model, model == "base", text="<é>" * 9000, images=[f"images/{row}.jpg"])
            for model in ("base", "tuned")
        ]
    append_jsonl(folder / "answers.jsonl", rows)
    html = render(read_runs([folder]))
    (items,) = shown_sources(html).values()
    assert 4_500_000 < len(html.encode()) < MOST_BYTES and 0 < len(items) < 150
    assert f"{len(items)} of 150 recorded answers are shown" in html


def test_without_held_out_answers_of_the_tuned_model_the_last_training_completions_are_shown(tmp_path):
    folder = write_run(tmp_path / "run", answers=False)
    note = "no held-out answers of the tuned model"
    for rows in ([], [answer_row(1, "base", False), answer_row(2, "base", True)]):
        append_jsonl(folder / "answers.jsonl", rows)
        html = render(read_runs([folder]))
        *held_out, training = shown_sources(html).values()
        assert [item.outcome for of_source in held_out for item in of_source] == ["wrong", "right"][: len(rows)]
        assert training[0].heading == "step 12, row 8" and note in html
        assert "rewards: accuracy 1, format 0.5 · advantage" in training[0].html and "in training" in training[0].html
    append_jsonl(folder / "answers.jsonl", [answer_row(1, "tuned", True)])
    assert note not in render(read_runs([folder]))


def test_later_evaluations_and_other_runs_are_sources_of_their_own(tmp_path):
    folders = [write_run(tmp_path / name, f"train.seed={name}") for name in "12"]
    (folders[0] / "evaluations" / "puzzles").mkdir(parents=True)
    append_jsonl(folders[0] / "evaluations" / "puzzles" / "answers.jsonl", [answer_row(1, "tuned", True)])
    alone = shown_sources(render(read_runs(folders[:1])))
    assert list(alone) == ["before and after training", "evaluation puzzles"]
    assert list(shown_sources(render(read_runs(folders)))) == ["1", "1, evaluation puzzles", "2"]


# --- page ------------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_asks_the_network_for_nothing(tmp_path):
    html = render(read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", "apo.dads=null")]))
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html
    links = [v for _, attributes in Elements(html).found for k, v in attributes.items() if k in ("src", "href")]
    assert links and all(link.startswith(("#", "data:")) for link in links)


def test_only_our_own_script_and_style_may_run(run_folder):
    html = render(read_runs([run_folder]))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for element in ("style", "script"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in policy


def test_what_a_model_or_a_user_wrote_opens_no_element(tmp_path):
    name = "<script>alert(1)<!--"
    folder = write_run(tmp_path / name, f"data.instruction={json.dumps(name)}")
    html = render(read_runs([folder]))
    tags = [tag for tag, _ in Elements(html).found]
    assert tags.count("script") == 1 and "img" not in tags
    assert "&lt;script&gt;window.hacked" in html  # it is there, as text


def test_headings_go_down_one_by_one(tmp_path):
    html = render(read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", "apo.dads=null")]))
    levels = [int(tag[1]) for tag, _ in Elements(html).found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


def test_what_is_off_is_said_to_be_off(tmp_path):
    html = render(read_runs([write_run(tmp_path / "run", "apo.dads=null", "apo.stcr=null")]))
    assert html.count("off in this recipe") == 2 and "KL weight by group accuracy" not in html
    assert "KL weight by group accuracy" in render(read_runs([write_run(tmp_path / "other")]))


@pytest.mark.parametrize("state", ["cut", "one step", "no step", "bare"])
def test_a_run_that_is_not_whole_has_a_page(run_folder, state):
    run = RunDir(run_folder)
    if state == "cut":
        for path in (run.metrics, run.completions, run_folder / "answers.jsonl"):
            path.write_text(path.read_text()[:-40])
    if state == "one step":
        run.metrics.write_text(json.dumps(metrics_row(1, kl=float("nan"), length_correct=None)) + "\n")
    if state == "no step":
        run.metrics.unlink()
    if state == "bare":
        for path in (run.metrics, run.completions, run.evaluation, run.environment, run_folder / "answers.jsonl"):
            path.unlink()
        run.adapter.rmdir()
    html = render(read_runs([run_folder]))
    assert ("No step has been recorded" in html) == (state in ("no step", "bare"))
    assert ("still running, or stopped" in html) == (state == "bare")
    assert len(next(iter(shown_sources(html).values()))) == (0 if state == "bare" else 40)


# --- verb ------------------------------------------------------------------------------------------------------------


def test_one_run_gets_its_page_and_several_share_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_run(tmp_path / name, "train.seed=1")
    assert main(["report", "a"]) == 0 and (tmp_path / "a" / "report.html").is_file()
    assert main(["report", "a", "b"]) == 0 and (tmp_path / "report.html").is_file()
    assert main(["report", "a", "b", "--out", "here/both.html"]) == 0 and (tmp_path / "here" / "both.html").is_file()
    assert "here/both.html" in capsys.readouterr().out
    assert main(["report", "a"]) == 0  # again: a report replaces a report


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no such folder"),
        (["empty"], "not a run directory"),
        (["run", "run/"], "given twice"),
        (["run", "--out", "run/metrics.jsonl"], "must end in .html"),
        (["run", "--out", "own.html"], "not a report"),
        (["broken"], "unknown key"),
        (["odd"], "answers.jsonl line 1: no correct"),
    ],
)
def test_bad_use_is_one_line_and_nothing_is_written(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "own.html").write_text("<p>mine")
    (write_run(tmp_path / "broken") / "recipe.yaml").write_text("data: {train: boards}\ntrain: {stpes: 3}\n")
    (write_run(tmp_path / "odd") / "answers.jsonl").write_text('{"set": "a", "model": "base", "row": 1, "text": "b"}\n')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_interrupted_report_leaves_the_earlier_one(run_folder, monkeypatch):
    target = run_folder / "report.html"
    main(["report", str(run_folder)])
    earlier = target.read_bytes()
    (run_folder / "metrics.jsonl").unlink()

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    assert main(["report", str(run_folder)]) == 130
    assert target.read_bytes() == earlier


@pytest.mark.parametrize(("with_completions", "loaded"), [(False, []), (True, ["torch"])])
def test_torch_is_loaded_for_the_formulas_alone(with_completions, loaded, tmp_path):
    folder = write_run(tmp_path / "run")
    if not with_completions:
        RunDir(folder).completions.unlink()
    code = (
        "import sys; from apo_lora.commands.main import main; main(sys.argv[1:])\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    out = subprocess.check_output([sys.executable, "-c", code, "report", str(folder)], text=True)
    assert out.splitlines()[-1] == str(loaded)
