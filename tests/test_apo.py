"""The algorithm, against numbers worked by hand from the formulas in apo.py's header."""

import itertools
import math

import pytest
import torch

from apo_lora.apo import (
    NORMALIZATIONS,
    RATIOS,
    REWARD_SCALES,
    apo_loss,
    assign_credit,
    dads_kl_weights,
    group_advantages,
    stcr_multipliers,
    token_kl,
)

F64 = torch.float64


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


# --- advantages ------------------------------------------------------------------------------------------------------


def test_advantages_use_the_unbiased_deviation():
    # mean 0.5; squared deviations sum to 1; unbiased variance 1/3, deviation 1/sqrt(3)
    advantages = group_advantages(tensor([1.0, 0.0, 0.0, 1.0]))
    root3_by_2 = math.sqrt(3) / 2
    torch.testing.assert_close(
        advantages, tensor([root3_by_2, -root3_by_2, -root3_by_2, root3_by_2]), rtol=1e-8, atol=0
    )


def test_advantages_of_two_generations():
    # mean 0.75, deviations +-0.75, unbiased deviation 0.75 * sqrt(2)
    root_half = 1 / math.sqrt(2)
    torch.testing.assert_close(group_advantages(tensor([1.5, 0.0])), tensor([root_half, -root_half]), rtol=1e-8, atol=0)


def test_advantages_see_their_own_group_only():
    both = group_advantages(tensor([1.0, 0.0], [5.0, 3.0]))
    torch.testing.assert_close(both[0], group_advantages(tensor([1.0, 0.0]))[0])
    torch.testing.assert_close(both[1], both[0])  # standardised: the level and scale of a group are gone


@pytest.mark.parametrize("reward", [0.0, 0.1, 0.5, 1.5])
@pytest.mark.parametrize("generations", [2, 3, 7, 8])
def test_a_group_without_variance_has_no_advantage(reward, generations):
    # 0.1 summed 3 or 7 times in float32 leaves a residue that 1e-9 would not hide
    assert torch.equal(group_advantages(torch.full((1, generations), reward)), torch.zeros(1, generations))


def test_one_generation_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(4, 1))


