"""rollout.ahead in the trainer: which rollout is begun, with which adapter, and what is recorded of it."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from tiny_trainer import recipe_of
from torch.utils.data import BatchSampler

from apo_lora.machine import ranks
from apo_lora.rollout.prompts import next_items
from apo_lora.rollout.sampling import Sampled
from apo_lora.run.hooks import APOCallback


def adapter_of(model):
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_B" in name]).clone()


class Recorder:
    """A sampler that answers with the same few tokens, and notes what it is asked for."""

    ahead = 1

    def __init__(self):
        self.begun, self.asked, self.under_way = [], [], None

    def begin(self, model, step, items, groups):
        assert self.under_way is None and len(items) == len(groups)
        self.under_way = (step, adapter_of(model), [item["index"] for item in items])
        self.begun.append(self.under_way)

    def __call__(self, model, step, items, prompt_ids, groups):
        wanted = [item["index"] for item in items]
        sampled_at = step
        if self.under_way:
            sampled_at, _, indices = self.under_way
            assert indices == wanted
        self.under_way = None
        self.asked.append((step, adapter_of(model), wanted))
        completions = [[10 + row, 20, 30][: 1 + row % 3] for row in range(len(items))]
        return Sampled(completions, [[-1.0] * len(ids) for ids in completions], sampled_at)


class Record(APOCallback):
    def __init__(self):
        self.rows = []

    def on_rollout(self, step, scored):
        self.rows.append((step, set(scored.rollout.adapter_steps)))


LAYOUTS = {
    "a step each": {},
    "two steps each": {"prompts_per_rollout": 4},
    "twice over": {"num_iterations": 2, "completions_per_pass": 4},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rollout_that_is_begun_is_the_next_one_with_the_adapter_of_now(layout, make_trainer):
    trainer = make_trainer(recipe_of(grpo=LAYOUTS[layout], train={"max_steps": 4}))
    trainer.sampler = sampler = Recorder()
    trainer.add_callback(record := Record())
    trainer.train()
    steps = 1 if layout == "a step each" else 2
    starts = list(range(0, 4, steps))
    assert [step for step, _, _ in sampler.asked] == starts
    # The first is asked for as it is needed, every other one is begun where the one before it trains.
    assert [step for step, _, _ in sampler.begun] == starts[:-1] and sampler.under_way is None
    before = [adapter for _, adapter, _ in sampler.asked]
    for (_, begun_with, _), had, has in zip(sampler.begun, before, before[1:], strict=False):
        assert torch.equal(begun_with, had) and not torch.equal(begun_with, has)
    assert record.rows == [(start + 1, {max(0, start - steps)}) for start in starts]
    logged = [log["staleness"] for log in trainer.state.log_history if "staleness" in log]
    assert logged == [0.0] * steps + [float(steps)] * (4 - steps)
    assert {log["tokens_per_second"] for log in trainer.state.log_history if "staleness" in log} == {None}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_next_rows_are_those_that_the_data_loader_gives_each_process(processes, make_trainer, monkeypatch):
    trainer = make_trainer(recipe_of(grpo={"prompts_per_rollout": 4, "num_iterations": 2, "completions_per_pass": 4}))
    config, rows = trainer.args, trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    config.generation_batch_size = rows * processes
    order = BatchSampler(trainer._get_train_sampler(), rows, drop_last=True)
    repeats = config.steps_per_generation * config.num_iterations
    steps = repeats // config.gradient_accumulation_steps
    monkeypatch.setattr(ranks, "num_processes", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        batches = list(BatchSamplerShard(order, processes, rank, split_batches=False))[::repeats]
        for number, batch in enumerate(batches[1:]):
            state = SimpleNamespace(global_step=number * steps, max_steps=1000)
            items = next_items(trainer.train_dataset, config, state)
            assert [item["index"] for item in items] == batch
        assert len(batches) == 4 // processes
    last = SimpleNamespace(global_step=1000 - steps, max_steps=1000)
    assert next_items(trainer.train_dataset, config, last) == []
