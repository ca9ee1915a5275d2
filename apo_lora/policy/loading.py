"""Loading the policy: a base model, frozen, with a LoRA adapter; and the reference, which is the base with its adapters
off or with a frozen copy of the adapter.

Two engines: Unsloth's FastVisionModel on a GPU, transformers + PEFT without one.
"""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from apo_lora.errors import ModelError
from apo_lora.family.lookup import closest_family
from apo_lora.family.record import Family
from apo_lora.machine.compat import fix_4bit_on_cpu
from apo_lora.machine.device import choose_dtype, choose_engine
from apo_lora.policy.shared_prompt.attention import accept_prompt_groups
from apo_lora.recipe.schema import DataSection, LoraSection, ModelSection
from apo_lora.tiny import BASE_DIR

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


@dataclass(frozen=True)
class Policy:
    """A model ready to train, with its processor and how it was loaded."""

    model: nn.Module
    """A peft.PeftModel; only its LoRA weights require gradients."""
    processor: Any
    engine: str
    dtype: torch.dtype
    base_name: str
    """As PEFT users would load it: a Hugging Face id or a folder."""

    @property
    def family(self) -> Family:
        return closest_family(self.model)

    @property
    def never_sampled(self) -> list[int]:
        """Ids of the vision tokens."""
        return self.family.vision_token_ids(self.processor)

    @property
    def summary(self) -> str:
        trainable, total = self.model.get_nb_trainable_parameters()  # counts two weights per byte where packed
        bits = ", 4-bit" if is_4bit(self.model) else ""
        name = "tiny" if self.base_name == str(BASE_DIR) else self.base_name
        return (
            f"{name} through {self.engine} on {self.model.device}, {str(self.dtype)[6:]}{bits}; "
            f"{trainable:,} of {total:,} parameters train"
        )

    def autocast(self) -> AbstractContextManager:
        """In which the trainer runs its passes: 16-bit arithmetic on a GPU, whatever the LoRA weights are kept in."""
        if self.model.device.type == "cuda" and self.dtype != torch.float32:
            return torch.autocast("cuda", self.dtype)
        return nullcontext()


def base_path(name: str) -> str:
    """`tiny` is the model inside the package; everything else is a Hugging Face id, or a folder.

    A folder gets its full path: it is written into adapters, which are read from elsewhere.
    """
    if name == "tiny":
        return str(BASE_DIR)
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def needs_gpu(model: ModelSection) -> str | None:
    """Why this model cannot be trained on this machine, or None. Asked before anything is downloaded."""
    if torch.cuda.is_available() or model.name == "tiny" or Path(model.name).is_dir():
        return None
    return (
        f"model.name: {model.name} needs a CUDA GPU, and none is visible; use a machine with one, or train the "
        "embedded model on the CPU with `apo-lora train --recipe tiny_cpu.yaml`"
    )


def import_engine(model: ModelSection) -> None:
    """Unsloth, where it is the engine, comes before trl, transformers and peft are imported: it rewrites them."""
    if choose_engine(model.engine, torch.cuda.is_available()) == "unsloth":
        import unsloth  # noqa: F401


def load_processor(model: ModelSection, data: DataSection) -> Any:
    """The model's processor, padding on the left, with the recipe's image size limits (aspect ratio kept)."""
    from transformers import AutoProcessor

    with _one_line_load_errors(model.name):
        processor = AutoProcessor.from_pretrained(
            base_path(model.name), revision=model.revision, padding_side="left", trust_remote_code=False
        )
    limit_image_size(processor, data)
    return processor


def limit_image_size(processor: Any, data: DataSection) -> None:
    """Sets the pixel limits between which the processor resizes every image."""
    size = dict(processor.image_processor.size)
    size["shortest_edge"] = data.min_pixels or size["shortest_edge"]
    size["longest_edge"] = max(data.max_pixels or size["longest_edge"], size["shortest_edge"])
    processor.image_processor.size = size  # its names are historical: both are counts of pixels


def load_policy(
    model: ModelSection,
    lora: LoraSection,
    data: DataSection,
    *,
    seed: int,
    adapter: Mapping[str, Any] | None = None,
) -> Policy:
    """The base, frozen, with a fresh LoRA adapter seeded by `seed`. Raises ModelError.

    `adapter`: arguments of PEFT's LoraConfig in place of those in `lora`.
    """
    has_gpu = torch.cuda.is_available()
    engine = choose_engine(model.engine, has_gpu)
    dtype = choose_dtype(model.dtype, has_gpu, has_gpu and torch.cuda.is_bf16_supported(including_emulation=False))
    if problem := needs_gpu(model):
        raise ModelError(problem)
    with _one_line_load_errors(model.name):
        if engine == "unsloth":
            peft_model, processor = _load_with_unsloth(model, lora, adapter, dtype, seed)
        else:
            peft_model, processor = _load_with_transformers(model, lora, adapter, dtype, seed)
    if model.load_in_4bit and not is_4bit(peft_model):
        raise ModelError(f"model.load_in_4bit: {engine} loaded {model.name} without 4-bit layers; check bitsandbytes")
    limit_image_size(processor, data)
    accept_prompt_groups(peft_model)  # before anything is sampled, in training, preflight, evaluation and chat
    return Policy(peft_model, processor, engine, dtype, base_path(model.name))


