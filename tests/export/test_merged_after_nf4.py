"""What a merge into 16 bit means for an adapter trained on NF4: the base's own quantisation error, about."""

import torch
from transformers import AutoProcessor

from apo_lora.commands.main import main
from apo_lora.export.comparison import check_prompts, load_plain
from apo_lora.tiny import BASE_DIR


@torch.no_grad()
def logps(model):
    prompts = check_prompts(AutoProcessor.from_pretrained(BASE_DIR))
    inputs = [each for kind in prompts.values() for each in kind]
    return torch.cat([torch.log_softmax(model(**each).logits[0].float(), -1) for each in inputs])


def rms(differences):
    return differences.square().mean().sqrt().item()


def test_the_merged_model_differs_by_about_the_bases_quantisation_error(load_tiny, stir_adapter, tmp_path):
    policy = load_tiny(load_in_4bit=True)
    stir_adapter(policy.model, scale=0.05)
    policy.model.eval().save_pretrained(tmp_path / "adapter")
    assert main(["export", str(tmp_path / "adapter"), "--to", "merged"]) == 0
    trained = logps(policy.model)
    with policy.model.disable_adapter():
        four_bit = logps(policy.model)
    error_of_base = rms(four_bit - logps(load_plain(BASE_DIR)))
    error_of_merged = rms(trained - logps(load_plain(tmp_path / "merged")))
    print(f"quantisation error of the base {error_of_base:.3f}, of the merged model {error_of_merged:.3f}")
    assert error_of_base > 0.1 and rms(trained - four_bit) > 0.1
    assert 0.5 < error_of_merged / error_of_base < 2
