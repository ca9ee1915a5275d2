"""Runs that start from an adapter: their record, their checkpoints, what follows them, and the trainer on its own."""

import json
import shutil

import pytest
import torch
from conftest import load_base
from safetensors.torch import load_file, save_file
from stirred_adapters import stir, stirred_run
from tiny_trainer import logged, recipe_of

from apo_lora.commands.main import main
from apo_lora.data.examples import load_examples
from apo_lora.evaluation.figures import paired
from apo_lora.evaluation.measure import measure
from apo_lora.policy.loading import reference_mode
from apo_lora.policy.scoring import token_logps
from apo_lora.policy.tuned import load_tuned
from apo_lora.recipe.files import load_recipe
from apo_lora.run.adapter import WEIGHTS, find_adapter
from apo_lora.run.directory import RunDir
from apo_lora.run.files import read_jsonl

OPTIONS = [
    "grpo.prompts_per_step=2", "grpo.num_generations=4", "grpo.completions_per_pass=8", "grpo.reference=start",
    "grpo.max_completion_length=24", "train.save_steps=2", "train.learning_rate=1e-3", "data.limit=16",
    "data.eval_limit=2", "data.general=null", "train.preflight=false", "lora.r=4", "lora.alpha=8",
]  # fmt: skip


def train(start, folder, *overrides, resume=False):
    words = [*OPTIONS, *overrides, f"lora.start={start}", f"output.dir={folder}"]
    return main(["train", "--recipe", "tiny_cpu", *words, *(["--resume", "auto"] if resume else [])])


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """A run that others start from; its adapter changes the model a little."""
    return stirred_run(tmp_path_factory.mktemp("start") / "supervised", ["lora.r=4", "lora.alpha=8"], scale=0.02).path


@pytest.fixture(scope="module")
def by_place(tmp_path_factory):
    """A reward that varies in every group."""
    file = tmp_path_factory.mktemp("reward") / "mine.py"
    file.write_text("def by_place(completions, **columns):\n    return [n % 2 for n in range(len(completions))]\n")
    return f"rewards.functions=[accuracy,'{file}:by_place']"


@pytest.fixture(scope="module")
def finished(supervised, by_place, tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("finished") / "run")
    assert train(supervised, run.path, by_place, "train.max_steps=4") == 0
    return run


def kl_of(run):
    return [row["kl"] for row in read_jsonl(run.metrics)]


def test_kl_starts_at_0_from_the_start_and_not_from_the_base(finished, supervised, by_place, tmp_path):
    short = ["train.max_steps=1", "train.evaluate=false"]
    assert train(supervised, tmp_path / "base", by_place, *short, "grpo.reference=base") == 0
    assert kl_of(RunDir(tmp_path / "base"))[0] > 1e-4
    assert kl_of(finished)[0] == 0.0 < min(kl_of(finished)[1:])


def test_the_record_says_what_the_run_started_from(finished, supervised):
    record = json.loads(finished.inputs.read_text())["start"]
    assert record["name"] == str(supervised) and len(record["sha256"]) == 64
    card, _, recipe = finished.model_card.read_text().partition("## Recipe")
    assert f"from the adapter `supervised` (SHA-256 {record['sha256']})" in card and "KL divergence is to that" in card
    assert str(supervised) in recipe and str(supervised) not in card
    answers = list(read_jsonl(finished.answers))
    assert [row["model"] for row in answers] == ["start"] * 2 + ["tuned"] * 2
    assert all(pair.base["model"] == "start" and pair.tuned for pair in paired(answers))


def test_before_is_measured_with_the_adapter(finished, supervised):
    source = find_adapter(supervised)
    policy, recipe = load_tuned(source, source.recipe), load_recipe(finished.recipe)
    examples = load_examples("boards", recipe.data, split="test", limit=2).examples

    def measured():
        return [(one.text, one.entropy) for one in measure(policy, examples, recipe, lambda *a: [0.0] * 2, seed=seed)]

    seed = recipe.train.seed
    recorded = [(row["text"], row["entropy"]) for row in read_jsonl(finished.answers) if row["model"] == "start"]
    assert recorded == measured()
    with reference_mode(policy.model):
        assert recorded != measured()


def test_a_resumed_run_ends_as_the_uninterrupted_one(finished, supervised, by_place, tmp_path):
    run = RunDir(tmp_path / "run")
    assert train(supervised, run.path, by_place, "train.max_steps=2") == 0
    assert train(supervised, run.path, by_place, "train.max_steps=4", resume=True) == 0
    ended = [load_file(each.adapter / WEIGHTS) for each in (run, finished)]
    assert ended[0].keys() == ended[1].keys() and all(torch.equal(ended[0][key], ended[1][key]) for key in ended[0])
    assert kl_of(run) == kl_of(finished)
    assert not list(run.path.rglob("*reference*"))  # one adapter, in checkpoints too


def test_another_start_is_refused_on_resume(finished, supervised, by_place, tmp_path, capsys):
    run, start = tmp_path / "run", tmp_path / "start"
    shutil.copytree(supervised, start)
    assert train(start, run, by_place, "train.max_steps=2", "train.evaluate=false") == 0
    weights = load_file(start / "adapter" / WEIGHTS)
    save_file({key: 2 * weight for key, weight in weights.items()}, start / "adapter" / WEIGHTS)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(start, run, by_place, "train.max_steps=4", "train.evaluate=false", resume=True) == 2
    assert f"lora.start: the adapter {start} is not the one that the run started from" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_comes_of_it_is_a_run_like_any_other(finished, make_batch):
    """Its adapter holds the start and what was learned, and its base is the base."""
    source, fresh = find_adapter(finished.path), load_base("tiny")
    policy, batch = load_tuned(source, source.recipe), make_batch(fresh)
    with torch.no_grad(), reference_mode(policy.model):
        base = [token_logps(model, batch)[0] for model in (policy.model, fresh.model)]
    assert list(policy.model.peft_config) == ["default"] and torch.equal(*base)


@pytest.fixture
def load_tiny():
    """For make_trainer: a policy whose adapter was trained before."""

    def load(**options):
        policy = load_base("tiny", **options)
        stir(policy.model, scale=0.02)
        return policy

    return load


def test_the_trainer_on_its_own_keeps_the_adapter_as_it_was_given(make_trainer):
    """APOConfig(reference="start") on a PeftModel that was trained before."""
    kl = {}
    for reference in ("base", "start"):
        trainer = make_trainer(recipe_of(lora={"start": "given"}, grpo={"reference": reference}))
        trainer.train()
        kl[reference] = [log["kl"] for log in logged(trainer)]
    assert kl["base"][0] > 1e-4 and kl["start"][0] == 0.0 < kl["start"][1]
