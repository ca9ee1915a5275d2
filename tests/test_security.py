"""Nothing executes what comes from data, a model, an adapter or a checkpoint, and no token is ever written down.

docs/security.md says in words what is trusted and what is not.
"""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import forks
import pytest
from conftest import PROJECT

from apo_lora.commands.main import main
from apo_lora.recipe.files import find_recipe, load_recipe
from apo_lora.run.checkpoints import COMPLETE, seal_checkpoint
from apo_lora.run.directory import RunDir
from apo_lora.tiny import BASE_DIR

SOURCES = sorted((PROJECT / "apo_lora").rglob("*.py"))
SMALL = [
    "train.evaluate=false", "train.preflight=false", "data.limit=8", "grpo.prompts_per_step=2",
    "grpo.num_generations=2", "grpo.completions_per_pass=4", "grpo.max_completion_length=16", "train.save_steps=1",
]  # fmt: skip
TOKENS = {
    "HF_TOKEN": "hf_ThisIsTheTokenOfTheTest",
    "HUGGING_FACE_HUB_TOKEN": "hf_ThisIsAnOlderNameOfIt",
    "WANDB_API_KEY": "0123456789abcdefThisIsTheKeyOfTheTest",
}


class Poison:
    """What a pickle can do: unpickling this makes a file."""

    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


@pytest.fixture
def sentinel(tmp_path):
    """A path that exists once something was executed."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


# --- the source ------------------------------------------------------------------------------------------------------


def calls(tree):
    """(dotted name, call) of every call in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def fault(name: str, call: ast.Call) -> str | None:
    """Why this call has no place in the package."""
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    last = name.rpartition(".")[2]
    if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
        return "runs text"
    if given.get("shell", "False") != "False":
        return "runs a shell"
    if last == "load" and name.split(".")[0] in ("pickle", "dill", "joblib", "marshal", "shelve"):
        return "reads a pickle"
    if name == "torch.load" and given.get("weights_only") != "True":
        return "reads a pickle"
    if given.get("allow_pickle", "False") != "False":
        return "reads a pickle"
    if last in ("load", "load_all") and name.startswith("yaml.") and given.get("Loader") != "_RecipeLoader":
        return "reads YAML that makes objects"
    if given.get("trust_remote_code", "False") != "False":
        return "runs code of a model"
    auto = re.fullmatch(r"(Auto\w+|FastVisionModel)\.from_pretrained", name)
    if auto and given.get("trust_remote_code") != "False":
        return "leaves trust_remote_code to a default"
    if re.search(r"AutoModel\w*\.from_pretrained", name) and given.get("use_safetensors") != "True":
        return "may read weights that are a pickle"
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_no_call_in_the_source_runs_what_it_reads(path):
    found = [(name, fault(name, call)) for name, call in calls(ast.parse(path.read_text())) if fault(name, call)]
    assert not found


@pytest.mark.parametrize(
    "bad",
    [
        "eval(x)", "os.system(x)", "subprocess.run(x, shell=True)", "pickle.load(f)", "torch.load(f)", "yaml.load(f)",
        "torch.load(f, weights_only=False)", "yaml.load(f, Loader=yaml.Loader)", "numpy.load(f, allow_pickle=True)",
        "AutoProcessor.from_pretrained(x)", "AutoModel.from_pretrained(x, trust_remote_code=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=True, use_safetensors=True)",
    ],
)  # fmt: skip
def test_the_scan_sees_what_it_looks_for(bad):
    assert any(fault(name, call) for name, call in calls(ast.parse(bad)))


def test_code_is_imported_by_a_computed_name_in_two_places_only():
    """A user's own reward function, and the public names, which stand in the source."""
    loaders = ("importlib.import_module", "import_module", "importlib.util.spec_from_file_location", "runpy.run_path")
    found = []
    for text in (path.read_text() for path in SOURCES):
        named = [call.args[0] for name, call in calls(ast.parse(text)) if name in loaders]
        found += [text] if any(not isinstance(name, ast.Constant) for name in named) else []
    homes = ("def load_reward(", "_HOMES = {")
    assert len(found) == 2 and all(any(home in text for home in homes) for text in found)


