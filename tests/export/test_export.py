"""A merged export is the adapter model, and an export that is not one is neither kept nor called done."""

import errno
import inspect
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from apo_lora.commands.main import main
from apo_lora.errors import ModelError
from apo_lora.export import base as export_base
from apo_lora.export import merged as export_merged
from apo_lora.export.comparison import check_prompts, comparison
from apo_lora.recipe.files import find_recipe
from apo_lora.run.adapter import CONFIG, WEIGHTS, find_adapter
from apo_lora.run.files import locked
from apo_lora.tiny import BASE_DIR


@pytest.fixture
def adapter(load_tiny, stir_adapter, tmp_path):
    """A folder with an adapter of language and vision layers that changes the model."""
    policy = load_tiny(lora={"vision": True})
    stir_adapter(policy.model, scale=0.05)
    policy.model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def export(adapter, out, *arguments):
    return main(["export", str(adapter), "--to", "merged", "--out", str(out), *arguments])


def plain(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()


@torch.no_grad()
def logits(model, kind):
    inputs = check_prompts(AutoProcessor.from_pretrained(BASE_DIR))[kind]
    return torch.cat([model(**each).logits[0] for each in inputs])


def edit_config(adapter, **values):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | values))


def edit_weights(adapter, change):
    """`change` takes and returns (name, tensor); None drops it."""
    pairs = [change(name, tensor) for name, tensor in load_file(adapter / WEIGHTS).items()]
    save_file(dict(filter(None, pairs)), adapter / WEIGHTS)


def leftovers(adapter):
    return sorted(path.name for path in adapter.parent.iterdir() if path != adapter)


def float32_base(folder):
    """The tiny base in float32 and two shards, under the names of today's loaded models or of its checkpoint."""
    folder.mkdir()
    for path in BASE_DIR.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(BASE_DIR / "model.safetensors").items()}
    shards = [dict(list(tensors.items())[i::2]) for i in range(2)]
    index = {}
    for i, shard in enumerate(shards, 1):
        save_file(shard, folder / f"model-{i:05}-of-00002.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(shard, f"model-{i:05}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_adapter_folder_loads_with_plain_peft(kind, load_tiny, stir_adapter, tmp_path):
    policy = load_tiny(lora={"vision": True})
    stir_adapter(policy.model, scale=0.05)
    policy.model.eval().save_pretrained(tmp_path / "adapter")
    base = plain(BASE_DIR)
    before = logits(base, kind)
    loaded = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), kind)
    assert (loaded - before).abs().max() > 0.1
    torch.testing.assert_close(loaded, logits(policy.model, kind), atol=1e-6, rtol=0)


def test_merging_into_float32_shards_is_pefts_merge(adapter, tmp_path):
    base = float32_base(tmp_path / "base")
    edit_config(adapter, base_model_name_or_path=str(base), use_rslora=True, alpha_pattern={"q_proj": 7})
    assert export(adapter, tmp_path / "merged") == 0
    merged, witness = plain(tmp_path / "merged"), PeftModel.from_pretrained(plain(base), adapter).merge_and_unload()
    untouched = plain(base).state_dict()
    expected = witness.state_dict()
    changed = [name for name, tensor in untouched.items() if not torch.equal(tensor, expected[name])]
    assert len(changed) == len(load_file(adapter / WEIGHTS)) / 2
    for name, tensor in merged.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)


def test_a_merged_folder_is_whole_and_reported(adapter, tmp_path, capsys):
    assert export(adapter, tmp_path / "merged") == 0
    merged = tmp_path / "merged"
    assert {t.dtype for t in load_file(merged / "model.safetensors").values()} == {torch.float16}  # as the base's
    companions = {path.name for path in BASE_DIR.iterdir()} - {"model.safetensors"}
    assert companions <= {path.name for path in merged.iterdir()}
    report = json.loads((merged / "export_report.json").read_text())
    assert [check["kind"] for check in report["checks"]] == ["text", "image"]
    for check in report["checks"]:
        assert check["effect"] > 0.05 and check["gap"] < 0.05 and check["argmax_agreement"] > 0.95
    assert "gap" in capsys.readouterr().out
    assert leftovers(adapter) == ["merged"]


