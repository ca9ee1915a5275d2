"""`apo-lora eval` on the embedded base with an adapter that changes it: what it leaves, resumes, refuses."""

import json
import shutil
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from stirred_adapters import stirred_run
from unsloth_on_cpu import run_script

from apo_lora.commands.main import main
from apo_lora.evaluation import answering
from apo_lora.evaluation.evaluate import default_name, title_of
from apo_lora.evaluation.folder import EvaluationBatch, planned
from apo_lora.evaluation.measure import EntropyRecorder, measure
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl

OVERRIDES = ("data.eval_limit=5", "data.general=null", "grpo.max_completion_length=12")


@pytest.fixture(scope="session")
def made_run(tmp_path_factory):
    return stirred_run(tmp_path_factory.mktemp("evaluated") / "run", OVERRIDES, scale=0.05)


@pytest.fixture
def run(made_run, tmp_path):
    shutil.copytree(made_run.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def evaluate(run, *arguments):
    return main(["eval", str(run.path), "--batch-size", "3", *arguments])


def answers(run, name="held_out"):
    return list(read_jsonl(run.evaluations / name / "answers.jsonl"))


def count_batches(monkeypatch):
    """The batches that are answered from here on."""
    asked = []

    def counted(batch, *arguments):
        asked.append(batch)
        return answered(batch, *arguments)

    answered = answering._answered
    monkeypatch.setattr(answering, "_answered", counted)
    return asked


def test_an_evaluation_is_a_record(run, capsys):
    assert evaluate(run, "--samples", "2") == 0
    rows = answers(run)
    keys = [(row["set"], row["model"], row["row"], row["sample"]) for row in rows]
    assert len(set(keys)) == len(keys) == 2 * 5 * 3
    assert {row["greedy"] for row in rows if row["sample"] == 0} == {True}
    for row in rows:
        assert row["text"] and row["gold"] and 1 <= row["length"] <= 12 and row["entropy"] >= 0
        assert all((run.path / image).is_file() for image in row["images"]) and row["images"]
    greedy = {model: [r["text"] for r in rows if r["model"] == model and r["greedy"]] for model in ("base", "tuned")}
    assert greedy["base"] != greedy["tuned"]
    samples = [[r["text"] for r in rows if r["model"] == "base" and r["sample"] == s] for s in (1, 2)]
    assert samples[0] != samples[1]
    figures = json.loads((run.evaluations / "held_out/eval.json").read_text())
    assert {"sets", "base", "tuned", "difference", "settings"} == figures.keys()
    assert figures["base"]["reasoning"]["items"] == 5 and set(figures["tuned"]["reasoning"]["pass_at_k"]) == {"1", "2"}
    shown = capsys.readouterr().out
    assert "sign test p" in shown and "gallery.html" in shown and "pass@k" in shown
    assert (run.evaluations / "held_out/gallery.html").read_text().count("<article") == 5


def test_the_best_adapter_of_a_run_is_evaluated_by_its_path(run):
    run.adapter.rename(run.adapter_best)
    assert main(["eval", str(run.adapter_best), "--limit", "3"]) == 0
    rows = answers(run, "held_out-adapter-best")
    base, tuned = ([row["text"] for row in rows if row["model"] == model] for model in ("base", "tuned"))
    assert len(base) == len(tuned) == 3 and base != tuned


def test_the_base_is_the_model_without_its_adapter(run, load_tiny):
    assert evaluate(run) == 0
    recipe = load_recipe(run.recipe)
    from apo_lora.data.examples import load_examples

    examples = load_examples("boards", recipe.data, split="test", limit=5).examples
    plain = load_tiny(seed=9)  # a fresh adapter adds nothing
    alone = measure(plain, examples, recipe, lambda texts, *_: [0.0] * len(texts), seed=0, greedy=True, batch_size=3)
    rows = answers(run)
    assert [row["text"] for row in rows if row["model"] == "base"] == [answer.text for answer in alone]


def test_a_killed_evaluation_goes_on_to_the_same_answers(run, tmp_path, monkeypatch):
    whole = RunDir(tmp_path / "whole")
    shutil.copytree(run.path, whole.path)
    assert evaluate(whole, "--samples", "1") == 0
    path = run.evaluations / "held_out/answers.jsonl"
    expected = (whole.evaluations / "held_out/answers.jsonl").read_text()

    assert evaluate(run, "--samples", "1") == 0
    lines = path.read_text().splitlines(keepends=True)
    for cut in ("".join(lines[:7]), "".join(lines[:8]) + lines[8][:40], lines[0][:9]):
        path.write_text(cut)  # inside a batch; with half a line; with nothing whole
        with monkeypatch.context() as patch:
            asked = count_batches(patch)
            assert evaluate(run, "--samples", "1") == 0
        assert path.read_text() == expected
        assert len(asked) == 8 - len(cut.splitlines()) // 5 * 2 - (len(cut.splitlines()) % 5 >= 3)
    with monkeypatch.context() as patch:
        asked = count_batches(patch)
        assert evaluate(run, "--samples", "1") == 0 and not asked
    monkeypatch.setattr(
        EvaluationBatch, "seed", lambda batch, seed: 7
    )  # and it is the batches' seeds that make them the same
    assert evaluate(run, "--samples", "1", "--name", "other") == 0
    same = [row["text"] == other["text"] for row, other in zip(answers(run), answers(run, "other"), strict=True)]
    sampled = [row["sample"] == 1 for row in answers(run)]
    assert not all(same) and all(s or is_sampled for s, is_sampled in zip(same, sampled, strict=True))


@pytest.mark.matrix
def test_a_real_kill(run, tmp_path):
    """SIGKILL at any moment; the same command then ends as the one that was never stopped."""
    command = [sys.executable, "-m", "apo_lora.commands.main", "eval", "--batch-size", "4", "--samples", "2",
               "--data", "boards", "--limit", "40"]  # fmt: skip
    whole = RunDir(tmp_path / "whole")
    shutil.copytree(run.path, whole.path)
    assert subprocess.run([*command, whole.path], capture_output=True).returncode == 0
    path = run.evaluations / "boards/answers.jsonl"
    process = subprocess.Popen([*command, run.path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (path.is_file() and path.read_text().count("\n") >= 30):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert path.read_text().count("\n") < 240
    finished = subprocess.run([*command, run.path], capture_output=True, text=True)
    assert finished.returncode == 0 and "answers are already recorded" in finished.stdout
    assert path.read_text() == (whole.evaluations / "boards/answers.jsonl").read_text()


def test_ctrl_c_keeps_what_was_answered(run, monkeypatch, capsys):
    answered = answering._answered

    def interrupted(batch, *arguments):
        if batch.model == "tuned":
            raise KeyboardInterrupt
        return answered(batch, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(answering, "_answered", interrupted)
        assert evaluate(run) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert len(answers(run)) == 5
    assert evaluate(run) == 0 and len(answers(run)) == 10


def test_other_settings_do_not_mix(run, capsys):
    assert evaluate(run) == 0
    before = answers(run)
    for changed, words in (
        (["--samples", "1"], "samples: 0 before, 1 now"),
        (["--limit", "4"], "sets.reasoning.items: 5 before, 4 now"),
        (["--set", "grpo.temperature=0.5"], "recipe.grpo.temperature: 1.0 before, 0.5 now"),
        (["--batch-size", "2"], "batch_size: 3 before, 2 now"),
    ):
        capsys.readouterr()
        assert evaluate(run, *changed) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in error and "--name" in error
        assert answers(run) == before
    assert evaluate(run, "--limit", "4", "--name", "four") == 0
    assert len(answers(run, "four")) == 8 and answers(run) == before
    weights = run.adapter / "adapter_model.safetensors"  # as after training on
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert evaluate(run) == 2 and "tuned.adapter" in capsys.readouterr().err


def test_the_base_first_and_the_tuned_model_later(run, monkeypatch, capsys):
    adapter = run.path / "elsewhere"
    run.adapter.rename(adapter)  # training is not finished yet
    assert evaluate(run) == 2 and "no adapter yet" in capsys.readouterr().err
    assert evaluate(run, "--base") == 0
    shown = capsys.readouterr().out
    assert "base" in shown and "difference" not in shown and {row["model"] for row in answers(run)} == {"base"}
    adapter.rename(run.adapter)
    asked = count_batches(monkeypatch)
    assert evaluate(run) == 0
    assert {batch.model for batch in asked} == {"tuned"} and "difference" in capsys.readouterr().out
    assert evaluate(run, "--base") == 0  # and the tuned answers stay
    assert {row["model"] for row in answers(run)} == {"base", "tuned"}


def test_data_of_ones_own(run, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (84, 84), "red").save(tmp_path / "red.png")
    rows = [{"question": f"How many of {n}?", "answer": str(n), "image": "red.png"} for n in range(4)]
    rows.append({"question": "How many?", "answer": "1", "image": "gone.png"})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(run, "--data", str(tmp_path / "own.jsonl"), "--set", "data.problem_column=question") == 0
    assert "1 dropped (1 image missing: row 5)" in capsys.readouterr().out
    assert {row["images"][0] for row in answers(run, "own")} == {str(tmp_path / "red.png")}
    figures = json.loads((run.evaluations / "own/eval.json").read_text())
    assert figures["sets"]["own"]["dropped"] == {"image missing": 1} and figures["sets"]["own"]["rows"] == 5


def test_pictures_are_copied_small_and_damaged_ones_left_out(run, tmp_path, capsys):
    import io

    import pandas
    from PIL import Image

    def png(size):
        stream = io.BytesIO()
        Image.effect_noise(size, 50).save(stream, "PNG")
        return stream.getvalue()

    pictures = [png((1600, 900)), png((84, 84)), png((84, 84))[:-2000]]  # the last one has its header still
    table = pandas.DataFrame({"problem": ["How many?"] * 3, "answer": ["1"] * 3, "image": pictures})
    table.to_parquet(tmp_path / "own.parquet")
    assert evaluate(run, "--data", str(tmp_path / "own.parquet"), "--set", "data.max_pixels=50176") == 0
    assert "1 dropped (1 image unreadable: row 3)" in capsys.readouterr().out
    sizes = []
    for row in answers(run, "own")[:2]:
        with Image.open(run.path / row["images"][0]) as picture:
            sizes.append((picture.format, picture.size))
    assert sizes == [("WEBP", (768, 432)), ("WEBP", (84, 84))]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "train.seed=3"], "only keys in model, data, rewards, grpo can be changed"),
        (["--set", "grpo.temprature=3"], "did you mean grpo.temperature?"),
        (["--recipe", "nowhere"], "no such file"),
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--data", "boards", "--data", "boards"], "one at a time"),
        (["--model", "nowhere"], "not an exported model"),
        (["--name", "../out"], "is not a valid folder name"),
        (["--samples", "0"], "is not a valid number of samples"),
        (["--base", "--model", "x"], "not allowed with"),
        (["--set", "data.eval=null"], "name some with --data"),
    ],
)
def test_bad_use_is_one_line_and_writes_nothing(run, arguments, words, capsys):
    try:
        code = evaluate(run, *arguments)
    except SystemExit as exit:  # argparse
        code = exit.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and words in error and len(error.splitlines()) == 1, error
    assert not run.evaluations.exists()