def test_no_token_in_the_repository():
    """Nor in the notebook's outputs, which is where they get in."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for path in (PROJECT / name for name in listed.stdout.split("\0") if name):
        content = path.read_bytes()
        assert not re.search(rb"\bhf_[A-Za-z]{34}\b|\bwandb_v1_\w{40,}|\bgh[pousr]_[A-Za-z0-9]{36}\b", content), path


# --- recipes and reward plug-ins -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "data: !!python/object/apply:os.mkdir ['{sentinel}']\n",
        "data: {{train: !!python/object/new:os.mkdir ['{sentinel}']}}\n",
        "!!python/object/apply:os.mkdir ['{sentinel}']: 1\n",
    ],
)
def test_a_recipe_makes_no_object(text, tmp_path, sentinel, capsys):
    (tmp_path / "mine.yaml").write_text(text.format(sentinel=sentinel))
    assert main(["train", "--recipe", str(tmp_path / "mine.yaml")]) == 2
    assert "not valid YAML" in capsys.readouterr().err


def test_an_override_makes_no_object(sentinel, capsys):
    override = f"data.train=!!python/object/apply:os.mkdir ['{sentinel}']"
    assert main(["train", "--recipe", "tiny_cpu", override]) == 2
    assert "not valid YAML" in capsys.readouterr().err


@pytest.fixture
def strangers_run(tmp_path, load_tiny, stir_adapter):
    """A run directory from elsewhere, whose recipe names a reward function that lies beside it."""
    run, executed = RunDir(tmp_path / "theirs"), tmp_path / "executed"
    policy = load_tiny()
    stir_adapter(policy.model, scale=0.05)
    policy.model.save_pretrained(run.adapter)
    evil = run.path / "evil.py"
    evil.write_text(
        f"import os\nos.mkdir({str(executed)!r})\ndef f(completions, **columns): return [0.0] * len(completions)\n"
    )
    functions = f"rewards.functions=[accuracy,'{evil}:f']"
    recipe = load_recipe(find_recipe("tiny_cpu"), [*SMALL, functions, f"output.dir={tmp_path / 'mine'}"])
    run.recipe.write_text(recipe.to_yaml())
    return run, executed


READS_A_RUN = (
    ["chat", "{run}", "How many?", "--max-tokens", "2"],
    ["eval", "{run}", "--limit", "2"],
    ["report", "{run}"],
    ["export", "{run}", "--to", "merged"],
    ["check-data", "--recipe", "{run}/recipe.yaml"],
    ["check-rewards", "--recipe", "{run}/recipe.yaml"],
    ["plan", "--recipe", "{run}/recipe.yaml"],
    ["preflight", "--recipe", "{run}/recipe.yaml"],
)


@pytest.mark.parametrize("command", READS_A_RUN, ids=lambda command: command[0])
def test_looking_at_a_strangers_run_runs_none_of_its_code(command, strangers_run):
    run, executed = strangers_run
    assert main([word.replace("{run}", str(run.path)) for word in command]) == 0
    assert not executed.exists()


def test_training_by_a_strangers_recipe_is_trust(strangers_run):
    """The other side of the test above: here the function is asked for, and runs. docs/security.md says so."""
    run, executed = strangers_run
    assert main(["train", "--recipe", str(run.recipe), "train.max_steps=1"]) == 0
    assert executed.exists()


# --- pickles ---------------------------------------------------------------------------------------------------------


def test_the_poison_works(tmp_path):
    (tmp_path / "poison").write_bytes(pickle.dumps(Poison(tmp_path / "executed")))
    pickle.loads((tmp_path / "poison").read_bytes())
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("name", ["data.pkl", "data.pt", "data.npy", "data.json", "data.jsonl", "data.parquet"])
def test_a_pickle_for_a_data_set_is_not_read(name, tmp_path, sentinel, capsys):
    (tmp_path / name).write_bytes(pickle.dumps(Poison(sentinel)))
    assert main(["check-data", "--recipe", "tiny_cpu", f"data.train={tmp_path / name}"]) == 2
    assert name in capsys.readouterr().err


def test_an_adapter_that_is_a_pickle_is_not_read(strangers_run, capsys):
    import torch

    run, executed = strangers_run
    (run.adapter / "adapter_model.safetensors").unlink()
    torch.save({"weight": Poison(executed)}, run.adapter / "adapter_model.bin")
    assert main(["chat", str(run.path), "How many?"]) == 2
    assert "no adapter_model.safetensors" in capsys.readouterr().err and not executed.exists()


def test_a_base_that_is_a_pickle_is_not_read(tmp_path, sentinel, capsys):
    import torch

    base = tmp_path / "base"
    shutil.copytree(BASE_DIR, base)
    (base / "model.safetensors").unlink()
    torch.save({"weight": Poison(sentinel)}, base / "pytorch_model.bin")
    assert main(["train", "--recipe", "tiny_cpu", *SMALL, f"model.name={base}", f"output.dir={tmp_path / 'run'}"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_base_with_code_of_its_own_runs_none(tmp_path, sentinel, capsys):
    """As a Hub repository with a model class: config.json names it, and trust_remote_code would import it."""
    base = tmp_path / "base"
    shutil.copytree(BASE_DIR, base)
    config = json.loads((base / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.C", "AutoModelForImageTextToText": "theirs.M", "AutoProcessor": "theirs.P"},
    }
    (base / "config.json").write_text(json.dumps(config))
    (base / "theirs.py").write_text(f"import os\nos.mkdir({str(sentinel)!r})\n")
    assert main(["check-data", "--recipe", "tiny_cpu", f"model.name={base}"]) in (0, 2)  # a processor needs no model
    assert main(["train", "--recipe", "tiny_cpu", *SMALL, f"model.name={base}", f"output.dir={tmp_path / 'run'}"]) == 2
    assert str(base) in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One step and its checkpoint, trained with tokens in the environment: (run, what the command printed)."""
    run = RunDir(tmp_path_factory.mktemp("security") / "run")
    options = [*SMALL, "train.max_steps=1", "output.report_to=[tensorboard]", f"output.dir={run.path}"]
    ran = forks.run(["-m", "apo_lora", "train", "--recipe", "tiny_cpu", *options], env=os.environ | TOKENS)
    assert ran.returncode == 0, ran.stderr
    return run, (ran.stdout + ran.stderr).encode()


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "scheduler.pt", "training_args.bin"])
def test_a_poisoned_checkpoint_runs_nothing(name, finished, tmp_path, sentinel, capsys):
    """Sealed anew, as a stranger would: the hashes are right and the content is not."""
    import torch

    run = RunDir(tmp_path / "run")
    shutil.copytree(finished[0].path, run.path)
    checkpoint = run.valid_checkpoints()[-1]
    assert (checkpoint / name).is_file()
    torch.save({"python": Poison(sentinel), "state": Poison(sentinel)}, checkpoint / name)
    (checkpoint / COMPLETE).unlink()
    seal_checkpoint(checkpoint)
    options = [*SMALL, "train.max_steps=2", "output.report_to=[tensorboard]", f"output.dir={run.path}"]
    code = main(["train", "--recipe", "tiny_cpu", *options, "--resume", "auto"])
    error = capsys.readouterr().err
    # training_args.bin is there for people; nothing reads it.
    assert code == (0 if name == "training_args.bin" else 2)
    assert code == 0 or "contains objects other than numbers and tensors" in error