def test_a_run_is_exported_beside_its_adapter(adapter, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    adapter.rename(run / "adapter")
    shutil.copy(find_recipe("tiny_cpu"), run / "recipe.yaml")
    assert main(["export", str(run), "--to", "merged"]) == 0
    assert (run / "merged" / "model.safetensors").is_file()


def the_base(name, weight, merged):
    return weight


def permuted(name, weight, merged):
    return merged.roll(1, 0) if name.endswith("q_proj") else merged


def with_wrong_scale(name, weight, merged):
    return 3 * merged if name.endswith("down_proj") else merged


def without_vision(name, weight, merged):
    return weight if name.startswith("visual") else merged


@pytest.fixture
def merge_wrongly(monkeypatch):
    right = export_merged.merged_weight

    def use(wrong):
        monkeypatch.setattr(
            export_merged, "merged_weight", lambda name, weight, layer: wrong(name, weight, right(name, weight, layer))
        )

    return use


@pytest.mark.parametrize("wrong", [the_base, permuted, with_wrong_scale])
def test_a_wrong_merge_is_found_and_not_kept(wrong, adapter, tmp_path, capsys, merge_wrongly):
    merge_wrongly(wrong)
    assert export(adapter, tmp_path / "merged") == 1
    assert ("equals the base" if wrong is the_base else "differs from the adapter model") in capsys.readouterr().err
    assert leftovers(adapter) == []


def test_lost_vision_layers_are_found(adapter, tmp_path, capsys, merge_wrongly):
    merge_wrongly(without_vision)
    edit_weights(adapter, lambda n, t: (n, t * 0.2 if "language_model" in n else t))
    assert export(adapter, tmp_path / "merged") == 1
    assert "image prompts: the merged model differs from the adapter model" in capsys.readouterr().err


def test_an_effect_as_small_as_rounding_passes_and_the_base_does_not(adapter, tmp_path, capsys, merge_wrongly):
    edit_weights(adapter, lambda n, t: (n, t * 5e-4 if "lora_B" in n else t))
    assert export(adapter, tmp_path / "merged") == 0
    for check in json.loads((tmp_path / "merged" / "export_report.json").read_text())["checks"]:
        assert check["gap"] > 0.5 and abs(check["gap"] / check["rounding"] - 1) < 0.2  # as PEFT's own merge
    merge_wrongly(the_base)
    assert export(adapter, tmp_path / "again") == 1
    assert "equals the base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("merged", "problem"),
    [
        (1.0, None),
        (0.6, None),
        (0.4, "differs from the adapter model"),
        (0.05, "equals the base"),
        (3.0, "differs from the adapter model"),
        (float("nan"), "differs from the adapter model"),
    ],
)
def test_verdicts(merged, problem):
    """The base is at 0, the adapter model at 1; more than half of that away is too far."""
    base, adapted, merged = (torch.full((2, 3), value) for value in (0.0, 1.0, merged))
    said = comparison("text", merged, adapted, base, rounded_LV=adapted).problem()
    assert said is None if problem is None else problem in said


def test_an_adapter_that_changes_nothing_is_said(adapter, tmp_path, capsys):
    edit_weights(adapter, lambda name, tensor: (name, torch.zeros_like(tensor) if "lora_B" in name else tensor))
    assert export(adapter, tmp_path / "merged") == 1
    assert "changes nothing" in capsys.readouterr().err
    assert leftovers(adapter) == []


def test_a_full_disk_leaves_nothing(adapter, tmp_path, capsys, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_merged, "save_file", no_space)
    assert export(adapter, tmp_path / "merged") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert leftovers(adapter) == []


