"""GGUF: what is refused, what is reported, and the proof in the real llama.cpp (pip install -e .[gguf-test])."""

import base64
import io
import json
import os

import pytest
import torch
from gguf_model import as_gguf, make_adapter
from PIL import Image, ImageDraw

from apo_lora.commands.main import main
from apo_lora.export import gguf as export_gguf
from apo_lora.export.comparison import load_plain
from apo_lora.family.lookup import FAMILIES
from apo_lora.family.qwen2_5_vl import QWEN2_5_VL

TEXT, ABOUT_IMAGE = "What is seven plus five?", "What is this?"
TOP = 8


# --- fast -----------------------------------------------------------------------------------------------------------


def test_without_llama_cpp_is_one_line_and_nothing_is_merged(load_tiny, tmp_path, capsys, monkeypatch):
    load_tiny().model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("apo_lora.export.merged.merge", lambda *args: pytest.fail("merged"))
    arguments = ["export", str(tmp_path / "adapter"), "--to", "gguf"]
    assert main(arguments) == 2
    assert "give that folder with --llama-cpp" in capsys.readouterr().err
    (tmp_path / export_gguf.CONVERTER).write_text("")
    assert main([*arguments, "--llama-cpp", str(tmp_path), "--quantization", "Q4_K_M"]) == 2
    assert "needs llama.cpp's llama-quantize" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", export_gguf.CONVERTER]


@pytest.mark.parametrize(
    ("fails_at", "words"),
    [("--mmproj", "did not write mmproj-adapter-F16.gguf"), ("q8_0", "did not write adapter-Q8_0.gguf")],
)
def test_a_converter_that_fails_leaves_nothing(fails_at, words, load_tiny, stir_adapter, tmp_path, capsys):
    policy = load_tiny()
    stir_adapter(policy.model, scale=0.05)
    policy.model.save_pretrained(tmp_path / "adapter")
    tools = tmp_path / "llama.cpp"
    tools.mkdir()
    (tools / export_gguf.CONVERTER).write_text(
        "import pathlib, sys\n"
        f"if {fails_at!r} in sys.argv: sys.exit('Traceback\\nNotImplementedError: no such thing')\n"
        "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('')\n"
    )
    arguments = ["export", str(tmp_path / "adapter"), "--to", "gguf", "--llama-cpp", str(tools)]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and "NotImplementedError: no such thing" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "llama.cpp"]


def test_coarse_or_missing_vision_and_silent_fallbacks_are_problems():
    text = {"file": "t", "tensor_types": {"F32": 2, "Q4_K": 3}}
    mmproj = {"file": "m", "vision_matrices": {"F16": 5}}
    assert export_gguf.problems(text, mmproj, "Q4_K_M") == []
    assert "no vision tower" in export_gguf.problems(text, mmproj | {"vision_matrices": {}}, "Q4_K_M")[0]
    assert "in Q4_K" in export_gguf.problems(text, mmproj | {"vision_matrices": {"Q4_K": 1, "F16": 4}}, "Q4_K_M")[0]
    fallen_back = text | {"tensor_types": {"F32": 2, "Q5_0": 3}}
    assert "multiples of 256" in export_gguf.problems(fallen_back, mmproj, "Q4_K_M")[0]


def test_rows_that_q4_k_cannot_hold_are_notes():
    text = {"file": "t", "tensor_types": {"F32": 2, "Q4_K": 3, "Q6_K": 1}}
    assert export_gguf.notes(text, "Q4_K_M") == []
    text["tensor_types"] |= {"Q5_0": 1, "Q8_0": 2}
    assert export_gguf.notes(text, "Q8_0") == []
    (note,) = export_gguf.notes(text, "Q4_K_M")
    assert note.startswith("t: 1 Q5_0, 2 Q8_0 tensors instead of Q4_K or Q6_K")