# --- tokens ----------------------------------------------------------------------------------------------------------


def files_below(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_no_token(*contents: bytes):
    for content in contents:
        assert not [name for name, token in TOKENS.items() if token.encode() in content]


def test_a_run_holds_and_prints_no_token(finished):
    run, printed = finished
    files = files_below(run.path)
    assert len(files) > 15 and any("tensorboard" in name for name in files)
    assert_no_token(printed, *files.values())


FAILS = {
    "a model without its GPU": ["train", "--recipe", "single_gpu", "model.engine=transformers"],
    "a data set behind the network": ["check-rewards", "--recipe", "tiny_cpu", "data.train=someone/private"],
    "a push that nobody answers": ["export", "{run}", "--to", "hub", "--repo", "me/it"],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAILS)
def test_what_fails_prints_no_token(what, finished, tmp_path):
    command = [word.replace("{run}", str(finished[0].path)) for word in FAILS[what]]
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    environment = os.environ | TOKENS | nobody
    ran = forks.run(["-m", "apo_lora.commands.main", *command], cwd=tmp_path, env=environment, timeout=300)
    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr
    said = (ran.stdout + ran.stderr).encode()
    assert_no_token(said, *files_below(tmp_path).values(), *files_below(finished[0].path).values())


def test_a_traceback_shows_no_token():
    """Of an error that is ours: the values of variables are not shown, and the environment is no argument."""
    code = (
        "import sys, apo_lora.rewards.check as c, apo_lora.commands.main as cli\n"
        "def broken(*a, **k): raise RuntimeError('ours')\n"
        "c.check_rows = broken\n"
        "cli.main(['check-rewards', '--recipe', 'tiny_cpu', 'data.limit=4'])\n"
    )
    # No fork: an interpreter prints its own.
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | TOKENS)
    assert b"RuntimeError: ours" in ran.stderr
    assert_no_token(ran.stdout, ran.stderr)