def test_too_small_a_disk_is_said_before_anything_is_merged(adapter, tmp_path, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 2**28 + 1000})
    monkeypatch.setattr(export_merged.shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr(export_merged, "merge", lambda *args: pytest.fail("merged"))
    assert export(adapter, tmp_path / "merged") == 2
    assert "GB free" in capsys.readouterr().err
    assert leftovers(adapter) == []


def test_what_a_kill_left_is_cleared_away(adapter, tmp_path):
    (tmp_path / ".merged.tmp").mkdir()
    (tmp_path / ".merged.tmp" / "half").write_text("")
    assert export(adapter, tmp_path / "merged") == 0
    assert leftovers(adapter) == ["merged"] and not (tmp_path / "merged" / "half").exists()


@pytest.mark.parametrize(
    ("given", "sibling"),
    [
        ("unsloth/Qwen2.5-VL-3B-Instruct-unsloth-bnb-4bit", "unsloth/Qwen2.5-VL-3B-Instruct"),
        ("unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit", "unsloth/Qwen2.5-VL-7B-Instruct"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
    ],
)
def test_four_bit_names_lead_to_their_base(given, sibling):
    assert export_base.sixteen_bit_name(given) == sibling


def test_a_four_bit_folder_leads_to_its_sibling(adapter, tmp_path):
    edit_config(adapter, base_model_name_or_path=str(tmp_path / "base-unsloth-bnb-4bit"))
    shutil.copytree(BASE_DIR, tmp_path / "base")
    assert export_base.find_base(find_adapter(adapter), "original").folder == tmp_path / "base"
    with pytest.raises(ModelError, match=r"does not exist here.*or use --onto original$"):
        export_base.find_base(find_adapter(adapter))


def test_the_base_of_the_hub_comes_with_the_adapters_revision_but_its_sibling_does_not(adapter, monkeypatch):
    asked = []

    def download(name, revision, dry_run=False, **_):
        asked.append((name, revision))
        return [] if dry_run else str(BASE_DIR)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("some/base", "some/base-bnb-4bit"):
        edit_config(adapter, base_model_name_or_path=name, revision="abc")
        export_base.find_base(find_adapter(adapter), "original")
    assert set(asked) == {("some/base", "abc"), ("some/base-bnb-4bit".removesuffix("-bnb-4bit"), None)}


@pytest.mark.parametrize(("free_gb", "code"), [(29, 2), (31, 0)])
def test_room_for_base_and_export_is_asked_for_before_the_download(free_gb, code, adapter, monkeypatch, capsys):
    """10 GB to fetch of 20, and 20 to write."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.file_download import DryRunFileInfo

    assert (
        "dry_run" in inspect.signature(snapshot_download).parameters
    )  # what stands in below is called as the real one
    files = [
        DryRunFileInfo("abc", 10**10, f"model-{i}.safetensors", "", is_cached=not i, will_download=bool(i))
        for i in (0, 1)
    ]
    fetched = []

    def download(name, dry_run=False, **_):
        if not dry_run:
            fetched.append(name)
        return files if dry_run else str(BASE_DIR)

    edit_config(adapter, base_model_name_or_path="some/base")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    usage = type("Usage", (), {"free": free_gb * 10**9})
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(adapter.parent))
    assert export(adapter, adapter.parent / "merged") == code
    written = capsys.readouterr()
    said = written.err if code else written.out
    assert f"30.27 GB needed (download 10.00, merged 20.00, spare 0.27), {free_gb}.00 GB free" in said
    assert fetched == ([] if code else ["some/base"])


def lm_head_pair(adapter):
    edit_config(adapter, target_modules=r".*(q_proj|lm_head)")
    edit_weights(
        adapter, lambda name, tensor: (name, tensor) if "language_model" in name and "q_proj" in name else None
    )
    rank = json.loads((adapter / CONFIG).read_text())["r"]
    pair = {"lm_head.lora_A.weight": torch.zeros(rank, 96), "lm_head.lora_B.weight": torch.zeros(448, rank)}
    add_weights(adapter, pair)


def add_weights(adapter, tensors):
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(load_file(adapter / WEIGHTS) | named, adapter / WEIGHTS)


def unknown_layer(adapter):
    edit_weights(adapter, lambda name, tensor: (name.replace("layers.0", "layers.99"), tensor))


def quantised_base(adapter):
    base = shutil.copytree(BASE_DIR, adapter.parent / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    edit_config(adapter, base_model_name_or_path=str(base))


def lost_shard(adapter):
    base = float32_base(adapter.parent / "base")
    (base / "model-00002-of-00002.safetensors").unlink()
    edit_config(adapter, base_model_name_or_path=str(base))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lm_head_pair, "adapts lm_head, whose weight this base uses for both"),
        (
            lambda a: add_weights(a, {"lm_head.weight": torch.zeros(448, 96)}),
            "lm_head.weight is not part of a LoRA pair",
        ),
        (lambda a: edit_config(a, use_dora=True), "DoraLinearVariant"),
        (lambda a: edit_config(a, peft_type="IA3"), "only LoRA"),
        (lambda a: edit_config(a, base_model_name_or_path="/no/such/base"), "/no/such/base does not exist here"),
        (lambda a: edit_config(a, base_model_name_or_path="nobody/nothing"), "hf download nobody/nothing"),
        (unknown_layer, "use the base that it was trained on"),
        (quantised_base, "quantised"),
        (lost_shard, "model-00002-of-00002.safetensors is missing"),
        (lambda a: edit_weights(a, lambda n, t: (n, t * 1e30)), "cannot represent"),
        (lambda a: edit_weights(a, lambda n, t: (n, t[:, 1:].clone()) if "lora_A" in n else (n, t)), "size mismatch"),
        (lambda a: edit_weights(a, lambda n, t: None if "lora_B" in n else (n, t)), "48 weights are missing"),
        (lambda a: shutil.copytree(a, a.parent / "merged"), "already exists"),
    ],
)
def test_what_cannot_be_merged_is_one_line(spoil, words, adapter, tmp_path, capsys):
    spoil(adapter)
    before = leftovers(adapter)
    assert export(adapter, tmp_path / "merged") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "merging:" not in line and line.strip()]
    assert len(error) == 1 and words in error[0]
    assert leftovers(adapter) == before


def test_no_adapter_is_one_line(tmp_path, capsys):
    assert main(["export", str(tmp_path / "nothing"), "--to", "merged"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_two_exports_into_one_folder_are_refused(adapter, tmp_path, capsys):
    """The second one would clear away what the first one writes; what a killed one left is cleared away."""
    hidden = tmp_path / ".merged.tmp"
    hidden.mkdir()
    (hidden / "half").write_text("")
    with locked(hidden):
        assert export(adapter, tmp_path / "merged") == 2
        assert "another process is writing to it" in capsys.readouterr().err
    assert (hidden / "half").exists()
    assert export(adapter, tmp_path / "merged") == 0
    assert not hidden.exists() and not (tmp_path / "merged" / "half").exists()
