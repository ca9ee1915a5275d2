"""Training that starts from an adapter: where that comes from, what the reference is, what is refused in one line."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stirred_adapters import stir
from unsloth_on_cpu import run_script

from apo_lora.errors import ModelError, RecipeError, UserError
from apo_lora.family.lookup import find_shape
from apo_lora.policy.loading import REFERENCE, reference_mode, set_reference
from apo_lora.policy.scoring import token_logps
from apo_lora.policy.tuned import load_start
from apo_lora.preflight.checks import check_reference, check_start
from apo_lora.preflight.memory_plan import plan
from apo_lora.recipe.schema import Recipe
from apo_lora.run.adapter import CONFIG, WEIGHTS
from apo_lora.run.start import with_start
from apo_lora.tiny import BASE_DIR

SUPPORT = Path(__file__).parents[1] / "support"
UNSLOTH, SWIFT = SUPPORT / "unsloth_start.py", SUPPORT / "ms_swift_adapter"


def recipe_of(start, reference="base", lora=None, **model):
    tree = {"lora": {**(lora or {}), "start": str(start)}, "data": {"train": "boards"}, "model": model}
    return Recipe.model_validate({**tree, "grpo": {"reference": reference}})


def started(start, reference="base", **options):
    return load_start(with_start(recipe_of(start, reference, **options)))


@torch.no_grad()
def scores(policy, batch):
    return token_logps(policy.model.eval(), batch)[0]


def reference_scores(policy, batch):
    with reference_mode(policy.model.eval()):
        return token_logps(policy.model, batch)[0]


def plain_base(base=BASE_DIR):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)


def trained_by_peft(folder, base=BASE_DIR, **options):
    """PEFT's own model with an adapter that changes it, saved."""
    from peft import LoraConfig, get_peft_model

    shape = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "o_proj"], "lora_dropout": 0.1}
    model = get_peft_model(plain_base(base), LoraConfig(task_type="CAUSAL_LM", **shape | options))
    stir(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return trained_by_peft(tmp_path_factory.mktemp("adapters") / "peft")


@pytest.fixture
def copied(adapter, tmp_path):
    return Path(shutil.copytree(adapter, tmp_path / "copied"))


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


# --- the reference ---------------------------------------------------------------------------------------------------


def trained_names(policy):
    return [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]


def test_the_reference_is_the_base_or_the_start(adapter, make_batch, load_tiny):
    """At step 0 the policy is away from the base and exactly at the start; later neither reference has moved."""
    policy = started(adapter)
    batch = make_batch(policy)
    base, start, trained = scores(load_tiny(), batch), scores(policy, batch), trained_names(policy)
    assert (base - start).abs().max() > 0.1 and torch.equal(reference_scores(policy, batch), base)

    state = torch.get_rng_state()
    set_reference(policy.model, "start")
    assert torch.equal(state, torch.get_rng_state()) and trained_names(policy) == trained
    assert torch.equal(reference_scores(policy, batch), start) and torch.equal(scores(policy, batch), start)

    with torch.no_grad():  # as if it had trained
        for name, parameter in policy.model.named_parameters():
            if name in trained:
                parameter.mul_(1.5)
    assert not torch.allclose(scores(policy, batch), start, atol=1e-2) and trained_names(policy) == trained
    assert torch.equal(reference_scores(policy, batch), start)
    set_reference(policy.model, "base")
    assert torch.equal(reference_scores(policy, batch), base)


def test_an_adapter_that_the_user_calls_reference_is_kept(adapter, tmp_path):
    policy = started(adapter)
    policy.model.add_adapter("reference", policy.model.peft_config["default"])
    stir(policy.model, seed=1)

    def own_weights():
        return {name: p.clone() for name, p in policy.model.named_parameters() if ".reference." in name}

    before = own_weights()
    for which in ("start", "base", "start"):
        set_reference(policy.model, which)
        after = own_weights()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    policy.model.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()] == ["reference"]


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_what_is_trained_and_saved_is_one_adapter(adapter, tmp_path, load_in_4bit):
    policy = started(adapter, "start", load_in_4bit=load_in_4bit)
    names, trained = [name for name, _ in policy.model.named_parameters()], trained_names(policy)
    of_reference = [name for name in names if f".{REFERENCE}." in name]
    assert len(of_reference) == len(trained) > 0 and all(".default." in name for name in trained)
    policy.model.save_pretrained(tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "saved" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_preflight_measures_the_distance_that_there_should_be(adapter, make_batch, load_tiny):
    at_start, at_base, fresh = started(adapter, "start"), started(adapter), load_tiny()
    batch = make_batch(fresh)
    assert [check_reference(policy.eval() and each, batch).ok for each in (at_start, at_base, fresh)
            for policy in [each.model]] == [True, False, True]  # fmt: skip
    assert check_start(at_base, batch).ok and not check_start(fresh, batch).ok


def test_the_plan_counts_the_reference(adapter):
    rows = {
        reference: {row.part: row.bytes for row in plan(find_shape("tiny"), recipe).rows}
        for reference in ("base", "start")
        for recipe in [with_start(recipe_of(adapter, reference))]
    }
    held = sum(p.nbytes for name, p in started(adapter, "start").model.named_parameters() if f".{REFERENCE}." in name)
    assert rows["start"].pop("LoRA of the reference") == held and rows["start"] == rows["base"]


# --- who made the adapter --------------------------------------------------------------------------------------------


def by_trl(folder):
    """Two supervised steps of TRL's own trainer, by the loss of transformers: TRL's is a kernel for GPUs."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoProcessor, Trainer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(str(folder), max_steps=2, learning_rate=0.1, use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(
        plain_base(), arguments, train_dataset=Dataset.from_dict({"text": ["three red circles"] * 8}),
        processing_class=AutoProcessor.from_pretrained(BASE_DIR).tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.compute_loss = partial(Trainer.compute_loss, trainer)
    trainer.train()
    trainer.save_model()


def by_swift(folder):
    """Two steps of `swift sft` (ms-swift 4.6.0 with PEFT 0.20.0, which cannot be installed beside ours) on all linear
    layers; here its base is at a path of the training machine. Its args.json and README are left out.
    """
    shutil.copytree(SWIFT, folder, dirs_exist_ok=True)


def by_transformers_4(folder):
    """Under the names of before transformers 4.52, with an adapted vision tower."""
    trained_by_peft(folder, target_modules=r".*(language_model.*\.q_proj|visual\.blocks.*\.qkv)")

    def older(key):
        return key.replace(".model.language_model.", ".model.").replace(".model.model.visual.", ".model.visual.")

    edit_weights(folder, lambda weights: {older(key): weight for key, weight in weights.items()})
    starts = {key.rpartition(".layers.")[0] or key.partition(".blocks.")[0] for key in load_file(folder / WEIGHTS)}
    assert starts == {"base_model.model.model", "base_model.model.visual"}


MAKERS = {
    "PEFT": trained_by_peft,
    "PEFT, by names that the tower has too": lambda folder: trained_by_peft(folder, target_modules=["down_proj"]),
    "PEFT, rank-stabilised": lambda folder: trained_by_peft(folder, use_rslora=True),
    "PEFT, in 16 bits": lambda folder: edit_weights(
        trained_by_peft(folder), lambda weights: {key: weight.bfloat16() for key, weight in weights.items()}
    ),
    "TRL": by_trl,
    "ms-swift": by_swift,
    "transformers 4": by_transformers_4,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_every_weight_of_the_file_is_in_the_model(maker, tmp_path, make_batch):
    MAKERS[maker](tmp_path)
    policy = started(tmp_path, "start")
    loaded = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in policy.model.named_parameters()
        if parameter.requires_grad
    }
    family, weights = policy.family, load_file(tmp_path / WEIGHTS)
    expected = {family.module_name(key.removeprefix("base_model.model.")): w for key, w in weights.items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], weight.float()) for name, weight in expected.items())
    batch = make_batch(policy)
    assert torch.equal(own := scores(policy, batch), reference_scores(policy, batch))
    set_reference(policy.model, "base")
    assert (own - reference_scores(policy, batch)).abs().max() > 1e-2
    config = json.loads((tmp_path / CONFIG).read_text())
    adapted = [module for module in policy.model.modules() if isinstance(getattr(module, "scaling", None), dict)]
    scaling = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    assert all(module.scaling == {"default": scaling} for module in adapted)


def test_the_family_is_that_of_the_base_and_not_of_a_name_elsewhere(small_qwen3_vl, tmp_path, make_batch):
    trained_by_peft(tmp_path, small_qwen3_vl)
    edit_config(tmp_path, base_model_name_or_path="/data/some/model")
    policy = started(tmp_path, "start", name=small_qwen3_vl)
    assert len(trained_names(policy)) == len(load_file(tmp_path / WEIGHTS))
    batch = make_batch(policy)
    assert torch.equal(scores(policy, batch), reference_scores(policy, batch))


@pytest.mark.slow
def test_unsloth_starts_where_unsloth_ended(tmp_path):
    """A supervised adapter of Unsloth's, trained on by both engines: KL 0 to it at step 1, and not to the base.
    Training by Unsloth's trainer does not notice that held-out items are measured meanwhile.
    """
    run = run_script(UNSLOTH, str(BASE_DIR), folder=tmp_path)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["start"]["kl"][0] == 0 < facts["start"]["kl"][1] and facts["base"]["kl"][0] > 1e-3
    for one in facts.values():
        assert one["engine"] == "unsloth" and one["loaded"] == one["expected"] > 0 and one["folders"] == []
    assert facts["measured"]["kl"] == facts["start"]["kl"] and facts["start"]["held_out"] == [None, None]
    assert all(length > 0 for length in facts["measured"]["held_out"])
    policy = started(tmp_path / "sft", "start")
    assert len(trained_names(policy)) == facts["start"]["expected"]


# --- the recipe ------------------------------------------------------------------------------------------------------


def test_the_recipe_gets_the_shape_of_the_adapter(adapter):
    lora = with_start(recipe_of(adapter)).lora
    assert (lora.r, lora.alpha, lora.dropout, lora.vision) == (4, 12.0, 0.1, False)
    assert lora.target_modules == ("q_proj", "v_proj", "o_proj")
    given = {"r": 4, "target_modules": ("o_proj", "q_proj", "v_proj"), "dropout": 0.0}
    again = with_start(with_start(recipe_of(adapter, lora=given)))
    assert again.lora == lora.model_copy(update={"dropout": 0.0})  # which is not the adapter's to say


def test_a_recipe_that_says_otherwise_is_refused_with_what_to_give(adapter):
    with pytest.raises(RecipeError) as error:
        with_start(recipe_of(adapter, lora={"r": 16, "alpha": 32.0, "target_modules": ("q_proj",)}))
    (line,) = error.value.problems
    assert line.endswith("give lora.r=4 lora.alpha=12 lora.target_modules=[q_proj,v_proj,o_proj], or another adapter")


def test_a_reference_without_a_start_is_refused(tmp_path):
    from apo_lora.recipe.files import find_recipe, load_recipe

    with pytest.raises(RecipeError, match="grpo.reference: start is the adapter in lora.start, which is null"):
        load_recipe(find_recipe("tiny_cpu"), ["grpo.reference=start"])


# --- what cannot be trained further ----------------------------------------------------------------------------------


def first(weights, part):
    return next(key for key in weights if part in key)


def without(weights, part):
    return {key: weight for key, weight in weights.items() if key != first(weights, part)}


def narrower(weights):
    key = first(weights, "lora_A")
    return weights | {key: weights[key][:, :-1].contiguous()}


BROKEN = {
    "DoRA": (lambda a: edit_config(a, use_dora=True), "use_dora"),
    "whole modules": (lambda a: edit_config(a, modules_to_save=["lm_head"]), "modules_to_save"),
    "several ranks": (lambda a: edit_config(a, rank_pattern={"q_proj": 8}), "rank_pattern"),
    "biases": (lambda a: edit_config(a, bias="all"), "bias"),
    "a changed base": (lambda a: edit_config(a, init_lora_weights="pissa_niter_4"), "init_lora_weights=pissa_niter_4"),
    "IA3": (lambda a: edit_config(a, peft_type="IA3"), "is of a IA3 adapter; only LoRA is supported"),
    "another published base": (
        lambda a: edit_config(a, base_model_name_or_path="unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit"),
        "was trained on unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit, not on Qwen/Qwen2.5-VL-3B-Instruct",
    ),
    "no rank": (lambda a: edit_config(a, r=None), "has r None"),
    "another rank": (lambda a: edit_config(a, r=8), "size mismatch"),
    "a B is missing": (lambda a: edit_weights(a, lambda w: without(w, "lora_B")), "1 weights are missing"),
    "an A is missing": (lambda a: edit_weights(a, lambda w: without(w, "lora_A")), "1 are unexpected"),
    "another width": (lambda a: edit_weights(a, narrower), "size mismatch"),
    "other names": (
        lambda a: edit_weights(a, lambda w: {key.replace("layers.", "blocks."): v for key, v in w.items()}),
        "has none of the adapter's layers",
    ),
    "some other names": (
        lambda a: edit_weights(a, lambda w: {key.replace("layers.0", "layers.77"): v for key, v in w.items()}),
        "does not match this model",
    ),
    "the tower alone": (
        lambda a: edit_weights(a, lambda w: {key.replace("language_model", "visual"): v for key, v in w.items()}),
        "adapts no layer of the language model",
    ),
    "cut short": (lambda a: (a / WEIGHTS).write_bytes(b"cut"), "cannot be read"),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "nothing there": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_trained_further_is_one_line(case, copied):
    spoil, says = BROKEN[case]
    spoil(copied)
    model = {"name": "Qwen/Qwen2.5-VL-3B-Instruct"} if case == "another published base" else {}
    with pytest.raises(ModelError, match=says) as error:
        started(copied, **model)
    (line,) = str(error.value).splitlines()
    assert line.startswith("lora.start: ")


def test_a_hub_id_without_a_network_is_one_line():
    with pytest.raises(UserError, match="^lora.start: some/adapter: no such folder, and it cannot be downloaded"):
        with_start(recipe_of("some/adapter"))


def test_a_hub_id_is_a_folder_of_the_cache(adapter, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(adapter))
    assert with_start(recipe_of("some/adapter")).lora.r == 4
    assert asked == [(("some/adapter",), {"allow_patterns": [CONFIG, WEIGHTS]})]