def test_what_advantages_are_divided_by():
    # centred: +-1 and +-2. Deviation of a group of two: sqrt(2) and 2 sqrt(2). Of all four rewards 3, 1, 4, 0 (mean 2,
    # squared deviations 1 + 1 + 4 + 4): sqrt(10 / 3).
    rewards, half, whole = tensor([3.0, 1.0], [4.0, 0.0]), math.sqrt(0.5), math.sqrt(10 / 3)
    for scale, expected in (
        ("group", tensor([half, -half], [half, -half])),
        ("batch", tensor([1 / whole, -1 / whole], [2 / whole, -2 / whole])),
        ("none", tensor([1.0, -1.0], [2.0, -2.0])),
    ):
        torch.testing.assert_close(group_advantages(rewards, scale=scale), expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("scale", REWARD_SCALES)
def test_dads_and_stcr_combine_with_every_scale(scale):
    """Both ask for signs, lengths and correctness, which no scale changes."""
    correct = tensor([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0])
    lengths = tensor([20.0, 20.0, 20.0, 30.0], [20.0, 20.0, 20.0, 30.0])
    credit = assign_credit(correct, correct, lengths, stcr_base=1.1, scale_rewards=scale)
    plain = group_advantages(correct, scale=scale)
    torch.testing.assert_close(credit.advantages_NG[:, 3], plain[:, 3] * (2 - 1.1**-10))
    torch.testing.assert_close(credit.advantages_NG[:, :3], plain[:, :3])
    easy, hard = 1 - math.exp(-math.e * 0.75), 1 - math.exp(-math.e / 4)
    torch.testing.assert_close(credit.kl_weights_NG, tensor([hard, 1.0, 1.0, 1.0], [easy, easy, easy, 1.0]))
    uniform = torch.full((2, 7), 0.1)
    assert torch.equal(group_advantages(uniform, scale=scale), torch.zeros(2, 7))


# --- DADS ------------------------------------------------------------------------------------------------------------


def test_dads_weights_of_hard_and_easy_prompts():
    one_of_eight = tensor([1.0] + [0.0] * 7)
    seven_of_eight = 1 - one_of_eight
    hard = dads_kl_weights(one_of_eight, group_advantages(one_of_eight))
    easy = dads_kl_weights(seven_of_eight, group_advantages(seven_of_eight))
    assert hard[0, 0].item() == pytest.approx(0.288, abs=5e-4)  # 1 - exp(-e / 8)
    assert easy[0, 1].item() == pytest.approx(0.907, abs=5e-4)  # 1 - exp(-7 e / 8)
    assert torch.equal(hard[0, 1:], torch.ones(7, dtype=F64))  # negatives keep their full weight
    assert easy[0, 0].item() == 1


@pytest.mark.parametrize("correct", [0.0, 1.0])
def test_dads_leaves_all_wrong_and_all_right_groups_alone(correct):
    # positive advantages occur there too: the format reward can differ
    weights = dads_kl_weights(torch.full((1, 4), correct), torch.tensor([[1.0, -1.0, 1.0, -1.0]]))
    assert torch.equal(weights, torch.ones(1, 4))


def test_dads_weighs_wrong_answers_with_positive_advantage():
    # the rule looks at the advantage, not at the answer
    weights = dads_kl_weights(tensor([1.0, 0.0, 0.0, 0.0]), tensor([1.2, 0.3, -0.7, -0.8]))
    expected = 1 - math.exp(-math.e / 4)
    torch.testing.assert_close(weights, tensor([expected, expected, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("complement_exp", 1 - math.exp(-math.e * 0.25)), ("exp_decay", math.exp(-math.e * 0.75)), ("constant", 1.0)],
)
def test_dads_shapes(shape, expected):
    weights = dads_kl_weights(tensor([1.0, 0.0, 0.0, 0.0]), tensor([1.0, -1.0, -1.0, -1.0]), shape)
    assert weights[0, 0].item() == pytest.approx(expected, rel=1e-12)


# --- STCR ------------------------------------------------------------------------------------------------------------


def test_stcr_multiplier_of_the_released_base():
    # right ones 100 and 300 tokens: L+ = 200. Wrong: 1,000 over, 100 over, exactly L+, shorter.
    correct = tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    lengths = tensor([100.0, 300.0, 1200.0, 300.0, 200.0, 50.0])
    multipliers = stcr_multipliers(correct, lengths)
    assert multipliers[0, 2].item() == pytest.approx(1.00995, abs=5e-6)
    assert multipliers[0, 3].item() == pytest.approx(2 - 1.00001**-100, rel=1e-12)
    assert torch.equal(multipliers[0, [0, 1, 4, 5]], torch.ones(4, dtype=F64))


def test_stcr_is_exact_in_float32():
    # 1 - 1.00001^-3 is 3e-5: computed naively in float32, 2 - base**-3 is off by percents of that
    multipliers = stcr_multipliers(torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 8.0]]))
    assert (multipliers[0, 1].double() - 1).item() == pytest.approx(1 - 1.00001**-3, rel=5e-3)


def test_stcr_needs_a_right_answer_to_compare_with():
    lengths = tensor([10.0, 5000.0])
    assert torch.equal(stcr_multipliers(tensor([0.0, 0.0]), lengths), torch.ones(1, 2, dtype=F64))
    assert torch.equal(stcr_multipliers(tensor([1.0, 1.0]), lengths), torch.ones(1, 2, dtype=F64))


# --- credit ----------------------------------------------------------------------------------------------------------


def test_credit_of_one_mixed_group():
    rewards, correct, lengths = (
        tensor([1.5, 0.5, 0.0, 0.0]),
        tensor([1.0, 0.0, 0.0, 0.0]),
        tensor([20.0, 20.0, 20.0, 30.0]),
    )
    credit = assign_credit(rewards, correct, lengths, stcr_base=1.1)
    # mean 0.5; deviations 1, 0, -0.5, -0.5; unbiased variance 1.5 / 3 = 0.5
    scale = math.sqrt(2)
    multiplier = 2 - 1.1**-10
    torch.testing.assert_close(
        credit.advantages_NG, tensor([scale, 0.0, -scale / 2, -scale / 2 * multiplier]), rtol=1e-8, atol=1e-12
    )
    torch.testing.assert_close(credit.stcr_multipliers_NG, tensor([1.0, 1.0, 1.0, multiplier]))
    torch.testing.assert_close(credit.kl_weights_NG, tensor([1 - math.exp(-math.e / 4), 1.0, 1.0, 1.0]))
    torch.testing.assert_close(credit.difficulty_N, torch.tensor([0.75], dtype=F64))