def test_q4_k_m_is_quantised_from_an_f16_file_that_goes(tmp_path):
    converter, quantizer = tmp_path / export_gguf.CONVERTER, tmp_path / "build" / "bin" / export_gguf.QUANTIZER
    converter.write_text(
        "import pathlib, sys\na = sys.argv\n"
        'said = f\'{a[a.index("--outtype") + 1]} {"--mmproj" in a}\'\n'
        "pathlib.Path(a[a.index('--outfile') + 1]).write_text(said)\n"
    )
    quantizer.parent.mkdir(parents=True)
    quantizer.write_text('#!/bin/sh\necho "$3 of $(cat "$1")" > "$2"\n')
    quantizer.chmod(0o755)
    convert = export_gguf.find_converter(str(tmp_path), "Q4_K_M")
    (tmp_path / "out").mkdir()
    text, mmproj = convert(tmp_path, tmp_path / "out", "mine", "Q4_K_M")
    assert (text.name, text.read_text()) == ("mine-Q4_K_M.gguf", "Q4_K_M of f16 False\n")
    assert (mmproj.name, mmproj.read_text()) == ("mmproj-mine-F16.gguf", "f16 True")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [text.name, mmproj.name]


# --- in the real llama.cpp ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_model(gguf_adapter):
    return with_adapter(gguf_adapter)


def with_adapter(folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_plain(folder.parent / "base"), str(folder)).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def of_family(request, gguf_adapter, tmp_path_factory):
    """(family, adapter, adapter model) of every family."""
    if request.param == QWEN2_5_VL.model_type:
        adapter = gguf_adapter
    else:
        adapter = make_adapter(tmp_path_factory.mktemp(request.param), request.param)
    return FAMILIES[request.param], adapter, with_adapter(adapter)


def ask_llama_cpp(folder, question, image=None, tokens=1):
    """One dict per greedy token: {token id: log-prob} of the most probable ones, in order; and the chosen ids."""
    import xllamacpp

    report = json.loads((folder / "export_report.json").read_text())
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / report["files"][0]["file"])
    params.mmproj.path = str(folder / report["files"][1]["file"])
    params.n_ctx, params.warmup, params.n_parallel = 1024, False, 1
    params.cpuparams.n_threads = 1
    content = [{"type": "text", "text": question}]
    if image:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    answer = xllamacpp.Server(params).handle_chat_completions(
        {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP,
            "ignore_eos": True,
        }
    )
    steps = answer["choices"][0]["logprobs"]["content"]
    return [{t["id"]: t["logprob"] for t in step["top_logprobs"]} for step in steps], [step["id"] for step in steps]


