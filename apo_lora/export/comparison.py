"""Checks an exported folder against the adapter model: it is loaded as users will, and given the same prompts.

One model is in memory at a time. Shape suffixes: L positions, V vocabulary.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from apo_lora.export.base import Base
from apo_lora.export.four_bit import load_as_trained
from apo_lora.policy.tuned import load_adapter, lora_config
from apo_lora.run.adapter import AdapterSource

if TYPE_CHECKING:
    from peft import PeftModel

POSITIONS = 32
"""Last positions of each prompt that are compared: bounds memory where the vocabulary is large."""

LARGEST_GAP = 0.5
"""Of the adapter's own effect. A merge that equals the base has 1, a broken one more, a correct one only rounding."""

ROUNDING_ALLOWANCE = 1.5
"""Times the gap of PEFT's own merge, where that is large: an effect near what 16-bit weights and sums can show."""

LEAST_CHANGE = 0.1
"""Of the adapter's effect: what is nearer to the base than this is the base."""

_QUESTIONS = ("What is 17 plus 25? Think step by step.", "Name three colours.", "How many red shapes are there?")


@dataclass(frozen=True)
class Comparison:
    """Log-probabilities of the next token, over the whole vocabulary at every compared position."""

    kind: str
    """text or image."""
    positions: int
    max_difference: float
    """Largest |log p(merged) - log p(adapter model)|."""
    argmax_agreement: float
    """Share of positions with the same most probable token."""
    effect: float
    """Root mean square of log p(adapter model) - log p(base): what training changed."""
    gap: float
    """Root mean square of log p(merged) - log p(adapter model), over `effect`."""
    rounding: float
    """The same of PEFT's merge in memory, rounded to the stored dtype: what no merge can avoid."""
    change: float
    """Root mean square of log p(merged) - log p(base), over `effect`: 0 where the merged model is the base."""

    @property
    def largest_gap(self) -> float:
        return max(LARGEST_GAP, ROUNDING_ALLOWANCE * self.rounding)

    def problem(self) -> str | None:
        """Why the merged model must not be used, or None."""
        if self.effect == 0:
            return f"{self.kind} prompts: the adapter model equals the base; the adapter changes nothing"
        if self.change < LEAST_CHANGE:
            return f"{self.kind} prompts: the merged model equals the base; the adapter was lost"
        if self.gap < self.largest_gap:  # not so for NaN
            return None
        return (
            f"{self.kind} prompts: the merged model differs from the adapter model by {self.gap:.2f} times the "
            f"adapter's effect (the base differs by 1.00; up to {self.largest_gap:.2f} may be rounding)"
        )

    def line(self) -> str:
        return (
            f"{self.kind} prompts: max difference of log-probs {self.max_difference:.2g}, same top token at "
            f"{self.argmax_agreement:.1%} of {self.positions} positions, gap {self.gap:.3f} of the adapter's effect "
            f"(from rounding: {self.rounding:.3f})"
        )


def compare(merged: Path, base: Base, source: AdapterSource) -> list[Comparison]:
    """The merged folder against the adapter on its base, on text prompts and on prompts with an image."""
    from transformers import AutoConfig, AutoProcessor

    prompts = check_prompts(AutoProcessor.from_pretrained(merged, trust_remote_code=False))
    stored_dtype = AutoConfig.from_pretrained(merged, trust_remote_code=False).dtype
    model = _with_adapter(load_as_trained(base) if base.is_4bit else load_plain(base.folder), source)
    adapted = {kind: _logps(model, inputs) for kind, inputs in prompts.items()}
    with model.disable_adapter():
        plain = {kind: _logps(model, inputs) for kind, inputs in prompts.items()}
    if base.is_4bit:  # as PEFT merges into packed weights, it packs them again
        model = _with_adapter(model.unload().dequantize(), source)
    model.merge_adapter()
    for parameter in model.get_base_model().parameters():
        parameter.data = parameter.data.to(stored_dtype).to(parameter.dtype)
    rounded = {kind: _logps(model, inputs) for kind, inputs in prompts.items()}
    del model
    gc.collect()  # before the next one is loaded
    exported = load_plain(merged)
    return [
        comparison(kind, _logps(exported, inputs), adapted[kind], plain[kind], rounded[kind])
        for kind, inputs in prompts.items()
    ]


def _with_adapter(model: nn.Module, source: AdapterSource) -> "PeftModel":
    from peft import PeftModel

    adapted = PeftModel(model, lora_config(source)).eval()
    load_adapter(adapted, source)
    return adapted


def comparison(kind: str, merged_LV: Tensor, adapted_LV: Tensor, base_LV: Tensor, rounded_LV: Tensor) -> Comparison:
    """`rounded_LV`: of PEFT's own merge."""
    effect = _rms(adapted_LV - base_LV)
    over = effect or 1.0
    return Comparison(
        kind=kind,
        positions=len(merged_LV),
        max_difference=(merged_LV - adapted_LV).abs().max().item(),
        argmax_agreement=(merged_LV.argmax(-1) == adapted_LV.argmax(-1)).float().mean().item(),
        effect=effect,
        gap=_rms(merged_LV - adapted_LV) / over,
        rounding=_rms(rounded_LV - adapted_LV) / over,
        change=_rms(merged_LV - base_LV) / over,
    )


def _rms(differences: Tensor) -> float:
    return differences.square().mean().sqrt().item()


def load_plain(folder: Path) -> nn.Module:
    """As users load it: only transformers, stored dtype. A CPU computes float16 in float32 instead."""
    from transformers import AutoModelForImageTextToText

    has_gpu = torch.cuda.is_available()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", device_map={"": 0 if has_gpu else "cpu"}, trust_remote_code=False, use_safetensors=True
    )
    return (model.float() if not has_gpu and model.dtype == torch.float16 else model).eval()


def check_prompts(processor: Any) -> dict[str, list[dict[str, Tensor]]]:
    """Inputs of a few questions without and with an image."""
    shapes = Image.new("RGB", (168, 112), "white")
    draw = ImageDraw.Draw(shapes)
    draw.ellipse((14, 14, 70, 70), fill="red")
    draw.rectangle((90, 40, 150, 100), fill="blue")

    def inputs(question: str, images: list[Image.Image]) -> dict[str, Tensor]:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return processor(text=[text], images=images or None, return_tensors="pt")

    return {
        "text": [inputs(question, []) for question in _QUESTIONS],
        "image": [inputs(question, [shapes]) for question in _QUESTIONS],
    }


@torch.no_grad()
def _logps(model: nn.Module, prompts: list[dict[str, Tensor]]) -> Tensor:
    """float32 log-probabilities (L, V) at the last positions of every prompt, one after the other."""
    parts = []
    for inputs in prompts:
        logits = model(**inputs.to(model.device), logits_to_keep=POSITIONS).logits[0]
        parts.append(torch.log_softmax(logits.float(), dim=-1).cpu())
    return torch.cat(parts)
