"""Seconds and peaks of the phases of a step in benchmarks/gpu, and the table that is made of them."""

import sys
from types import SimpleNamespace

import torch

from benchmarks.gpu import card, phase_clock, results


class FakeTrainer:
    """Calls what a GRPO trainer calls in a step; each method takes seconds of its own."""

    def __init__(self, clock):
        self.clock = clock

    def add_callback(self, callback):
        self.callback = callback

    def _generate(self):
        self.clock.now += 5

    def _calculate_rewards(self):
        self.clock.now += 0.5

    def _generate_and_score_completions(self):
        self.clock.now += 1
        self._generate()
        self._calculate_rewards()
        self.clock.now += 2
        return {"completion_mask": torch.ones(2, 10), "prompt_mask": torch.ones(2, 3)}

    def train(self, steps):
        for step in range(steps):
            self.clock.now += 100  # between steps: checkpoints, logs
            self.callback.on_step_begin(None, None, None)
            self._generate_and_score_completions()
            self.clock.now += 7 if step else 70
            self.callback.on_step_end(None, None, None)


def test_every_second_of_a_step_belongs_to_one_phase_and_the_first_step_is_not_timed(monkeypatch):
    time_ = SimpleNamespace(now=0.0)
    monkeypatch.setattr(phase_clock.time, "perf_counter", lambda: time_.now)
    trainer, seen = FakeTrainer(time_), []
    clock = phase_clock.PhaseClock(trainer, lambda steps: seen.append(len(steps)))
    trainer.train(3)
    summary = clock.summary()
    assert summary["seconds"] == {"generate": 5, "reward": 0.5, "score": 3, "train": 7}
    assert summary["seconds_per_step"] == 15.5 and summary["tokens_per_second"] == 20 / 5
    assert summary["tokens"] == {"prompt": 6, "completion": 20} and seen == [1, 2, 3]


def test_a_phases_peak_is_its_own(monkeypatch):
    memory = SimpleNamespace(peak=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory.peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: memory.peak + 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(memory, "peak", 0))

    class Allocating(FakeTrainer):
        def _generate(self):
            memory.peak = 40

        def _generate_and_score_completions(self):
            memory.peak = 10
            return super()._generate_and_score_completions()

    trainer = Allocating(SimpleNamespace(now=0.0))
    clock = phase_clock.PhaseClock(trainer, lambda steps: setattr(memory, "peak", 99))  # after a step: nobody's
    trainer.callback.on_step_begin(None, None, None)
    trainer._generate_and_score_completions()
    memory.peak = 30
    trainer.callback.on_step_end(None, None, None)
    assert clock.steps[0]["peak_bytes"] == {"generate": 40, "reward": 0, "score": 10, "train": 30}
    assert clock.peak_reserved == 41


def test_a_large_card_pretends_to_be_a_small_one(monkeypatch):
    GiB = 2**30
    capped = []
    assert card.pretend_card(8) is None  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (70 * GiB, 80 * GiB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 3 * GiB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", capped.append)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device=None: capped[0], raising=False)
    assert card.pretend_card(80.5) is None and capped == []  # no larger than that
    cap = card.pretend_card(8)
    assert cap == 7.5 * GiB and capped == [7.5 / 80]
    assert torch.cuda.mem_get_info() == (4.5 * GiB, cap)
    assert torch.cuda.get_per_process_memory_fraction() == 1


# --- the table --------------------------------------------------------------------------------------------------------


def peer(engine: str, rows: int, gib: float, seconds: float, tokens: int = 4096) -> dict:
    phases = ("generate", "reward", "score", "train")
    return {
        "status": "finished", "seconds_in_all": 1.0, "date": "2026-12-01T00:00", "checks": [],
        "setting": {"size": "3b", "steps": 2, "code": "abc"}, "engine": engine, "rows_at_once": rows,
        "peak_bytes": dict.fromkeys(phases, gib * 2**30), "peak_bytes_of_step": gib * 2**30,
        "seconds": dict.fromkeys(phases, seconds), "seconds_per_step": 4 * seconds,
        "tokens": {"prompt": 6144, "completion": tokens}, "tokens_per_second": tokens / seconds,
        "environment": {
            "python": "3.12.0", "packages": {"torch": "2.11.0", "xformers": None},
            "gpu": {"name": "Some Card", "memory_bytes": 80 * 2**30, "cuda": "13.0"},
        },
    }  # fmt: skip


def test_a_peer_is_set_against_ours_with_as_many_rows_at_once():
    found = {
        "peers/ours-group": peer("ours", 8, 4, 2),
        "peers/ours-row": peer("ours", 1, 2, 5),
        "peers/trl-row": peer("trl", 1, 6, 10),
    }
    table = results.table(found)
    assert table.startswith("# Measured on a GPU")
    assert "2026-12-01: Some Card, 80 GiB, CUDA 13.0; Python 3.12.0; torch 2.11.0; random weights of the 3b" in table
    (row,) = [line for line in table.splitlines() if line.startswith("| trl-row |")]
    assert row == (
        "| trl-row | 1 | 6.00 (3.00) | 6.00 (3.00) | 6.00 (3.00) | 6.00 (3.00) "
        "| 10.00 (2.00) | 10.00 (2.00) | 10.00 (2.00) | 40.00 (2.00) | 410 (0.50) |"
    )
    assert "Everybody read 6,144 and wrote 4,096 tokens a step." in table


def test_aims_are_met_or_missed_with_each_side_at_its_best():
    found = {
        "peers/ours-group": peer("ours", 8, 4, 2),
        "peers/ours-row": peer("ours", 1, 2, 5),
        "peers/unsloth-default": peer("unsloth", 8, 5, 5),
        "peers/trl-row": peer("trl", 1, 2.2, 3),
    }
    table = results.table(found)
    assert "| seconds of score + train, to stock Unsloth | 0.40 | at most 0.5 | met |" in table
    assert "| seconds of score + train, to stock TRL | 0.67 | at most 0.5 | **missed** |" in table
    assert "| peak memory, to stock Unsloth at its default | 0.40 | at most 0.5 | met |" in table
    assert "| peak memory, to stock TRL row by row | 0.91 | at most 0.85 | **missed** |" in table
    assert "thriftiest" not in table and "with the group at once" not in table  # not measured


def test_unequal_work_is_called_so():
    table = results.table({"peers/ours-row": peer("ours", 1, 2, 5), "peers/trl-row": peer("trl", 1, 6, 10, 4095)})
    assert "**Not comparable**" in table and "Everybody" not in table


def test_results_of_several_commands_are_put_together(tmp_path, monkeypatch):
    for name, number in (("a", 1.0), ("b", 2.0)):
        results.write(
            tmp_path / name, {"peers/ours-row": peer("ours", 1, number, 1), f"peers/{name}": peer("x", 1, 3, 1)}
        )
    files = [str(tmp_path / name / results.RESULTS) for name in "ab"]
    monkeypatch.setattr(sys, "argv", ["results", *files, "--to", str(tmp_path / "both")])
    results.main()
    both = results.read(tmp_path / "both")
    assert sorted(both) == ["peers/a", "peers/b", "peers/ours-row"]
    assert both["peers/ours-row"]["peak_bytes_of_step"] == 2 * 2**30  # the later file's
    assert "| a | 1 | 3.00 (1.50) |" in (tmp_path / "both" / results.TABLE).read_text()
