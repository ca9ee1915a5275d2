"""The registry of figures: each is declared once. test_train.py holds what a run records against it."""

import math

import pytest
import torch

from apo_lora.apo import assign_credit
from apo_lora.run.callbacks import STEP_LINE
from apo_lora.run.figures import CURVES, FIGURES, PER_STEP, PLOTS, SAMPLER, SIGNAL_CURVES, format_figure
from apo_lora.run.metrics import TokenMeans, rollout_metrics

PANELS = [*CURVES, *SIGNAL_CURVES, *(panel for panels in PLOTS.values() for panel in panels)]


def test_a_figure_is_declared_once():
    names = [figure.name for figure in (*PER_STEP, *SAMPLER)]
    assert len(set(names)) == len(names)


def test_what_is_computed_of_tensors_is_declared():
    rewards = torch.tensor([[1.0, 0.0]])
    computed = rollout_metrics(rewards, rewards, rewards, rewards, assign_credit(rewards, rewards, rewards))
    means = TokenMeans()
    means.add(*[torch.zeros(1, 2)] * 3, torch.ones(1, 2), torch.zeros(1), torch.zeros(1))
    assert computed.keys() | means.means().keys() < {figure.name for figure in PER_STEP}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_figures_that_share_axes_share_their_unit_and_range(panel):
    assert len({(FIGURES[name].unit, FIGURES[name].range) for name in panel.lines}) == 1


def test_a_value_is_written_as_declared_and_none_is_a_dash():
    assert format_figure("accuracy", 0.12345) == "0.123" and format_figure("kl", 0.5, "+") == "+0.5000"
    assert format_figure("kl", None) == format_figure("kl", math.nan) == format_figure("kl", math.inf) == "-"
    assert "{reward}" in STEP_LINE
