"""The doctor: every check on a host where it holds and on one where it does not, and the real command on this one."""

import getpass
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PROJECT

from apo_lora.commands import main as cli
from apo_lora.machine import doctor
from apo_lora.machine import host as doctor_host
from apo_lora.machine.host import Gpu, Host

GiB = 2**30
TESTED = {
    **dict.fromkeys((*doctor.OWN_LINES, "numpy", "pillow"), "1.2.3"),
    "torch": "2.10.0",
}
RTX = Gpu("NVIDIA RTX 4060", 1, (8, 9), ("sm_75", "sm_86", "sm_90"), "bfloat16", 7 * GiB, 8 * GiB, "12.8")
HOST = Host(
    python="3.12",
    python_allowed=">=3.11,<3.13",
    installed=TESTED | {"torch": "2.10.0+cu128", "flash-attn": "2.9"},
    tested=TESTED,
    broken={},
    torch_of_torchvision="2.10.0",
    gpu=RTX,
    gpu_problem=None,
    free_ram=16 * GiB,
    free_disk=100 * GiB,
    free_hub_disk=100 * GiB,
    commands=frozenset(doctor_host.LLAMA_CPP),
    has_token=True,
    vllm_problem=None,
    cache=Path("nowhere"),
)


def installed(**versions):
    """HOST's packages with these changed, or taken away by None."""
    changed = HOST.installed | {name.replace("_", "-"): version for name, version in versions.items()}
    return {"installed": {name: version for name, version in changed.items() if version}}


def gpu(**values):
    return {"gpu": replace(RTX, **values)}


NO_GPU = {"gpu": None}
OTHER_TORCH = installed(torch="2.11.0+cu130") | {"torch_of_torchvision": "2.11.0"}
UNSLOTH_BROKEN = {"broken": {"unsloth": "NotImplementedError"}}


def test_nothing_to_say_about_a_host_that_has_everything_as_tested():
    lines = doctor.examine(HOST)
    assert [line for line in lines if line.status != "ok" or line.remedy] == []
    names = " ".join(line.name for line in lines)
    assert names == (
        "python apo-lora torch torchvision transformers trl peft accelerate datasets unsloth-zoo bitsandbytes triton "
        "unsloth other packages GPU capability GPU memory RAM disk here disk, Hub cache xformers flash attention vLLM "
        "llama.cpp Hub token Unsloth cache"
    )
    assert "Training works here, on the GPU. Notes: 0." in doctor.report(lines, "GPU")


def test_a_python_is_bad_only_where_the_package_itself_excludes_it():
    (line, *_) = doctor.examine(replace(HOST, python="3.13", python_allowed=">=3.11,<3.14"))
    assert (line.name, line.status, line.found) == ("python", "ok", "3.13")
    assert doctor.examine(replace(HOST, python="3.13", python_allowed=""))[0].status == "ok"
    bounds = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["requires-python"]
    own = SimpleNamespace(metadata={"Requires-Python": bounds})
    assert doctor_host._python_of(own) == bounds and doctor_host._python_of(None) == ""


