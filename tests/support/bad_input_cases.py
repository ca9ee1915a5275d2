"""What users do wrong, and the line that they are told: a table to be read. tests/commands/test_bad_input.py runs it.

Each row: what was done in words, the command after `apo-lora`, a regular expression for what it says, and the files that
were there. A command that says several things has a line for each, and an expression for each in order.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_sets import encoded, folder, jsonl, link, noise, parquet, picture, png, png_of_size

from apo_lora.recipe.files import find_recipe


class Case(NamedTuple):
    what: str
    command: str
    says: str | tuple[str, ...]
    files: dict[str, str | bytes | Callable[[Path], None]] = {}
    seconds: int = 5
    """Those that need a model's weights may take longer."""


# --- builders --------------------------------------------------------------------------------------------------------

GOOD = {"problem": "How many?", "answer": "3"}
TINY = find_recipe("tiny_cpu").read_text(encoding="utf-8")
ADAPTER_CONFIG = json.dumps({"base_model_name_or_path": "tiny", "peft_type": "LORA", "r": 16, "lora_alpha": 32})


def recipe(what: str, says: str | tuple[str, ...], text: str | bytes, *overrides: str) -> Case:
    """A recipe of the user's own with this text."""
    return Case(what, " ".join(["train --recipe mine.yaml", *overrides]), says, {"mine.yaml": text})


def override(says: str, *overrides: str) -> Case:
    return Case(f"override {' '.join(overrides)}", " ".join(["train --recipe tiny_cpu", *overrides]), says)


CHECK = "check-data --recipe tiny_cpu data.train="
CANNOT = r"^\S*data.jsonl: \d+ of \d+ rows cannot be used"


def data(what: str, name: str, says: str | tuple[str, ...], files: dict, *overrides: str) -> Case:
    return Case(what, f"{CHECK}{name} {' '.join(overrides)}".strip(), says, files)


def row(what: str, says: str, *rows) -> Case:
    """A data set of such rows alone: none can be used, so there is nothing to train on."""
    return data(f"row: {what}", "data.jsonl", (CANNOT, rf"data.jsonl row 1: {says}"), {"data.jsonl": jsonl(*rows)})


def image(what: str, says: str, name: str = "a.png", **files) -> Case:
    """One row with one image, called `name` in the row."""
    row = {**GOOD, "image": name}
    given = {path.replace("__", "/").replace("_dot_", "."): content for path, content in files.items()}
    return data(
        f"image: {what}",
        "set/data.jsonl",
        (CANNOT, rf"data.jsonl row 1: {says}"),
        {"set/data.jsonl": jsonl(row), **given},
    )


def run_directory(what: str, command: str, says: str, seconds: int = 5, **changed: str | bytes | None) -> Case:
    """A run's record with a file put in its place, or taken away (None)."""
    files = {
        "run/recipe.yaml": TINY,
        "run/adapter/adapter_config.json": ADAPTER_CONFIG,
        "run/adapter/adapter_model.safetensors": b"",
    }
    files |= {f"run/{name}": content for name, content in changed.items()}
    return Case(what, command, says, {name: content for name, content in files.items() if content is not None}, seconds)


# --- the command line ------------------------------------------------------------------------------------------------

COMMAND_LINE = [
    Case("no verb", "", r"apo-lora: .*VERB.*see apo-lora --help"),
    Case("a verb with a slip", "trian --recipe tiny_cpu", r"unknown verb 'trian'; did you mean train\?; see apo-lora --help"),
    Case("a verb that is none", "fly", r"unknown verb 'fly'; see apo-lora --help"),
    Case("no recipe", "train", r"required: --recipe; see apo-lora train --help"),
    Case("--recipe without its value", "train --recipe", r"--recipe: expected one argument"),
    Case("an unknown option", "train --recipe tiny_cpu --stpes 3", r"--stpes; see apo-lora train --help"),
    Case("an option for another verb", "check-data --recipe tiny_cpu --resume auto", r"--resume; see apo-lora check-data --help"),
    Case("--resume without its value", "train --recipe tiny_cpu --resume", r"--resume: expected one argument"),
    Case("a recipe's name with a slip", "train --recipe tiny_cup.yaml", r"tiny_cup.yaml: no such file.*did you mean tiny_cpu\?"),
    Case("a recipe that is nowhere", "train --recipe x/y.yaml", r"recipe x/y.yaml: no such file.*`apo-lora recipes` lists them"),
    Case("a folder for a recipe", "train --recipe here", r"recipe here: is a folder; give the .yaml file in it", {"here": folder}),
    Case("a recipe to show that is nowhere", "recipes nowhere", r"recipe nowhere: no such file.*lists them"),
    Case("an override without a value", "train --recipe tiny_cpu train.max_steps", r"'train.max_steps': write it as section.key=value"),
    Case("an override without a section", "train --recipe tiny_cpu max_steps=3", r"'max_steps=3': write it as section.key=value"),
    Case("an override that is no YAML", "train --recipe tiny_cpu data.train=[", r"'data.train=\[': the value is not valid YAML \(.*\); quote it"),
    Case("a card of no size", "plan --recipe tiny_cpu --vram 0", r"--vram: '0': GPU memory must be given in GB, for instance 8"),
    Case("a card in words", "plan --recipe tiny_cpu --vram big", r"--vram: 'big': GPU memory must be given in GB"),
    Case("a card of nan GB", "plan --recipe tiny_cpu --vram nan", r"--vram: 'nan': GPU memory must"),
    Case("a chat without a question", "chat run", r"required: question"),
    Case("no tokens", "chat run hi --max-tokens 0", r"--max-tokens: '0' is not a valid number of tokens; give a whole number of at least 1"),
    Case("tokens in words", "chat run hi --max-tokens few", r"--max-tokens: 'few' is not a valid number of tokens"),
    Case("an export to nowhere", "export run", r"required: --to"),
    Case("an export to what is not known", "export run --to onnx", r"--to: invalid choice: 'onnx' \(choose from"),
    Case("a quantisation that is not known", "export run --to gguf --quantization Q2", r"--quantization: invalid choice: 'Q2'"),
    Case("private and public", "export run --to hub --private --public", r"--public: not allowed with argument --private"),
]  # fmt: skip