@torch.no_grad()
def ask_transformers(model, folder, question, image=None, tokens=1):
    """The same of the adapter model."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    content = [*([{"type": "image"}] if image else []), {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[image] if image else None, return_tensors="pt")
    ids = model.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    chosen = ids.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    tops = [torch.log_softmax(score[0].float(), -1).topk(TOP) for score in ids.scores]
    return [dict(zip(t.indices.tolist(), t.values.tolist(), strict=True)) for t in tops], chosen


def largest_difference(ours, theirs):
    return max(abs(ours[token] - theirs[token]) for token in ours)


@pytest.mark.slow
def test_text_in_llama_cpp_is_the_adapter_models(of_family, llama_cpp):
    _, adapter, adapter_model = of_family
    folder = as_gguf(adapter, llama_cpp, "F32")
    ours, tokens = ask_llama_cpp(folder, TEXT, tokens=12)
    theirs, expected = ask_transformers(adapter_model, adapter.parent / "base", TEXT, tokens=12)
    with adapter_model.disable_adapter():
        base, _ = ask_transformers(adapter_model, adapter.parent / "base", TEXT)
    assert set(base[0]) != set(theirs[0])  # the adapter shows in the answer
    assert set(ours[0]) == set(theirs[0])
    print("text, F32: largest difference of log-probs", largest_difference(ours[0], theirs[0]))
    assert largest_difference(ours[0], theirs[0]) < 0.01
    assert tokens == expected


def picture(family, black=False):
    """Of 8 x 6 image tokens, so that nothing resizes it: llama.cpp does that in its own way."""
    side = family.patch * family.merge
    image = Image.new("RGB", (8 * side, 6 * side), "black" if black else "white")
    if not black:
        draw = ImageDraw.Draw(image)
        draw.ellipse((20, 20, 100, 100), fill="red")
        draw.rectangle((120, 60, 200, 150), fill="blue")
    return image


@pytest.mark.slow
def test_an_image_in_llama_cpp_is_seen_as_the_adapter_model_sees_it(of_family, llama_cpp):
    family, adapter, adapter_model = of_family
    folder = as_gguf(adapter, llama_cpp, "F32")
    (ours,), tokens = ask_llama_cpp(folder, ABOUT_IMAGE, picture(family))
    (theirs,), expected = ask_transformers(adapter_model, adapter.parent / "base", ABOUT_IMAGE, picture(family))
    (black,), _ = ask_llama_cpp(folder, ABOUT_IMAGE, picture(family, black=True))
    assert tokens == expected
    shared = {token: value for token, value in ours.items() if token in theirs}
    assert len(shared) >= TOP - 1
    print("image, F32: largest difference of log-probs", largest_difference(shared, theirs))
    assert largest_difference(shared, theirs) < 0.02
    assert ("SYSTEM" in (folder / "Modelfile").read_text()) is (family.system_prompt is not None)
    moved = [abs(ours[token] - black[token]) for token in ours if token in black]
    assert len(moved) < TOP or max(moved) > 0.1  # it is the image that answers


@pytest.mark.slow
def test_q8_0_is_near_and_its_vision_tower_is_f16(gguf_adapter, adapter_model, llama_cpp):
    folder = as_gguf(gguf_adapter, llama_cpp, "Q8_0", to="ollama")
    (ours,), _ = ask_llama_cpp(folder, TEXT)
    (theirs,), _ = ask_transformers(adapter_model, gguf_adapter.parent / "base", TEXT)
    shared = {token: value for token, value in ours.items() if token in theirs}
    print("text, Q8_0: largest difference of log-probs", largest_difference(shared, theirs))
    assert len(shared) >= TOP // 2 and 0 < largest_difference(shared, theirs) < 0.2
    report = json.loads((folder / "export_report.json").read_text())
    text, mmproj = report["files"]
    assert "Q8_0" in text["tensor_types"]
    assert set(mmproj["vision_matrices"]) <= {"F16", "F32"}
    for file in (text, mmproj):
        assert (folder / file["file"]).stat().st_size == file["bytes"]
        assert all(file["file"] in report["commands"][program] for program in ("llama-mtmd-cli", "llama-server"))
        assert f"FROM ./{file['file']}\n" in (folder / "Modelfile").read_text()
    assert 'SYSTEM """You are a helpful assistant."""\n' in (folder / "Modelfile").read_text()
    assert "merged" not in [path.name for path in folder.iterdir()]


@pytest.mark.slow
def test_q4_k_m_by_the_real_quantiser(gguf_adapter, adapter_model, llama_cpp, llama_quantize, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(llama_quantize), prepend=os.pathsep)
    folder = as_gguf(gguf_adapter, llama_cpp, "Q4_K_M")
    report = json.loads((folder / "export_report.json").read_text())
    types = report["files"][0]["tensor_types"]
    assert set(types) == {"F32", "Q4_K", "Q6_K"} and types["Q4_K"] > types["Q6_K"] and report["notes"] == []
    assert set(report["files"][1]["vision_matrices"]) <= {"F16", "F32"}
    assert not list(folder.glob("*-F16.gguf")) or all("mmproj" in file.name for file in folder.glob("*-F16.gguf"))
    (ours,), _ = ask_llama_cpp(folder, TEXT)
    (theirs,), _ = ask_transformers(adapter_model, gguf_adapter.parent / "base", TEXT)
    shared = {token: value for token, value in ours.items() if token in theirs}
    print("text, Q4_K_M: largest difference of log-probs", largest_difference(shared, theirs), "of", len(shared))
    assert len(shared) >= 2 and 0 < largest_difference(shared, theirs) < 1.0


@pytest.mark.matrix
def test_the_real_quantiser_falls_back_and_that_is_said(tmp_path, llama_cpp, llama_quantize, monkeypatch, capsys):
    """llama.cpp gives them another type without a word that an export would show."""
    adapter = make_adapter(tmp_path, intermediate_size=320)
    monkeypatch.setenv("PATH", str(llama_quantize), prepend=os.pathsep)
    folder = as_gguf(adapter, llama_cpp, "Q4_K_M")
    types = json.loads((folder / "export_report.json").read_text())["files"][0]["tensor_types"]
    assert (types["Q5_0"], types["Q8_0"]) == (1, 1) and "Q4_K" in types  # down_proj of the two layers
    assert (
        "1 Q5_0, 1 Q8_0 tensors instead of Q4_K or Q6_K, because their row size is not a multiple of 256"
        in capsys.readouterr().out
    )