@pytest.mark.parametrize(
    ("changes", "name", "status", "found", "remedy"),
    [
        ({"python": "3.10"}, "python", "bad", "3.10; apo-lora needs >=3.11,<3.13", "with Python >=3.11,<3.13"),
        ({"python": "3.13"}, "python", "bad", "3.13; apo-lora needs >=3.11,<3.13", "with Python >=3.11,<3.13"),
        ({"broken": {"apo-lora": "No module named 'x'"}}, "apo-lora", "bad", "named 'x'", "constraints.txt"),
        (installed(torch=None), "torch", "bad", "not installed", "torch==2.10.0"),
        (installed(torchvision=None), "torchvision", "bad", "not installed", "torch==2.10.0 torchvision==1.2.3"),
        (installed(transformers=None), "transformers", "bad", "not installed", "pip install transformers==1.2.3"),
        (installed(trl=None), "trl", "bad", "not installed", "pip install trl==1.2.3"),
        (installed(peft=None), "peft", "bad", "not installed", "pip install peft==1.2.3"),
        ({"broken": {"trl": "ImportError: no y"}}, "trl", "bad", "ImportError: no y", "--force-reinstall"),
        (installed(trl="9"), "trl", "note", "9; tested with 1.2.3", "pip install trl==1.2.3"),
        (OTHER_TORCH, "torch", "note", "2.11.0+cu130; tested with 2.10.0", "triton==1.2.3 xformers==1.2.3"),
        ({"torch_of_torchvision": "2.9.1"}, "torch pair", "bad", "needs torch 2.9.1", "torchvision==1.2.3"),
        (installed(bitsandbytes=None), "bitsandbytes", "bad", "not installed", "pip install bitsandbytes"),
        (installed(bitsandbytes=None) | NO_GPU, "bitsandbytes", "note", "not installed", "pip install bitsandbytes"),
        (UNSLOTH_BROKEN, "unsloth", "bad", "NotImplementedError", "unsloth==1.2.3"),
        (installed(unsloth=None) | NO_GPU, "unsloth", "note", "only be imported with a GPU", "unsloth==1.2.3"),
        ({"tested": {}}, "tested set", "note", "cannot be read", "reinstall apo-lora"),
        (installed(numpy="9.9"), "other packages", "note", "1 of 2 differ from the tested versions", "numpy==1.2.3"),
        (NO_GPU, "GPU", "note", "tiny_cpu.yaml", "CUDA GPU"),
        (NO_GPU | {"gpu_problem": "built without CUDA"}, "GPU", "note", "built without CUDA", "CUDA_VISIBLE_DEVICES"),
        (gpu(count=2), "GPU", "ok", "the first of 2", ""),
        (gpu(capability=(6, 1)), "capability", "bad", "6.1; this torch build has kernels", "another machine"),
        (gpu(capability=(7, 5), dtype="float16"), "capability", "ok", "7.5, trains in float16", ""),
        (gpu(free_bytes=GiB // 2), "GPU memory", "bad", "0.5 GiB free of 8.0 GiB", "nvidia-smi"),
        (gpu(free_bytes=5 * GiB), "GPU memory", "note", "5.0 GiB", "gpu_8gb.yaml"),
        ({"free_ram": GiB}, "RAM", "bad", "1.0 GiB", "close"),
        ({"free_ram": 4 * GiB}, "RAM", "note", "4.0 GiB", "merging"),
        ({"free_disk": GiB // 10}, "disk here", "bad", "0.1 GiB", "free some space"),
        ({"free_disk": 5 * GiB}, "disk here", "note", "5.0 GiB", "output.dir"),
        ({"free_hub_disk": GiB}, "disk, Hub cache", "note", "1.0 GiB", "HF_HOME"),
        (installed(xformers=None), "xformers", "note", "not installed; PyTorch's attention", "xformers==1.2.3"),
        ({"broken": {"xformers": "built for 2.9"}}, "xformers", "note", "built for 2.9", "xformers==1.2.3"),
        (installed(flash_attn=None), "flash attention", "note", "not installed", "optional"),
        ({"broken": {"flash-attn": "undefined symbol"}}, "flash attention", "note", "undefined", "pip uninstall"),
        ({"vllm_problem": "is not there; make it"}, "vLLM", "note", "is not there; make it", "optional"),
        ({"commands": frozenset({"llama-quantize"})}, "llama.cpp", "note", "llama-mtmd-cli, convert", "llama.cpp"),
        ({"has_token": False}, "Hub token", "note", "none", "hf auth login"),
    ],
)
def test_one_thing_amiss_is_one_line_with_its_remedy(changes, name, status, found, remedy):
    lines = {line.name: line for line in doctor.examine(replace(HOST, **changes))}
    line = lines[name]
    assert line.status == status and found in line.found and remedy in line.remedy
    assert bool(line.remedy) == (status != "ok")
    assert sum(line.status == "bad" for line in lines.values()) == (status == "bad")


@pytest.mark.parametrize(
    ("changes", "code"), [({}, 0), (NO_GPU, 0), ({"vllm_problem": "is not there"}, 0), ({"free_ram": 1}, 1)]
)
def test_exit_code_1_only_where_training_could_not_work(changes, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "look", lambda: replace(HOST, **changes))
    assert cli.main(["doctor"]) == code
    assert ("Training cannot work here: 1 problem to fix." in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    ("capability", "architecture", "runs"),
    [
        ((8, 9), "sm_86", True),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_86", False),
        ((12, 0), "compute_90", True),
        ((9, 0), "sm_90a", True),
        ((9, 1), "sm_90a", False),
        ((12, 0), "sm_120", True),
        ((12, 0), "gfx90", False),
    ],
)
def test_which_kernels_a_gpu_runs(capability, architecture, runs):
    assert doctor._runs_on(capability, architecture) is runs


# --- Unsloth's cache -------------------------------------------------------------------------------------------------


def write_cached(folder, *versions):
    folder.mkdir(exist_ok=True)
    head = '"""\n' + "".join(f"{version}\n" for version in versions) + '__UNSLOTH_VERSIONING__\n"""\n'
    (folder / "UnslothGRPOTrainer.py").write_text((head if versions else "") + "import torch\n")


def test_unsloths_cache_is_stale_if_another_version_wrote_it(tmp_path):
    cache = tmp_path / "unsloth_compiled_cache"
    now = {"unsloth-zoo": "4", "unsloth": "3", "transformers": "2", "trl": "1.15.0"}
    host = replace(HOST, cache=cache, installed=now)
    assert doctor.cache_line(host).found == "none"
    write_cached(cache, "4", "3", "2", "1.15.0")
    assert doctor.cache_line(host).status == "ok"
    write_cached(cache, "4", "3", "2", "1.14.0")
    line = doctor.cache_line(host)
    assert (line.status, line.found, line.remedy) == ("note", "written by trl 1.14.0", "rm -r unsloth_compiled_cache")
    write_cached(cache)
    assert doctor.cache_line(host).found == "written by an older installation"


def test_the_installed_unsloth_records_versions_in_the_order_that_is_read_here():
    """Read as text: it cannot be imported without a GPU."""
    zoo = Path(next(path for path in sys.path if (Path(path) / "unsloth_zoo").is_dir())) / "unsloth_zoo"
    source = (zoo / "compiler.py").read_text()
    start = source.index("    versioning = (")
    written = source[start : source.index("__UNSLOTH_VERSIONING__", start)]
    places = [written.index("{" + name.replace("-", "_") + "_version}") for name in doctor_host.CACHE_PACKAGES]
    assert places == sorted(places)


# --- looking ---------------------------------------------------------------------------------------------------------


def test_the_tested_set_is_constraints_txt(tmp_path):
    tested = doctor_host.tested_versions()
    pins = [line for line in (PROJECT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(tested) == len(pins)
    assert {"torch", "unsloth-zoo", "pyyaml"} <= tested.keys()  # under canonical names
    assert set(doctor.OWN_LINES) <= tested.keys()
    assert doctor_host.tested_versions([tmp_path / "absent.txt"]) == {}


def test_imports_are_tried_in_another_process_that_may_crash_print_or_hang(tmp_path, monkeypatch):
    """IMPORTS are looked up over there, so the fakes are modules of the names that they import."""
    fakes = {
        "torch": "print('noise', end='')",
        "torchvision": "import os; os._exit(7)",
        "peft": "raise SystemExit('no\\n peft')",
        "bitsandbytes": "import time; time.sleep(60)",
        "trl": "GRPOTrainer = 1",
        "transformers": "pass",
    }
    for name, code in fakes.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    results = doctor_host.try_imports(
        ["torch", "torchvision", "peft", "trl", "transformers", "bitsandbytes"], seconds=5
    )
    assert results["torch"].problem is None and results["trl"].problem is None
    assert results["torchvision"].problem == "the interpreter crashed (exit code 7)"
    assert results["peft"].problem == "SystemExit: no peft"
    assert results["transformers"].problem.startswith("AttributeError")
    assert results["bitsandbytes"].problem is not None


def test_a_gpu_survives_its_way_through_json():
    import json
    from dataclasses import asdict

    assert doctor_host._as_gpu(json.loads(json.dumps(asdict(RTX)))) == RTX


def test_private_names_are_taken_out():
    text = "/home/ada/venv/lib/x.so and /data/ada/models and adapter"
    assert doctor.without_private_names(text, "/home/ada", "ada") == "~/venv/lib/x.so and /data/USER/models and adapter"
    assert doctor.without_private_names("/lib/x.so", "/", "") == "/lib/x.so"


@pytest.mark.slow
def test_the_real_command_on_this_host_shows_no_token_and_no_path(tmp_path):
    """One token in the environment, another in the Hub's file."""
    home = tmp_path / "home"
    (home / "hub").mkdir(parents=True)
    (home / "token").write_text("hf_PlantedTokenThatNobodyMaySee")
    environment = {**os.environ, "HF_HOME": str(home), "HF_TOKEN": "hf_AnotherPlantedToken"}
    finished = subprocess.run(
        [sys.executable, "-m", "apo_lora.commands.main", "doctor"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Hub token       present (not shown)" in finished.stdout and "Training works here" in finished.stdout
    shown = finished.stdout + finished.stderr
    assert "Planted" not in shown
    assert str(Path.home()) not in shown and str(tmp_path) not in shown and f"/{getpass.getuser()}/" not in shown
    assert shown.isascii()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]  # nothing was written