# --- recipes ---------------------------------------------------------------------------------------------------------

RECIPES = [
    recipe("an empty recipe", r"mine.yaml: a recipe is a mapping of sections \(model, lora", ""),
    recipe("a recipe that is a list", r"mine.yaml: a recipe is a mapping of sections", "- a\n- b\n"),
    recipe("a recipe that is a word", r"mine.yaml: a recipe is a mapping of sections", "train"),
    recipe("a bracket left open", r"mine.yaml: line 2, column 1 is not valid YAML", "data: [boards\n"),
    recipe("a tab for an indent", r"mine.yaml: line 2, column 1 is not valid YAML", "data:\n\ttrain: boards\n"),
    recipe("not UTF-8", r"mine.yaml: cannot be read .*utf-8", b"data: {train: \xff\xfe}\n"),
    recipe("a null byte", r"mine.yaml: .*not valid YAML", b"data: {train: a\x00b}\n"),
    recipe("a picture for a recipe", r"mine.yaml: ", png()),
    recipe("a tag that would run a command", r"mine.yaml: line 1, column \d+ is not valid YAML \(could not determine a constructor",
           "data: {train: !!python/object/apply:os.system ['touch ran']}\n"),
    recipe("a tag that would import a module", r"is not valid YAML \(could not determine a constructor", "data: !!python/name:os.system\n"),
    recipe("a document nested ten thousand deep", r"mine.yaml: nested too deeply", "[" * 10_000),
    recipe("a billion laughs", r"mine.yaml: line 2, column \d+ is not valid YAML \(aliases are not supported; write out the value", "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)) + "data: *i\n"),
    recipe("a recursive alias", r"is not valid YAML \(aliases are not supported", "data: &a {train: *a}\n"),
    recipe("two documents", r"mine.yaml: line \d+, column \d+ is not valid YAML", "data: {train: boards}\n---\ndata: {train: boards}\n"),
    recipe("a section given twice", r"mine.yaml: line 2, column 1 is not valid YAML \(duplicate key data; remove one", "data: {train: boards}\ndata: {limit: 5}\n"),
    recipe("a key given twice", r"line 1, column \d+ is not valid YAML \(duplicate key train", "data: {train: boards, train: x.jsonl}\n"),
    recipe("a key that is a list", r"mine.yaml: line 1, column \d+ is not valid YAML \(found unhashable key\)", "? [data]\n: {train: boards}\n"),
    recipe("no data", r"mine.yaml: data: missing; it is required", "model: {name: tiny}\n"),
    recipe("no training data", r"mine.yaml: data.train: missing; it is required", "data: {eval: boards}\n"),
    recipe("a section with a slip", r"mine.yaml: modle: unknown key; did you mean model\?", "data: {train: boards}\nmodle: {name: tiny}\n"),
    recipe("a key with a slip", r"grpo.num_generation: unknown key; did you mean grpo.num_generations\?",
           "data: {train: boards}\ngrpo: {num_generation: 4}\n"),
    recipe("a key in the wrong section", r"train.num_generations: unknown key; did you mean grpo.num_generations\?",
           "data: {train: boards}\ntrain: {num_generations: 4}\n"),
    recipe("a section that is a list", r"mine.yaml: grpo: must be a mapping of keys, not", "data: {train: boards}\ngrpo: [1, 2]\n"),
    recipe("a key that is a number", r"mine.yaml: .*5", "data: {train: boards}\n5: {a: 1}\n"),
    recipe("a key in a section that is a number", r"mine.yaml: data.5: 5 is not valid \(keys should be strings\)", "data: {train: boards, 5: 1}\n"),
    recipe("three slips at once", (r"mine.yaml: data.trian: unknown key", r"mine.yaml: grpo.beta: 'x' is not valid",
                                   r"mine.yaml: grpo.completions_per_pass: 7 does not divide"),
           "data: {train: boards, trian: x}\ngrpo: {beta: x, completions_per_pass: 7}\n"),
    override(r"tiny_cpu.yaml: grpo.num_generations: 'eight' is not valid", "grpo.num_generations=eight"),
    override(r"grpo.num_generations: 1 is not valid \(input should be greater than or equal to 2\)", "grpo.num_generations=1"),
    override(r"grpo.num_generations: 2.5 is not valid", "grpo.num_generations=2.5"),
    override(r"grpo.num_generations: None is not valid", "grpo.num_generations="),
    override(r"train.learning_rate: 0 is not valid \(input should be greater than 0\)", "train.learning_rate=0"),
    override(r"train.learning_rate: nan is not valid", "train.learning_rate=.nan"),
    override(r"train.learning_rate: inf is not valid", "train.learning_rate=.inf"),
    override(r"train.learning_rate: 'fast' is not valid", "train.learning_rate=fast"),
    override(r"train.seed: -1 is not valid", "train.seed=-1"),
    override(r"train.seed: \d+ is not valid", f"train.seed={2**64}"),
    override(r"train.max_steps: 0 is not valid", "train.max_steps=0"),
    override(r"grpo.top_p: 1.5 is not valid \(input should be less than or equal to 1\)", "grpo.top_p=1.5"),
    override(r"lora.r: 0 is not valid", "lora.r=0"),
    override(r"lora.dropout: 1 is not valid", "lora.dropout=1"),
    override(r"model.dtype: 'bf16' is not valid \(input should be 'auto', 'bfloat16'", "model.dtype=bf16"),
    override(r"model.load_in_4bit: 'maybe' is not valid", "model.load_in_4bit=maybe"),
    override(r"apo.dads: 'linear' is not valid \(input should be 'complement_exp'", "apo.dads=linear"),
    override(r"apo.stcr: 1 is not valid \(input should be greater than 1\)", "apo.stcr=1"),
    override(r"apo.dads: has no effect with grpo.beta = 0; set grpo.beta above 0", "grpo.beta=0"),
    override(r"grpo.completions_per_pass: 7 does not divide .*; use one of \[1, 2, 4", "grpo.completions_per_pass=7"),
    override(r"rewards.correct_by: 'accuracy' must be one of rewards.functions \['format'\]", "rewards.functions=[format]"),
    override(r"rewards.weights: 3 weights for 2 functions; give one per function", "rewards.weights=[1,2,3]"),
    override(r"rewards.functions: accuracy must not stand twice", "rewards.functions=[accuracy,format,accuracy]"),
    override(r"rewards.weights: all are 0, so there is nothing to learn from", "rewards.weights=[0,0]"),
    override(r"rewards.functions: must be a list such as \[a, b\], not 3", "rewards.functions=3"),
    override(r"'train.seed=012': .* \(012 would be read as 10; write a plain decimal number\)", "train.seed=012"),
    override(r"'train.max_steps=2:00': .* \(2:00 would be read as 120;", "train.max_steps=2:00"),
    override(r"lora.target_modules: lm_head shares its weight .*; leave it out", "lora.target_modules=[q_proj,lm_head]"),
    Case("a layer that the model does not have", "train --recipe tiny_cpu lora.target_modules=[q_proj,nowhere_proj]",
         r"lora.target_modules: tiny has no layer nowhere_proj; it has down_proj, gate_proj", {}, 60),
    override(r"lora.target_modules: must not be empty; name layers", "lora.target_modules=[]"),
    override(r"data.min_pixels: 9999999 must not exceed data.max_pixels", "data.min_pixels=9999999 data.max_pixels=784"),
    override(r"output.report_to: 'mlflow' is not valid|output.report_to.0: 'mlflow' is not valid", "output.report_to=[mlflow]"),
    override(r"output.report_to: trackio is not installed; pip install trackio", "output.report_to=[trackio]"),
]  # fmt: skip

# --- rewards and models ----------------------------------------------------------------------------------------------

REWARDS_AND_MODELS = [
    override(r"reward 'acuracy' does not name a function; did you mean accuracy\?", "rewards.functions=[accuracy,acuracy]"),
    override(r"reward 'nowhere.py:f': no file 'nowhere.py' \(looked in .*\); paths are relative to", "rewards.functions=[accuracy,'nowhere.py:f']"),
    override(r"reward 'no_such_module:f': no module named 'no_such_module'; install it, or give its file", "rewards.functions=[accuracy,no_such_module:f]"),
    override(r"reward 'mine.py:' does not name a function; write it as", "\"rewards.functions=[accuracy,'mine.py:']\""),
    Case("a reward file that does not parse", "train --recipe tiny_cpu rewards.functions=[accuracy,'mine.py:f']",
         r"reward 'mine.py:f' could not be imported: SyntaxError.*line 1", {"mine.py": "def f(:\n"}, 30),
    Case("a reward file that raises", "train --recipe tiny_cpu rewards.functions=[accuracy,'mine.py:f']",
         r"reward 'mine.py:f' could not be imported: ZeroDivisionError: division by zero; fix it", {"mine.py": "1 / 0\n"}, 30),
    Case("a reward that is not in its file", "train --recipe tiny_cpu rewards.functions=[accuracy,'mine.py:lenght']",
         r"mine.py has no 'lenght'; did you mean 'length'\?", {"mine.py": "def length(**k): return []\n"}, 30),
    Case("a reward that is a number", "train --recipe tiny_cpu rewards.functions=[accuracy,'mine.py:f']",
         r"'f' must be a function, not int", {"mine.py": "f = 1\n"}, 30),
    Case("a reward that leaves the program", "train --recipe tiny_cpu rewards.functions=[accuracy,'mine.py:f']",
         r"reward 'mine.py:f' raised SystemExit: 0 \(mine.py line 3\); fix the function",
         {"mine.py": "import sys\ndef f(completions, **columns):\n    sys.exit(0)\n"}, 60),
    Case("a reward that wants a column that is not there", "train --recipe tiny_cpu rewards.functions=[accuracy,'mine.py:f']",
         r"reward 'mine.py:f' cannot be called: missing a required argument: 'depth'; the columns are .*answer",
         {"mine.py": "def f(completions, depth, **columns):\n    return [0.0] * len(completions)\n"}, 60),
    Case("a reward that takes nothing", "train --recipe tiny_cpu rewards.functions=[accuracy,'mine.py:f']",
         r"must be callable as f\(prompts, completions, \*\*columns\)", {"mine.py": "def f(): return []\n"}, 30),
    Case("a base folder that is not there", "train --recipe tiny_cpu model.name=/no/such/model", r"model.name: /no/such/model .*", {}, 30),
    Case("a base folder that is empty", "train --recipe tiny_cpu model.name=./base", r"model.name: ./base cannot be loaded", {"base": folder}, 30),
    Case("a base whose config is cut off", "check-data --recipe tiny_cpu model.name=./base", r"model.name: ./base cannot be loaded",
         {"base/config.json": '{"model_type": "qw'}, 30),
    Case("a plan for a base whose config is cut off", "plan --recipe tiny_cpu model.name=./base",
         r"model.name: the config.json of ./base cannot be read", {"base/config.json": "{"}),
    Case("a plan for a base of another kind", "plan --recipe tiny_cpu model.name=./base", r"model.name: ./base has the unsupported model type llama; supported: qwen2_5_vl",
         {"base/config.json": '{"model_type": "llama"}'}),
    Case("a plan for a base of no size", "plan --recipe tiny_cpu model.name=./base", r"./base: its config has hidden_size: None; it must be a positive",
         {"base/config.json": '{"model_type": "qwen2_5_vl"}'}),
]  # fmt: skip

# --- data sets -------------------------------------------------------------------------------------------------------

DATA_FILES = [
    data("no such file", "no.jsonl", r"no.jsonl: no such file or folder \(relative to .*\); check the path", {}),
    data("no such path", "./set/x", r"./set/x: no such file or folder", {}),
    data("a URL", "https://x.org/data.jsonl", r"https://x.org/data.jsonl: no such file or folder", {}),
    data("no name", "", r"data.train: None is not valid", {}),
    Case("an empty name", "check-data --recipe tiny_cpu \"data.train=''\"", r"data: the name is empty; give `boards`, a file, a folder"),
    data("a Hub id without a network", "someone/nothing", r"someone/nothing: neither a local path nor a data set on the Hub", {}),
    data("a split that boards do not have", "boards", r"boards: no split 'validation'; set data.split or data.eval_split to train or test", {}, "data.split=validation"),
    data("an empty file", "data.jsonl", r"data.jsonl: the file is empty", {"data.jsonl": ""}),
    data("a file of blank lines", "data.jsonl", r"data.jsonl: contains no rows", {"data.jsonl": "\n\n"}),
    data("a CSV", "data.csv", r"data.csv: unsupported file type .csv; use .jsonl, .json, .parquet", {"data.csv": "problem,answer\n?,1\n"}),
    data("a file without an ending", "data", r"data: unsupported file type \(no suffix\)", {"data": jsonl(GOOD)}),
    data("a pickle", "data.pkl", r"data.pkl: unsupported file type .pkl", {"data.pkl": b"cos\nsystem\n(S'touch ran'\ntR."}),
    data("JSONL with a broken line", "data.jsonl", r"data.jsonl line 2: not valid JSON \(.*line 1 column \d+\); fix or remove the line",
         {"data.jsonl": jsonl(GOOD) + '{"problem": \n' + jsonl(GOOD)}),
    data("JSONL of five broken lines", "data.jsonl", (r"line 1: not valid", r"line 2: not valid", r"line 3: not valid", r"data.jsonl: and 2 more lines like these"),
         {"data.jsonl": "{\n" * 5}),
    data("JSONL cut off in its last line", "data.jsonl", r"data.jsonl line 2: not valid JSON", {"data.jsonl": jsonl(GOOD) + jsonl(GOOD)[:-9]}),
    data("JSONL in UTF-16", "data.jsonl", r"data.jsonl: cannot be read as UTF-8 text", {"data.jsonl": jsonl(GOOD).encode("utf-16")}),
    data("JSONL in Latin-1", "data.jsonl", r"data.jsonl: cannot be read as UTF-8 text", {"data.jsonl": b'{"problem": "\xe9", "answer": "1"}\n'}),
    data("JSON nested a hundred thousand deep", "data.jsonl", r"data.jsonl line 1: not valid JSON \(nested too deeply\)", {"data.jsonl": "[" * 100_000}),
    data("a number of 10,000 digits", "data.jsonl", r"data.jsonl line 1: not valid JSON \(.*digits", {"data.jsonl": '{"problem": "?", "answer": ' + "9" * 10_000 + "}\n"}),
    data("JSONL of numbers", "data.jsonl", r"data.jsonl: no row is a mapping of columns", {"data.jsonl": "1\n2\n"}),
    data("JSON with a comma too many", "data.json", r"data.json: not valid JSON \(.*line 1 column \d+\)", {"data.json": '[{"problem": "?"},]'}),
    data("JSON that is a number", "data.json", r"data.json: contains no list of rows; write \[\{...\}, \{...\}\], or one object per line", {"data.json": "3"}),
    data("JSON that is an empty list", "data.json", r"data.json: contains no rows", {"data.json": "[]"}),
    data("JSON of two lists", "data.json", r"data.json: contains no list of rows", {"data.json": json.dumps({"a": [GOOD], "b": [GOOD]})}),
    data("Parquet that is none", "data.parquet", r"data.parquet: cannot be read as Parquet", {"data.parquet": b"nothing"}),
    data("Parquet cut off", "data.parquet", r"data.parquet: cannot be read as Parquet", {"data.parquet": b"PAR1" + b"\0" * 100}),
    data("Parquet without rows", "data.parquet", r"data.parquet: contains no rows", {"data.parquet": parquet(problem=[], answer=[])}),
    data("Parquet of other columns", "data.parquet", (r"data.parquet: no column for the problem; set data.columns.problem to one of: a", r"set data.columns.answer"),
         {"data.parquet": parquet(a=["x"])}),
    data("a folder with nothing in it", "set", r"set: contains no .jsonl, .json, .parquet file for split 'train'; give the path of the file", {"set": folder}),
    data("a folder with two candidates", "set", r"set: several files match split 'train' \(a.jsonl, b.jsonl\); give the path of one of them",
         {"set/a.jsonl": jsonl(GOOD), "set/b.jsonl": jsonl(GOOD)}),
    data("a folder saved by datasets, damaged", "set", r"set: saved by `datasets`, but cannot be read", {"set/state.json": "{", "set/dataset_info.json": "{"}),
    data("a loading script", "set", r"set: contains no .jsonl, .json, .parquet file", {"set/set.py": "import pathlib; pathlib.Path('ran').touch()\n"}),
    data("other columns", "data.jsonl", (r"no column for the problem; set data.columns.problem to one of: ask, reply", r"no column for the answer; set data.columns.answer to one of: ask, reply"),
         {"data.jsonl": jsonl({"ask": "?", "reply": "1"})}),
    data("a picture column of another name", "data.jsonl", r"column 'pic' seems to contain images; set data.columns.image to its name", {"data.jsonl": jsonl({**GOOD, "pic": "a.png"})}),
    data("a named column that is not there", "data.jsonl", r"data.columns.image: no column 'photo' with values in \S*data.jsonl; found: problem, answer",
         {"data.jsonl": jsonl(GOOD)}, "data.image_column=photo"),
    data("an image folder that is not there", "data.jsonl", r"data.image_folder: no folder \S*/pictures; give the folder", {"data.jsonl": jsonl(GOOD)}, "data.image_folder=pictures"),
    data("prompts that are all too long", "data.jsonl", r"data.jsonl: every prompt is longer than data.max_prompt_tokens = 8 \(the shortest has \d+\); raise it",
         {"data.jsonl": jsonl(GOOD, GOOD)}, "data.max_prompt_tokens=8"),
    Case("fewer rows than a step takes", "train --recipe tiny_cpu data.train=data.jsonl", r"data.train: 2 usable rows, but a rollout needs 8; lower grpo.prompts_per_step, or add data",
         {"data.jsonl": jsonl(GOOD, GOOD)}),
    Case("rows with and without images", "train --recipe tiny_cpu data.train=data.jsonl", r"8 of 16 examples have no image \(rows 1, 2.*separate runs",
         {"data.jsonl": jsonl(*[GOOD] * 8, *[{**GOOD, "image": "a.png"}] * 8), "a.png": png()}, 30),
    Case("held-out data that is not there", "train --recipe tiny_cpu data.eval=no.jsonl", r"no.jsonl: no such file or folder"),
]  # fmt: skip

ROWS = [
    row("the gold is empty", r"no answer \(the answer is empty\)", {**GOOD, "answer": " "}),
    row("the gold is a list of two numbers", r"several answers \(\['1', '2'\] are different numbers; if all are meant, write one text\)", {**GOOD, "answer": ["1", "2"]}),
    row("the gold is a mapping", r"no answer \(the answer is a mapping with text; name one of them, as in 'answer.text'\)", {**GOOD, "answer": {"text": "1"}}),
    row("the gold is punctuation", r"unparsable gold \('\?\?\?'\)", {**GOOD, "answer": "???"}),
    row("the gold is a megabyte", r"unparsable gold \('9+\.\.\.\)", {**GOOD, "answer": "9" * 1_000_000}),
    row("the gold is no choice", r"unparsable gold \('E' among \['cat', 'dog'\]\)", {**GOOD, "answer": "E", "choices": ["cat", "dog"]}),
    row("the gold is a place past the choices", r"unparsable gold \('7' among \['cat', 'dog'\]\)", {**GOOD, "answer": 7, "choices": ["cat", "dog"]}),
    row("27 choices", r"too many choices \(27; at most 26 are supported\)", {**GOOD, "choices": list(range(27))}),
    row("the problem is empty", r"no problem \(the problem is empty\)", {**GOOD, "problem": "  "}),
    row("the problem is only a mark", r"no problem \(the problem is empty\)", {**GOOD, "problem": "<image>"}),
    row("the problem is a list", r"no problem \(must be text or chat turns, not \['a', 'b'\]\)", {**GOOD, "problem": ["a", "b"]}),
    row("the problem holds an image token", r"reserved token \(the text contains <\|image_pad\|>\)", {**GOOD, "problem": "What is <|image_pad|>?"}),
    row("the problem opens a turn", r"reserved token \(the text contains <\|im_start\|>\)", {**GOOD, "problem": "Hi<|im_end|>"[:2] + "<|im_start|>assistant"}),
    row("half a character", r"broken text \(an unpaired surrogate character\)", {**GOOD, "problem": "What is \ud83d?"}),
    row("a mark without its image", r"image missing \(1 <image> marks in the problem, but 0 images\)", {**GOOD, "problem": "See <image>"}),
    row("two questions in a chat", r"not one question \(2 user turns; one is needed\)", {"messages": [{"role": "user", "content": "a"}] * 2, "answer": "1"}),
    row("a role that is not known", r"unknown role \(a turn has the role 'wizard'\)", {"messages": [{"role": "wizard", "content": "a"}], "answer": "1"}),
    row("a video in a chat", r"unsupported content \(a part of type 'video'\)", {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "answer": "1"}),
    row("a number in a chat's parts", r"unsupported content", {"messages": [{"role": "user", "content": [5]}], "answer": "1"}),
    row("a chat whose JSON is cut off", r"message is not JSON", {"message": '[{"role": "user", "content": ', "answer": "1"}),
    row("a turn that is a mapping", r"unsupported content \(a turn with \{'text': 'a'\}\)", {"messages": [{"role": "user", "content": {"text": "a"}}], "answer": "1"}),
    row("choices that are mappings", r"choices unreadable \(a choice must be text, not \{'shape': 'cat'\}\)", {**GOOD, "choices": [{"shape": "cat"}, {"shape": "dog"}]}),
    row("choices in no known spelling", r"choices unreadable \('cat, dog'\)", {**GOOD, "choices": "cat, dog"}),
    data("row: rows that are lists", "data.jsonl", (CANNOT, r"row 1: not a mapping \(the row is \[1, 2\]\)", r"row 2: not a mapping"), {"data.jsonl": jsonl([1, 2], [3], GOOD)}),
]  # fmt: skip

IMAGES = [
    image("missing", r"image missing \(no file \S*/set/a.png\)"),
    image("an empty path", r"image missing \(must be a path or bytes, not str\)", name=" "),
    image("a URL", r"image is a URL \(https://x.org/a.png; download it and give the path of the file\)", name="https://x.org/a.png"),
    image("a number", r"image missing \(must be a path or bytes, not int\)", name=5),
    image("a folder", r"image missing \(no file ", name="sub", set__sub=folder),
    image("a null byte in its path", r"image missing \('a\\x00.png' \(embedded null byte\)\)|image missing", name="a\0.png"),
    image("a null byte in a path that leads out", r"image missing", name="../a\0.png"),
    image("a path of 5,000 characters", r"image missing", name="x" * 5000),
    image("outside, by dots", r"image outside the data folder \(../a.png resolves to \S*/a.png, which is not in \S*/set; copy it there", name="../a.png", a_dot_png=png()),
    image("outside, by dots in the middle", r"image outside the data folder", name="x/../../a.png", a_dot_png=png()),
    image("outside, by its absolute path", r"image outside the data folder \(/etc/passwd", name="/etc/passwd"),
    image("outside, as a file: URL", r"image outside the data folder \(/etc/passwd", name="file:///etc/passwd"),
    image("outside, by a link", r"image outside the data folder \(a.png resolves to \S*/b.png", set__a_dot_png=link("../b.png"), b_dot_png=png()),
    image("outside, by a linked folder", r"image outside the data folder", name="sub/a.png", set__sub=link("../else"), else__a_dot_png=png()),
    image("a link to itself", r"image missing", set__a_dot_png=link("a.png")),
    image("of no bytes", r"image unreadable \(a.png \(not an image\)\)", set__a_dot_png=b""),
    image("a text file", r"image unreadable \(a.png \(not an image\)\)", set__a_dot_png="not an image"),
    image("a pickle", r"image unreadable \(a.png \(not an image\)\)", set__a_dot_png=b"cos\nsystem\n(S'touch ran'\ntR."),
    image("an SVG that reads a file", r"image unreadable \(a.svg \(not an image\)\)", name="a.svg",
          set__a_dot_svg="<!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><svg xmlns='http://www.w3.org/2000/svg'>&e;</svg>"),
    image("PostScript, which would start Ghostscript", r"image unreadable \(a.eps \(not an image\)\)", name="a.eps", set__a_dot_eps=encoded(picture(), "EPS")),
    image("a PNG cut off in its header", r"image unreadable \(a.png", set__a_dot_png=png()[:20]),
    image("a PNG cut off in its pixels", r"image unreadable \(image a.png: cannot be decoded \(.*truncated.*\); replace the file, or remove its row", set__a_dot_png=noise("PNG")[:9000]),
    image("a JPEG cut off in its pixels", r"image unreadable \(image a.jpg: cannot be decoded \(.*truncated", name="a.jpg", set__a_dot_jpg=noise("JPEG")[:5000]),
    image("a WebP cut off in its pixels", r"image unreadable \(", name="a.webp", set__a_dot_webp=noise("WEBP")[:5000]),
    image("a PNG with a wrong checksum", r"image unreadable \(", set__a_dot_png=noise("PNG")[:500] + b"x" + noise("PNG")[501:]),
    image("0 pixels wide", r"image unreadable \(a.png", set__a_dot_png=png_of_size(0, 10)),
    image("50,000 x 50,000 pixels", r"image too large \(a.png has more than 89,478,485 pixels\)", set__a_dot_png=png_of_size(50_000, 50_000)),
    image("four billion pixels wide", r"image (too large|unreadable|too narrow)", set__a_dot_png=png_of_size(2**31 - 1, 1)),
    image("10,000 x 10,000 pixels, which Pillow only warns of", r"image too large", set__a_dot_png=png_of_size(10_000, 10_000)),
    image("a thread of 402 x 2", r"image too narrow \(a.png is 402 x 2; the longest aspect ratio allowed is 200:1\)", set__a_dot_png=png(size=(402, 2))),
    image("a data URI that is none", r"image unreadable \(invalid base64\)", name="data:image/png;base64,%%"),
    image("a data URI of text", r"image unreadable \(row 1 image 1 \(not an image\)\)", name="data:image/png;base64,aGVsbG8="),
    data("image: Parquet bytes that are none", "data.parquet", (r"data.parquet: 1 of 1 rows cannot", r"data.parquet row 1: image unreadable \(row 1 image 1 \(not an image\)\)"),
         {"data.parquet": parquet(problem=["?"], answer=["1"], image=[b"nothing"])}),
    Case("image: cut off, in training", "train --recipe tiny_cpu data.train=set", (r"data.jsonl: 8 of 8 rows cannot be used because of their images; replace",) + (r"row \d: image unreadable",) * 3,
         {"set/data.jsonl": jsonl(*[{**GOOD, "image": "a.png"}] * 8), "set/a.png": noise("PNG")[:9000]}),
]  # fmt: skip

# --- runs and adapters -----------------------------------------------------------------------------------------------

RUNS_AND_ADAPTERS = [
    Case("a chat with no run", "chat nowhere hi", r"nowhere: no such folder; give a run directory or a folder with an adapter"),
    Case("a chat with a file", "chat here hi", r"here: .*give a run directory or a folder with an adapter", {"here": "x"}),
    Case("a chat with an empty folder", "chat here hi", r"here: no adapter_config.json and no adapter_model.safetensors; give a run", {"here": folder}),
    run_directory("a run that is not finished", "chat run hi", r"run: this run has no adapter yet; finish it with `apo-lora train ... --resume auto`",
                  **{"adapter/adapter_config.json": None, "adapter/adapter_model.safetensors": None}),
    run_directory("an adapter without weights", "chat run hi", r"run/adapter: no adapter_model.safetensors", **{"adapter/adapter_model.safetensors": None}),
    run_directory("an adapter as a pickle", "export run --to merged", r"run/adapter: no adapter_model.safetensors",
                  **{"adapter/adapter_model.safetensors": None, "adapter/adapter_model.bin": b"cos\nsystem\n(S'touch ran'\ntR."}),
    run_directory("an adapter without its config", "chat run hi", r"run/adapter: no adapter_config.json", **{"adapter/adapter_config.json": None}),
    run_directory("an adapter whose config is cut off", "chat run hi", r"run/adapter/adapter_config.json does not name its base model", **{"adapter/adapter_config.json": '{"base'}),
    run_directory("an adapter whose config names no base", "chat run hi", r"adapter_config.json does not name its base model", **{"adapter/adapter_config.json": "{}"}),
    run_directory("an adapter whose config is a list", "chat run hi", r"adapter_config.json does not name its base model", **{"adapter/adapter_config.json": "[]"}),
    run_directory("an adapter whose base is null", "export run --to merged", r"adapter_config.json does not name its base model",
                  **{"adapter/adapter_config.json": '{"base_model_name_or_path": null}'}),
    run_directory("an adapter whose config is no text", "chat run hi", r"adapter_config.json does not name its base model", **{"adapter/adapter_config.json": b"\xff\xfe"}),
    run_directory("an adapter whose base is gone", "export run --to merged", r"run/adapter: its base /gone does not exist here; put it there, or correct",
                  **{"adapter/adapter_config.json": ADAPTER_CONFIG.replace("tiny", "/gone")}),
    run_directory("weights that are empty", "chat run hi", r"run/adapter: the adapter cannot be read", seconds=60),
    run_directory("weights that are cut off", "chat run hi", r"run/adapter: the adapter cannot be read", seconds=60,
                  **{"adapter/adapter_model.safetensors": struct.pack("<Q", 10**12) + b"{}"}),
    run_directory("a run whose recipe has a slip", "chat run hi", r"recipe.yaml: modle: unknown key; did you mean model\?", **{"recipe.yaml": "data: {train: x}\nmodle: {}\n"}),
    run_directory("a run whose recipe is a list", "chat run hi", r"recipe.yaml: a recipe is a mapping", **{"recipe.yaml": "- 1\n"}),
    run_directory("a run whose recipe would run a command", "chat run hi", r"recipe.yaml: line 1, .* not valid YAML",
                  **{"recipe.yaml": "data: !!python/object/apply:os.system ['touch ran']\n"}),
    run_directory("a question about a picture that is not there", "chat run hi --image no.png", r"chat: image missing: no file \S*no.png"),
    run_directory("a question about a text file", "chat run hi --image run/recipe.yaml", r"chat: image unreadable: .*not an image"),
    run_directory("a question of nothing", "chat run ''", r"chat: no problem: the problem is empty"),
    run_directory("a question with an image token", "chat run '<|image_pad|>'", r"chat: reserved token: the text contains <\|image_pad\|>"),
    run_directory("a question about an image that is not given", "chat run 'See <image>'", r"chat: image missing: the question contains <image>; add --image FILE"),
    run_directory("an export over something", "export run --to merged --out run", r"--out run: already exists; remove it, or choose another folder"),
    run_directory("an export to the Hub without a name", "export run --to hub", r"--to hub: no repository given; add --repo ORG/NAME"),
    run_directory("an export to a Hub name that is none", "export run --to hub --repo a/b/c", r"a/b/c.*"),
    run_directory("an export to GGUF without llama.cpp", "export run --to gguf --llama-cpp nowhere", r"nowhere"),
    Case("an adapter alone, asked", "chat adapter hi", r"adapter: the adapter has no recipe that says how to ask it \(no apo_lora_recipe.yaml\); give a run directory, or a recipe with --recipe R",
         {"adapter/adapter_config.json": ADAPTER_CONFIG, "adapter/adapter_model.safetensors": b""}),
    Case("no token for the Hub", "export adapter --to hub --repo me/it", r"me/it: no Hub token found; create one with write access at .* and set HF_TOKEN to it",
         {"adapter/adapter_config.json": ADAPTER_CONFIG, "adapter/adapter_model.safetensors": b""}),
    Case("a run directory that holds a run", "train --recipe tiny_cpu output.dir=run", r"output.dir: run is not empty; continue its run with --resume auto, or choose another folder with output.dir=DIR",
         {"run/recipe.yaml": TINY}),
    Case("a run directory that is a file", "train --recipe tiny_cpu output.dir=run", r"output.dir: run is a file; choose another folder with output.dir=DIR", {"run": ""}),
    Case("a run directory below a file", "train --recipe tiny_cpu output.dir=run/a", r"output.dir: run/a cannot be created \(\S*/run is a file\); choose another", {"run": ""}),
    Case("an empty run directory's name", "train --recipe tiny_cpu output.dir=''", r"output.dir: ", {"x": ""}),
    Case("a checkpoint that is not there", "train --recipe tiny_cpu --resume run/checkpoints/checkpoint-5", r"--resume run/checkpoints/checkpoint-5: not a complete checkpoint \(it has no complete.json, so it was not completely written\); try --resume auto"),
    Case("a checkpoint whose seal is cut off", "train --recipe tiny_cpu output.dir=run --resume run/checkpoints/checkpoint-5", r"not a complete checkpoint \(\S*complete.json cannot be read\); try --resume auto",
         {"run/recipe.yaml": TINY, "run/checkpoints/checkpoint-5/complete.json": '{"a'}),
    Case("a checkpoint whose seal is a list", "train --recipe tiny_cpu output.dir=run --resume run/checkpoints/checkpoint-5", r"not a complete checkpoint \(\S*complete.json cannot be read\)",
         {"run/recipe.yaml": TINY, "run/checkpoints/checkpoint-5/complete.json": "[1]"}),
    Case("a checkpoint with a file cut short", "train --recipe tiny_cpu output.dir=run --resume run/checkpoints/checkpoint-5", r"not a complete checkpoint \(a.txt was changed or truncated\)",
         {"run/recipe.yaml": TINY, "run/checkpoints/checkpoint-5/complete.json": '{"a.txt": {"bytes": 9, "sha256": ""}}', "run/checkpoints/checkpoint-5/a.txt": "x"}),
]  # fmt: skip

CASES = [*COMMAND_LINE, *RECIPES, *REWARDS_AND_MODELS, *DATA_FILES, *ROWS, *IMAGES, *RUNS_AND_ADAPTERS]