def nf4_config(dtype: torch.dtype, kept: list[str]) -> "BitsAndBytesConfig":
    """NF4 with double quantisation, computing in `dtype`, of all linear layers but the `kept` ones."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _adapter(
    base: nn.Module, model: ModelSection, lora: LoraSection, given: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """Arguments of PEFT's LoraConfig: the `given` ones, else what the recipe says. Raises ModelError."""
    if given is None:
        _require_layers(base, lora, model.name)
        targets = closest_family(base).lora_targets(lora.target_modules, vision=lora.vision)
        return {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": targets}
    if not any(re.fullmatch(given["target_modules"], name) for name, _ in base.named_modules()):
        raise ModelError(f"{model.name}: has none of the adapter's layers; use the base that it was trained on")
    return given


def _load_with_transformers(
    model: ModelSection, lora: LoraSection, adapter: Mapping[str, Any] | None, dtype: torch.dtype, seed: int
) -> tuple:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    path = base_path(model.name)
    config = AutoConfig.from_pretrained(path, revision=model.revision, trust_remote_code=False)
    base = AutoModelForImageTextToText.from_pretrained(
        path,
        config=config,
        revision=model.revision,
        dtype=dtype,
        quantization_config=nf4_config(dtype, closest_family(config).kept_in_16_bits) if model.load_in_4bit else None,
        device_map={"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
        trust_remote_code=False,
        use_safetensors=True,
    )
    processor = AutoProcessor.from_pretrained(
        path, revision=model.revision, padding_side="left", trust_remote_code=False
    )
    adapter = _adapter(base, model, lora, adapter)
    if model.load_in_4bit:
        if not torch.cuda.is_available():
            fix_4bit_on_cpu(base)
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=model.gradient_checkpointing)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(**adapter, task_type="CAUSAL_LM")), processor


def _load_with_unsloth(
    model: ModelSection,
    lora: LoraSection,
    adapter: Mapping[str, Any] | None,
    dtype: torch.dtype,
    seed: int,
) -> tuple:
    if dtype == torch.float32 and torch.cuda.is_available():
        raise ModelError(
            "model.dtype: on a GPU, Unsloth trains float32 weights in 16 bits; use auto, or model.engine=transformers"
        )
    from unsloth import FastVisionModel

    checkpointing = "unsloth" if model.gradient_checkpointing else False
    base, processor = FastVisionModel.from_pretrained(
        base_path(model.name),
        revision=model.revision,
        use_exact_model_name=True,  # else it may take another repository, and drop the revision
        load_in_4bit=model.load_in_4bit,
        dtype=dtype,
        use_gradient_checkpointing=checkpointing,
        trust_remote_code=False,
    )
    loaded_as = base.get_output_embeddings().weight.dtype
    if loaded_as != dtype:  # Unsloth may choose another, with only a printed line
        raise ModelError(f"model.dtype: Unsloth loads {model.name} as {loaded_as} here, not as {dtype}; use auto")
    adapter = _adapter(base, model, lora, adapter)
    processor.tokenizer.padding_side = "left"
    peft_model = FastVisionModel.get_peft_model(
        base,
        **adapter,
        finetune_vision_layers=re.escape(closest_family(base).tower) in adapter["target_modules"],
        random_state=seed,
        use_gradient_checkpointing=checkpointing,
    )
    return peft_model, processor


def _require_layers(base: nn.Module, lora: LoraSection, name: str) -> None:
    """PEFT ignores names that match no layer, as long as one name matches."""
    family = closest_family(base)
    layers = {path.rpartition(".")[2] for path, _ in base.named_modules() if family.is_language_layer(path)}
    if missing := [layer for layer in lora.target_modules if layer not in layers]:
        linear = sorted({layer for layer in layers if layer.endswith("_proj")})
        raise ModelError(f"lora.target_modules: {name} has no layer {', '.join(missing)}; it has {', '.join(linear)}")


REFERENCE = "apo_lora_reference"
"""PEFT's name of the frozen copy of an adapter: one that no user's own adapter has."""


def set_reference(model: nn.Module, which: str) -> None:
    """Makes `base` or `start`, the active adapter as it is now, what reference_mode switches to. For a PeftModel."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    if REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)
    if which == "base":
        return
    own, saved = model.active_adapter, list(model.peft_config)
    weights = get_peft_model_state_dict(model, adapter_name=own, save_embedding_layers=False)
    # Without memory first: so it draws no random numbers, and gets the dtype of what is copied.
    model.add_adapter(REFERENCE, copy.deepcopy(model.peft_config[own]), low_cpu_mem_usage=True)
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    set_peft_model_state_dict(model, copies, REFERENCE, low_cpu_mem_usage=True)
    model.set_requires_grad(REFERENCE, False)
    # The reference is not a result: neither checkpoints nor the run's adapter contain it.
    model.save_pretrained = partial(type(model).save_pretrained, model, selected_adapters=saved)


@contextmanager
def reference_mode(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is the reference policy: the frozen base, adapters off, or the frozen adapter of set_reference.
    No second model exists.
    """
    own = model.active_adapter
    with torch.no_grad():
        if REFERENCE not in model.peft_config:
            with model.disable_adapter():
                yield
            return
        model.set_adapter(REFERENCE, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(own)


def is_4bit(model: nn.Module) -> bool:
    return any(type(module).__name__ == "Linear4bit" for module in model.modules())


@contextmanager
def _one_line_load_errors(name: str) -> Iterator[None]:
    """Turns what a loader raises for a missing or broken model into one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ModelError(
            f"model.name: {name} cannot be loaded{offline}: {first_line.rstrip('.')}; check the name and the files"
        ) from error
