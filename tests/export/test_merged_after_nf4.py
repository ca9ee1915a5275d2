"""Merging after training on NF4: onto the weights that were trained on, or onto the 16-bit ones, which differ."""

import json
import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from transformers import AutoProcessor
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from apo_lora.commands.main import main
from apo_lora.errors import ModelError
from apo_lora.export import four_bit, targets
from apo_lora.export.base import find_base
from apo_lora.export.comparison import check_prompts, load_plain
from apo_lora.export.gguf import CONVERTER
from apo_lora.policy.tuned import load_tuned
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.adapter import CONFIG, FOUR_BIT, find_adapter
from apo_lora.tiny import BASE_DIR

SHORT = (
    "model.load_in_4bit=true", "lora.target_modules=[q_proj,down_proj]", "data.limit=8", "data.eval=null",
    "data.general=null", "grpo.prompts_per_step=2", "grpo.num_generations=4", "grpo.completions_per_pass=8",
    "grpo.max_completion_length=64", "train.max_steps=3", "train.warmup_steps=0", "train.learning_rate=1e-2",
    "train.preflight=false", "train.seed=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("nf4") / "run"
    assert main(["train", "--recipe", "tiny_cpu", *SHORT, f"output.dir={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def merged(run):
    """Folder by choice; `trained` by default."""
    assert main(["export", str(run), "--to", "merged"]) == 0
    assert main(["export", str(run), "--to", "merged", "--onto", "original", "--out", str(run / "original")]) == 0
    return {"trained": run / "merged", "original": run / "original"}


@pytest.fixture(scope="module")
def trained(run):
    source = find_adapter(run)
    return load_tuned(source, source.recipe).model.eval()


@torch.no_grad()
def logps(model):
    prompts = check_prompts(AutoProcessor.from_pretrained(BASE_DIR))
    inputs = [each for kind in prompts.values() for each in kind]
    return torch.cat([torch.log_softmax(model(**each).logits[0].float(), -1) for each in inputs])


def rms(differences):
    return differences.square().mean().sqrt().item()


def report(folder):
    return json.loads((folder / "export_report.json").read_text())


def test_onto_trained_is_the_trained_model_and_onto_original_is_not(trained, merged):
    expected = logps(trained)
    with trained.disable_adapter():
        effect, quantisation = rms(expected - (four_bit := logps(trained))), rms(four_bit - logps(load_plain(BASE_DIR)))
    error = {onto: rms(expected - logps(load_plain(folder))) for onto, folder in merged.items()}
    print(f"effect {effect:.3f}, quantisation error of the base {quantisation:.3f}, of the merged models {error}")
    assert effect > 0.1 and quantisation > 0.1
    assert 0.5 < error["original"] / quantisation < 2
    assert error["trained"] < 0.02 * error["original"]
    for onto, folder in merged.items():
        assert report(folder)["onto"] == onto
        assert all(check["gap"] < 0.05 for check in report(folder)["checks"])


def test_what_was_in_4_bits_is_dequantised_exactly_and_the_rest_is_the_bases(trained, merged):
    written, base = load_file(merged["trained"] / "model.safetensors"), load_file(BASE_DIR / "model.safetensors")
    packed = {
        name.replace("language_model.", "").removesuffix(".base_layer") + ".weight": module.weight
        for name, module in trained.get_base_model().named_modules()
        if isinstance(module, Linear4bit)
    }
    adapted = {name for name in packed if "q_proj" in name or "down_proj" in name}
    assert written.keys() == base.keys() and packed.keys() < base.keys() and 0 < len(adapted) < len(packed)
    for name in base.keys() - adapted:
        expected = dequantize_bnb_weight(packed[name]).to(torch.float16) if name in packed else base[name]
        assert torch.equal(written[name], expected), name
        assert name not in packed or not torch.equal(written[name], base[name])


@pytest.fixture
def packed_run(run, trained, tmp_path):
    """The same adapter on a repository that holds the base in 4 bits, without a record, and without the 16-bit one."""
    base = tmp_path / "base-bnb-4bit"
    shutil.copytree(BASE_DIR, base, ignore=shutil.ignore_patterns("*.safetensors"))
    model = four_bit.load_as_trained(find_base(find_adapter(run)))
    model.save_pretrained(base)
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (adapter / FOUR_BIT).unlink()
    config = json.loads((adapter / CONFIG).read_text()) | {"base_model_name_or_path": str(base)}
    (adapter / CONFIG).write_text(json.dumps(config))
    return adapter


def test_a_repository_in_4_bits_is_unpacked_into_shards(packed_run, trained, merged, monkeypatch, capsys):
    monkeypatch.setattr(four_bit, "SHARD_BYTES", 1_000_000)
    assert main(["export", str(packed_run), "--to", "merged"]) == 0
    folder = packed_run.parent / "merged"
    assert len(list(folder.glob("*.safetensors"))) > 1 and report(folder)["onto"] == "trained"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    error = rms(logps(trained) - logps(load_plain(folder)))
    assert error < 0.02 * rms(logps(trained) - logps(load_plain(merged["original"])))
    shutil.rmtree(folder)
    assert main(["export", str(packed_run), "--to", "merged", "--onto", "original"]) == 2
    assert "base does not exist here" in capsys.readouterr().err


def test_a_base_that_is_not_in_4_bits_as_recorded_is_one_line(run, tmp_path):
    source = find_adapter(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    record = json.loads((source.folder / FOUR_BIT).read_text())
    (source.folder / FOUR_BIT).write_text(json.dumps(record | {"layers": [*record["layers"], "lm_head.gone"]}))
    with pytest.raises(ModelError, match="other layers in 4 bits"):
        four_bit.load_as_trained(find_base(source))


def in_16_bits(adapter):
    (adapter / FOUR_BIT).unlink()
    recipe = load_recipe(find_recipe("tiny_cpu"))
    (adapter / "apo_lora_recipe.yaml").write_text(recipe.to_yaml())


@pytest.mark.parametrize(
    ("change", "onto", "chosen", "says"),
    [
        (lambda adapter: None, None, "trained", ""),
        (lambda adapter: None, "original", "original", ""),
        (lambda adapter: (adapter / FOUR_BIT).unlink(), None, "original", "not known whether it was trained on"),
        (in_16_bits, None, None, ""),
        (in_16_bits, "original", None, ""),
        (in_16_bits, "trained", None, "the same as --onto original"),
    ],
)
def test_what_was_trained_on_is_known_or_said_to_be_unknown(change, onto, chosen, says, run, tmp_path, capsys):
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    change(adapter)
    assert find_base(find_adapter(adapter), onto).onto == chosen
    printed = capsys.readouterr().out
    assert says in printed and len(printed.splitlines()) == bool(says)


def test_onto_trained_is_refused_where_that_is_unknown(run, tmp_path, capsys):
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    (adapter / FOUR_BIT).unlink()
    assert main(["export", str(adapter), "--to", "merged", "--onto", "trained"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "use --onto original" in error[0]


def test_a_gguf_is_made_of_the_chosen_weights(run, tmp_path, monkeypatch):
    def stop(source, base, folder):
        merged_into.append(base.onto)
        raise ModelError("enough")

    merged_into = []
    monkeypatch.setattr(targets, "_merge_and_check", stop)
    (tmp_path / CONVERTER).write_text("")
    for options in ([], ["--onto", "original"]):
        assert main(["export", str(run), "--to", "gguf", "--llama-cpp", str(tmp_path), *options]) == 2
    assert merged_into == ["trained", "original"]