def test_stcr_multiplies_positive_advantages_unless_told_not_to():
    # three of eight formatted, one of them right: a wrong, long, formatted answer has a positive advantage
    rewards = tensor([1.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    correct = tensor([1.0] + [0.0] * 7)
    lengths = tensor([10.0, 90.0, *[5.0] * 6])
    plain = assign_credit(rewards, correct, lengths, stcr=False).advantages_NG
    assert plain[0, 1] > 0
    as_released = assign_credit(rewards, correct, lengths, stcr_base=1.1).advantages_NG
    spared = assign_credit(rewards, correct, lengths, stcr_base=1.1, stcr_amplify_positive=False).advantages_NG
    assert as_released[0, 1] > plain[0, 1] * 1.9
    torch.testing.assert_close(spared, plain)


def test_everything_off_is_plain_grpo():
    generator = torch.Generator().manual_seed(0)
    correct = (torch.rand(5, 8, generator=generator, dtype=F64) > 0.5).double()
    lengths = torch.randint(5, 100, (5, 8), generator=generator).double()
    rewards = correct + 0.5 * (lengths > 30)
    on, off = assign_credit(rewards, correct, lengths), assign_credit(rewards, correct, lengths, dads=False, stcr=False)
    assert not torch.equal(on.kl_weights_NG, off.kl_weights_NG)  # the two can differ
    assert not torch.equal(on.advantages_NG, off.advantages_NG)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-9)
    torch.testing.assert_close(off.advantages_NG, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(off.kl_weights_NG, torch.ones_like(rewards))


def test_inputs_are_not_written_into():
    inputs = [tensor([1.5, 0.0, 0.5, 0.0]), tensor([1.0, 0.0, 0.0, 0.0]), tensor([5.0, 9.0, 7.0, 50.0])]
    before = [t.clone() for t in inputs]
    assign_credit(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_completions_may_come_in_any_order():
    generator = torch.Generator().manual_seed(1)
    correct = (torch.rand(3, 8, generator=generator, dtype=F64) > 0.6).double()
    lengths = torch.randint(5, 100, (3, 8), generator=generator).double()
    order = torch.randperm(8, generator=generator)
    straight = assign_credit(correct * 1.5, correct, lengths, stcr_base=1.05)
    permuted = assign_credit(correct[:, order] * 1.5, correct[:, order], lengths[:, order], stcr_base=1.05)
    torch.testing.assert_close(permuted.advantages_NG, straight.advantages_NG[:, order])
    torch.testing.assert_close(permuted.kl_weights_NG, straight.kl_weights_NG[:, order])


# --- loss ------------------------------------------------------------------------------------------------------------


def test_loss_worked_by_hand():
    # two sequences, of 2 and 1 tokens; 3 tokens in all
    logps = tensor([-1.0, -2.0], [-0.5, -9.0])
    old = tensor([-1.0, -2.5], [-0.4, -9.0])
    ref = tensor([-1.2, -2.0], [-0.5, -9.0])
    mask = tensor([1.0, 1.0], [1.0, 0.0])
    advantages, weights = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([0.3, 1.0], dtype=F64)
    loss, metrics = apo_loss(
        logps, old, ref, mask, advantages, weights, beta=0.1, epsilon=0.2, num_tokens=3, num_sequences=2
    )
    # ratios 1, exp(0.5) = 1.6487 (clipped to 1.2, since A > 0), exp(-0.1) = 0.9048 (inside the clip range)
    policy = -(1.0 + 1.2 + 0.904837418 * -2.0) / 3
    # k3: first token x = -0.2: exp(-0.2) + 0.2 - 1 = 0.018730753; all others 0. Sequence mean 0.0093654, times 0.3.
    kl = (0.3 * 0.018730753 / 2 + 0.0) / 2
    assert metrics["policy_loss"].item() == pytest.approx(policy, rel=1e-8)
    assert metrics["kl_loss"].item() == pytest.approx(kl, rel=1e-7)
    assert metrics["kl"].item() == pytest.approx(0.018730753 / 3, rel=1e-7)
    assert metrics["clip_fraction"].item() == pytest.approx(1 / 3)
    assert loss.item() == pytest.approx(policy + 0.1 * kl, rel=1e-8)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The ratios are exp(0.1), exp(0.3), both of an advantage of 1, and exp(-0.4) of an advantage of -2; clipped to
        # 0.8..1.2. The sequences' own are exp(0.2) and exp(-0.4).
        ({}, -(math.exp(0.1) + 1.2 - 2 * 0.8) / 3),
        ({"normalization": "sequences"}, -((math.exp(0.1) + 1.2) / 2 - 2 * 0.8) / 2),
        ({"normalization": "constant", "max_tokens": 5}, -(math.exp(0.1) + 1.2 - 2 * 0.8) / 10),
        ({"epsilon_high": 0.5}, -(math.exp(0.1) + math.exp(0.3) - 2 * 0.8) / 3),
        ({"epsilon_high": 0.05}, -(1.05 + 1.05 - 2 * 0.8) / 3),
        ({"ratio": "sequence", "epsilon_high": 0.3}, -(2 * math.exp(0.2) - 2 * 0.8) / 3),
        ({"ratio": "sequence", "epsilon_high": 0.3, "normalization": "sequences"}, -(math.exp(0.2) - 2 * 0.8) / 2),
    ],
)
def test_other_losses_worked_by_hand(options, expected):
    old, mask = tensor([-1.0, -2.0], [-0.5, -9.0]), tensor([1.0, 1.0], [1.0, 0.0])
    logps = old + tensor([0.1, 0.3], [-0.4, 7.0])
    advantages, weights = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([0.3, 1.0], dtype=F64)
    loss, metrics = apo_loss(
        logps, old, logps - 0.2, mask, advantages, weights, beta=0.1, epsilon=0.2, num_tokens=3, num_sequences=2,
        **options,
    )  # fmt: skip
    assert metrics["policy_loss"].item() == pytest.approx(expected, rel=1e-9)
    # The KL is the released one under each: k3 of -0.2 is 0.018730753, the same in both sequences.
    assert (loss - metrics["policy_loss"]).item() == pytest.approx(0.1 * 0.018730753 * (0.3 + 1.0) / 2, rel=1e-7)


def test_a_constant_that_is_missing_is_named():
    with pytest.raises(ValueError, match="divides by max_tokens"):
        loss_of(random_inputs(), normalization="constant")


LOSSES = [
    {"ratio": ratio, "normalization": normalization, "epsilon_high": epsilon_high, "max_tokens": 7}
    for ratio in RATIOS
    for normalization in NORMALIZATIONS
    for epsilon_high in (None, 0.4)
]


def random_inputs(batch=6, tokens=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(batch, tokens, generator=generator, dtype=F64) * 3
    logps = old + 0.3 * torch.randn(batch, tokens, generator=generator, dtype=F64)
    ref = old + 0.3 * torch.randn(batch, tokens, generator=generator, dtype=F64)
    lengths = torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    mask = (torch.arange(tokens) < lengths).double()
    advantages = torch.randn(batch, generator=generator, dtype=F64)
    weights = torch.rand(batch, generator=generator, dtype=F64)
    return [logps, old, ref, mask, advantages, weights]


def loss_of(inputs, num_tokens=None, num_sequences=None, **options):
    mask = inputs[3]
    return apo_loss(
        *inputs,
        beta=options.pop("beta", 0.5),
        epsilon=options.pop("epsilon", 0.2),
        num_tokens=num_tokens or mask.sum().item(),
        num_sequences=num_sequences or len(mask),
        **options,
    )[0]


def test_gradient_is_that_of_the_formula():
    inputs = random_inputs()
    logps = inputs[0].clone().requires_grad_()
    entropies = torch.rand_like(inputs[0]).requires_grad_()
    for options in LOSSES:
        assert torch.autograd.gradcheck(
            lambda x, h, options=options: loss_of([x, *inputs[1:]], entropies_BT=h, entropy_coef=0.01, **options),
            (logps, entropies),
        )


def test_every_loss_has_a_gradient_of_its_own():
    gradients = []
    for options in LOSSES:
        inputs = random_inputs()
        loss_of([inputs[0].requires_grad_(), *inputs[1:]], epsilon=0.05, **options).backward()
        gradients.append(inputs[0].grad)
    for one, other in itertools.combinations(gradients, 2):
        assert (one - other).norm() > 1e-3 * one.norm()


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("split", [[1] * 6, [2, 4], [3, 3], [5, 1]])
def test_micro_batches_add_up(split, options):
    inputs = random_inputs()
    whole = inputs[0].clone().requires_grad_()
    loss_of([whole, *inputs[1:]], **options).backward()

    parts = inputs[0].clone().requires_grad_()
    start = 0
    for size in split:
        rows = slice(start, start + size)
        part = [parts[rows], *(t[rows] for t in inputs[1:])]
        loss_of(part, num_tokens=inputs[3].sum().item(), num_sequences=6, **options).backward()
        start += size
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-15)

    # and a mean per micro-batch, which is what goes wrong elsewhere, would differ
    wrong = inputs[0].clone().requires_grad_()
    (loss_of([wrong[:1], *(t[:1] for t in inputs[1:])], **options) / 2).backward()
    (loss_of([wrong[1:], *(t[1:] for t in inputs[1:])], **options) / 2).backward()
    assert (wrong.grad - whole.grad).abs().max() > 1e-3 * whole.grad.abs().max()


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("rubbish", [0.0, 1e30, float("inf"), float("-inf"), float("nan")])
def test_padding_does_not_matter(rubbish, options):
    inputs = random_inputs()
    padded = [torch.nn.functional.pad(t, (0, 3), value=rubbish) for t in inputs[:3]]
    padded += [torch.nn.functional.pad(inputs[3], (0, 3)), *inputs[4:]]
    padded[0].requires_grad_()
    loss = loss_of(padded, **options)
    loss.backward()
    torch.testing.assert_close(loss, loss_of(inputs, **options), rtol=1e-12, atol=0)
    assert torch.isfinite(padded[0].grad).all() and (padded[0].grad[:, -3:] == 0).all()


def test_order_of_sequences_does_not_matter():
    inputs = random_inputs()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(loss_of([t[order] for t in inputs]), loss_of(inputs), rtol=1e-12, atol=0)


def test_kl_weights_and_advantages_matter():
    inputs = random_inputs()
    assert abs(loss_of([*inputs[:5], torch.ones(6, dtype=F64)]) - loss_of(inputs)) > 1e-3
    assert abs(loss_of([*inputs[:4], inputs[4] * 1.1, inputs[5]]) - loss_of(inputs)) > 1e-3


def test_loss_of_credit_without_dads_and_stcr_is_the_grpo_loss():
    """Against GRPO written the long way: a loop over sequences and tokens."""
    logps, old, ref, mask, *_ = random_inputs(batch=4)
    correct = tensor([1.0, 0.0, 0.0, 1.0])
    credit = assign_credit(correct * 1.5, correct, tensor([5.0, 50.0, 3.0, 4.0]), dads=False, stcr=False)
    advantages, weights = credit.advantages_NG.flatten(), credit.kl_weights_NG.flatten()
    surrogate = kl = 0.0
    for i in range(4):
        sequence_kl = []
        for t in range(int(mask[i].sum())):
            ratio = math.exp(logps[i, t] - old[i, t])
            surrogate += min(ratio * advantages[i], min(max(ratio, 0.8), 1.2) * advantages[i]).item()
            x = (ref[i, t] - logps[i, t]).item()
            sequence_kl.append(math.exp(x) - x - 1)
        kl += sum(sequence_kl) / len(sequence_kl)
    expected = -surrogate / mask.sum().item() + 0.04 * kl / 4
    assert loss_of([logps, old, ref, mask, advantages, weights], beta=0.04).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_extreme_log_ratios_stay_finite(options):
    logps = torch.tensor([[-1e4, -1.0, -1e4]], requires_grad=True)
    other = torch.tensor([[-1.0, -1e4, -1e4]])
    loss, _ = apo_loss(
        logps, other, other, torch.ones(1, 3), torch.tensor([-1.0]), torch.ones(1), beta=1.0, epsilon=0.2,
        num_tokens=3, num_sequences=1, **options,
    )  # fmt: skip
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logps.grad).all()


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_all_masked_batch_is_zero_and_finite(options):
    inputs = random_inputs()
    inputs[3] = torch.zeros_like(inputs[3])
    logps = inputs[0].clone().requires_grad_()
    loss = loss_of([logps, *inputs[1:]], num_tokens=1, num_sequences=1, **options)
    loss.backward()
    assert loss.item() == 0 and (logps.grad == 0).all()


def test_k3_is_zero_only_where_the_policies_agree():
    logps = tensor([-1.0, -2.0, -3.0])
    assert torch.equal(token_kl(logps, logps), torch.zeros(1, 3, dtype=F64))
    assert (token_kl(logps, logps + tensor([0.1, -0.1, 2.0])) > 0).all()
