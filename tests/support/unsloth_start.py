"""A supervised adapter made by Unsloth alone, and two steps of training from it, with and without measuring; no GPU."""

import json
import sys
from pathlib import Path

from unsloth_on_cpu import start

start()

import torch  # noqa: E402
from stirred_adapters import stir  # noqa: E402
from unsloth import FastVisionModel  # noqa: E402

from apo_lora.commands.main import main  # noqa: E402
from apo_lora.policy import tuned  # noqa: E402

base, here = sys.argv[1], Path.cwd()
model, processor = FastVisionModel.from_pretrained(
    base, load_in_4bit=False, dtype=torch.float32, use_gradient_checkpointing=True, use_exact_model_name=True
)
model = FastVisionModel.get_peft_model(
    model, finetune_vision_layers=False, r=4, lora_alpha=8, random_state=3407, use_gradient_checkpointing=True
)
stir(model, scale=0.05)
model.save_pretrained("sft")
processor.save_pretrained("sft")

policies = []
load = tuned.load_policy
tuned.load_policy = lambda *arguments, **options: policies.append(load(*arguments, **options)) or policies[-1]

Path("mine.py").write_text(
    "def by_place(completions, **columns):\n    return [n % 2 for n in range(len(completions))]\n"
)

OVERRIDES = [
    f"model.name={base}", "model.engine=unsloth", "lora.r=4", "lora.alpha=8", "lora.start=sft",
    "grpo.prompts_per_step=2", "grpo.num_generations=4", "grpo.completions_per_pass=8",
    "grpo.max_completion_length=24", "train.max_steps=2", "train.learning_rate=1e-2", "train.evaluate=false",
    "data.limit=16", f"rewards.functions=[accuracy,'{here}/mine.py:by_place']",
]  # fmt: skip
RUNS = {
    "base": ["grpo.reference=base"],
    "start": ["grpo.reference=start"],
    "measured": [
        "grpo.reference=start", "train.evaluate=true", "train.eval_steps=1", "data.eval_limit=4", "data.general=null",
    ],
}  # fmt: skip
facts = {}
for run, changes in RUNS.items():
    code = main(["train", "--recipe", "tiny_cpu", *OVERRIDES, *changes, f"output.dir={here / run}"])
    assert code == 0, code
    rows = [json.loads(line) for line in (here / run / "metrics.jsonl").read_text().splitlines()]
    names = [name for name, p in policies[-1].model.named_parameters() if p.requires_grad]
    facts[run] = {
        "kl": [row["kl"] for row in rows],
        "held_out": [row.get("held_out_length") for row in rows],
        "engine": policies[-1].engine,
        "loaded": len(names),
        "expected": sum(parameter.requires_grad for parameter in model.parameters()),
        "folders": [str(path) for path in (here / run).glob("**/reference")],
    }
Path("facts.json").write_text(json.dumps(facts))