def test_no_run_is_one_line(tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2 and "not a run directory" in capsys.readouterr().err


def test_titles_and_names():
    assert title_of("mathvista:some/file.parquet") == "mathvista" and title_of("ORG/Some Data:x") == "ORG-Some-Data-x"
    assert default_name(None, (), None) == "held_out" and default_name(None, ("mmmu", "mmstar"), None) == "mmmu-mmstar"
    assert default_name("recipes/eval_view_r1.yaml", (), None) == "eval_view_r1"
    assert default_name("recipes/eval_view_r1.yaml", (), Path("runs/x/merged")) == "eval_view_r1-merged"


def test_batches_have_seeds_of_their_own_and_both_models_the_same(load_tiny):
    from apo_lora.data.examples import load_examples

    examples = load_examples("boards", load_recipe(find_recipe("tiny_cpu")).data, split="test", limit=5).examples
    plan = planned({"a": examples, "b": examples}, samples=2, batch_size=2)
    seeds = {model: [batch.seed(0) for batch in plan if batch.model == model] for model in ("base", "tuned")}
    assert seeds["base"] == seeds["tuned"] and len(set(seeds["base"])) == len(seeds["base"]) == 2 * 3 * 3
    assert plan[0].seed(0) != plan[0].seed(1)


def test_entropy_is_that_of_the_models_own_distribution(tiny_policy, stir_adapter):
    """Against a plain forward pass over prompt and completion; temperature does not count."""
    from apo_lora.data.examples import load_examples
    from apo_lora.rollout.sampling import generation_options, prompt_inputs

    stir_adapter(tiny_policy.model, scale=0.05)
    recipe = load_recipe(find_recipe("tiny_cpu"), ["grpo.temperature=0.5", "grpo.max_completion_length=20"])
    example = load_examples("boards", recipe.data, split="test", limit=1).examples
    inputs = prompt_inputs(tiny_policy, example, recipe)
    recorder = EntropyRecorder()
    torch.manual_seed(0)
    options = generation_options(tiny_policy, recipe)
    ids = tiny_policy.model.eval().generate(**inputs, **options, logits_processor=[recorder])
    start = inputs["input_ids"].shape[1]
    length = ids.shape[1] - start
    types = inputs["mm_token_type_ids"]
    inputs |= {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.nn.functional.pad(types, (0, length)),
    }
    with torch.no_grad():
        logits = tiny_policy.model(**inputs).logits[0, start - 1 : -1].float()
    logits[:, tiny_policy.never_sampled] = -torch.inf
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    assert recorder.means([length])[0] == pytest.approx(entropies.mean().item(), rel=1e-4)
    cooler = torch.distributions.Categorical(logits=logits / 0.5).entropy()
    assert cooler.mean().item() != pytest.approx(entropies.mean().item(), rel=0.05)
    assert recorder.means([1])[0] == pytest.approx(entropies[0].item(), rel=1e-3)


def test_an_export_in_place_of_the_adapter(run, capsys):
    """The merged model answers as the adapter does, and is paired with the base."""
    assert main(["export", str(run.path), "--to", "merged"]) == 0
    assert evaluate(run) == 0
    assert evaluate(run, "--model", str(run.path / "merged")) == 0
    of_adapter, of_export = answers(run), answers(run, "held_out-merged")
    texts = [[row["text"] for row in rows if row["model"] == "tuned"] for rows in (of_adapter, of_export)]
    base = [[row["text"] for row in rows if row["model"] == "base"] for rows in (of_adapter, of_export)]
    assert texts[0] == texts[1] and base[0] == base[1] and base[0] != texts[0]
    assert "sign test p" in capsys.readouterr().out


def test_the_base_is_gone_before_an_export_is_loaded(monkeypatch):
    """Two models of three billion parameters would not fit."""
    loaded = []

    class Model:
        summary, model = "a model", None

    def load(model, *arguments, **options):
        assert not [name for name, reference in loaded if reference() is not None]
        policy = Model()
        loaded.append((model.name, weakref.ref(policy)))
        return policy

    monkeypatch.setattr(answering, "load_policy", load)
    monkeypatch.setattr(answering, "reference_mode", lambda model: nullcontext())
    recipe = load_recipe(find_recipe("tiny_cpu"), ["model.load_in_4bit=true"])
    models = answering.policies(recipe, None, Path("an/export"), {"base", "tuned"})
    answering.answer([], [], models, recipe, None, None, None)
    assert [name for name, _ in loaded] == ["tiny", "an/export"]


@pytest.mark.slow
def test_unsloths_generate_gives_the_same_answers_and_entropies(run, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("Unsloth on a CPU is for hosts without a GPU")
    arguments = [str(run.path), "--batch-size", "3", "--name", "unsloth"]
    finished = run_script(PROJECT / "tests" / "support" / "unsloth_eval.py", *arguments, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "through unsloth" in finished.stdout
    assert evaluate(run) == 0
    plain, unsloth = answers(run), answers(run, "unsloth")
    assert [row["text"] for row in plain] == [row["text"] for row in unsloth]
    assert [row["entropy"] for row in plain] == pytest.approx([row["entropy"] for row in unsloth], rel=1e-3)
