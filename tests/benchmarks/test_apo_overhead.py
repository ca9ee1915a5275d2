"""What APO costs beside GRPO, measured once each: the benchmark runs, and the two are different work."""

import json

from benchmarks.apo_overhead import main


def test_both_are_measured_on_one_rollout(tmp_path, capsys):
    small = ["grpo.prompts_per_step=2", "grpo.completions_per_pass=16", "grpo.max_completion_length=80"]
    main(["--out", str(tmp_path / "out.json"), "--pairs", "2", *small])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["losses"]["APO"] != found["losses"]["GRPO"]
    assert min(found["cpu_seconds"].values()) > 0 and len(found["ratio"]["pairs"]) == 2
    assert "APO / GRPO: " in capsys.readouterr().out
