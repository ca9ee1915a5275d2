"""Which values of a run's configuration are compared with what was asked for."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_trainer import recipe_of

from apo_lora.config import APOConfig
from apo_lora.errors import ModelError
from apo_lora.rollout.training_arguments import DEPENDED_ON, config_values, refuse_changes

SCREEN_AND_SPEED = {"report_to", "disable_tqdm", "log_completions", "dataloader_num_workers", "dataloader_pin_memory"}


def test_all_that_we_ask_for_is_compared(tiny_policy):
    asked = config_values(recipe_of(), tiny_policy, Path("checkpoints"), 2).keys()
    assert asked - DEPENDED_ON == SCREEN_AND_SPEED
    assert not DEPENDED_ON - {field.name for field in fields(APOConfig)}


def test_the_precision_of_an_evaluation_that_no_run_does_is_not_compared():
    config = SimpleNamespace(fp16=True, fp16_full_eval=True)
    refuse_changes(config, {"fp16": True, "fp16_full_eval": False}, by=APOConfig)
    with pytest.raises(ModelError, match="APOConfig changed the arguments .*fp16 is True, not False"):
        refuse_changes(config, {"fp16": False, "fp16_full_eval": False}, by=APOConfig)
