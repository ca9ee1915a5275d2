"""Shared fixtures: the embedded tiny model with a LoRA adapter, and batches in the shape that TRL hands around."""

import gc
import os
import signal
import sys
from functools import cache, partial
from pathlib import Path

import pytest
from blank_plots import blank_plots
from gguf_model import gguf_adapter, llama_cpp, llama_cpp_sources, llama_quantize  # noqa: F401  # fixtures

from apo_lora.tiny import boards

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub for anything
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only wait for each other on a busy machine
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts into the background without it

LONGEST = (
    "colab_twin/test_colab_twin.py", "faults/test_kill_matrix.py", "rollout/test_vllm_server.py",
    "export/test_export_gguf.py", "export/test_export_unsloth.py", "test_trainer.py", "test_simulated_gpu.py",
    "chat/test_chat_gguf.py", "benchmarks/test_gpu_rehearsal.py", "test_emulated_gpu.py",
)  # fmt: skip

boards.reasoning_rows = cache(boards.reasoning_rows)  # hundreds of runs begin with the same 2,048
blank_plots()

num_modules = 0

PROJECT = Path(__file__).parent.parent
SHARED_DATA = PROJECT.parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    """The longest files first, then those with slow tests: workers, which take a file at a time, end together."""
    longest = [(PROJECT / "tests" / name).resolve(strict=True) for name in LONGEST]
    slow = [item.path for item in items if item.get_closest_marker("slow")]
    order = {path: place for place, path in enumerate(dict.fromkeys(longest + slow))}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_runtest_setup():
    """Takes the libraries' half a million objects out of garbage collection: each training begins and ends with one,
    which would last a third of a second."""
    global num_modules
    if len(sys.modules) > num_modules + 100:
        num_modules = len(sys.modules)
        gc.freeze()


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"{SHARED_DATA} is absent: real data is not part of the project")
    return SHARED_DATA


def load_base(name: str, lora: dict | None = None, seed: int = 0, **model):
    from apo_lora.policy.loading import load_policy
    from apo_lora.recipe.schema import DataSection, LoraSection, ModelSection

    section = ModelSection(name=name, **model)
    return load_policy(section, LoraSection(**(lora or {})), DataSection(train="boards"), seed=seed)


@pytest.fixture
def load_tiny():
    """Loads the tiny policy: load_tiny(load_in_4bit=True), load_tiny(lora={"vision": True}), ..."""
    return partial(load_base, "tiny")


@pytest.fixture(params=["tiny", "small_qwen3_vl"])
def load_each(request):
    """The same, of every family in turn. A module makes it its load_tiny to run its tests on all of them."""
    return partial(load_base, "tiny" if request.param == "tiny" else request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def small_qwen3_vl(tmp_path_factory):
    """The folder of a small Qwen3-VL with random weights."""
    from small_qwen3_vl import make_base

    return str(make_base(tmp_path_factory.mktemp("qwen3_vl") / "base"))


@pytest.fixture
def tiny_policy(load_tiny):
    return load_tiny()


@pytest.fixture(scope="session")
def real_3b():
    """The real configuration on the meta device: every parameter, no memory."""
    import torch
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    folder = SHARED_DATA / "qwen2.5-vl-3b-processor"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))


@pytest.fixture
def stir_adapter():
    from stirred_adapters import stir

    return stir


@pytest.fixture
def make_batch():
    """A batch of random completions to prompts with images of different sizes, as TRL's trainers hold it."""
    import torch
    from PIL import Image

    def make(policy, sizes=((84, 84), (112, 56), (56, 140), (84, 84)), lengths=(7, 3, 12, 1), seed=0):
        processor = policy.processor
        generator = torch.Generator().manual_seed(seed)
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?" * (i + 1)}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for i in range(len(sizes))
        ]
        pixels = [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for w, h in sizes]
        images = [[Image.fromarray(array.numpy())] for array in pixels]
        inputs = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        width = max(lengths)
        mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
        ids = torch.randint(10, 200, mask.shape, generator=generator) * mask
        return {
            "prompt_ids": inputs["input_ids"],
            "prompt_mask": inputs["attention_mask"],
            "completion_ids": ids,
            "completion_mask": mask,
            "pixel_values": inputs["pixel_values"],
            "image_grid_thw": inputs["image_grid_thw"],
            "mm_token_type_ids": inputs["mm_token_type_ids"],
            "num_images": [1] * len(sizes),
        }

    return make


@pytest.fixture
def make_trainer(tmp_path, load_tiny):
    """APOTrainer on the tiny model by a recipe of tiny_trainer.recipe_of, with rewards that vary in every group."""
    from apo_lora.data.examples import load_examples
    from apo_lora.data.items import prompt_dataset
    from apo_lora.rollout.training_arguments import training_arguments
    from apo_lora.run.directory import RunDir
    from apo_lora.trainer import APOTrainer

    def reward(completions, answer, **columns):
        # By place and not by text: every group has variance, whatever the model says. Groups of 4 get 1 and 2 right.
        return [float(place % 8 in (0, 4, 5)) for place in range(len(completions))]

    reward.__name__ = "accuracy"

    def make(recipe, **policy_options):
        recipe = recipe.model_copy(update={"rewards": recipe.rewards.model_copy(update={"functions": ("accuracy",)})})
        policy = load_tiny(**policy_options)
        run_dir = RunDir(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        run_dir.create()
        examples = load_examples("boards", recipe.data, split="train", limit=recipe.data.limit).examples
        return APOTrainer(
            policy.model,
            [reward],
            training_arguments(recipe, policy, run_dir.checkpoints, recipe.train.max_steps),
            processing_class=policy.processor,
            train_dataset=prompt_dataset(examples, recipe.data),
        )

    return make


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set's folder with two images; the cache of `datasets` is inside the test's own folder."""
    import datasets
    from data_sets import png

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    home = tmp_path / "set"
    home.mkdir()
    (home / "a.png").write_bytes(png("red"))
    (home / "b.png").write_bytes(png("blue", size=(20, 40)))
    return home


@pytest.fixture
def decodings(monkeypatch):
    """Grows by one with every image that is decoded."""
    from PIL import ImageFile

    seen = []
    decode = ImageFile.ImageFile.load

    def counted(self):
        if getattr(self, "tile", None):
            seen.append(self.size)
        return decode(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    return seen
