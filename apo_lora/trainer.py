"""APOTrainer: the current `trl.GRPOTrainer`, with APO's credit and loss instead of GRPO's.

On a CPU that is TRL's own class; after `import unsloth` it is Unsloth's rewritten one. TRL samples, calls the rewards
and steps. docs/architecture.md lists what is overridden, and why.

Imported after the engine is chosen, since the base class is fixed at import.
"""

import copy
import tempfile
import time
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from apo_lora.apo import apo_loss, without_variance
from apo_lora.config import APOConfig
from apo_lora.family.lookup import closest_family, family_of, inner_model_of
from apo_lora.machine import ranks
from apo_lora.machine.compat import kept_static_cache
from apo_lora.policy.batches import row_slices
from apo_lora.policy.loading import reference_mode, set_reference
from apo_lora.policy.passes import Pass, PassSize, StepFigures, out_of_memory
from apo_lora.policy.scoring import token_logps
from apo_lora.policy.shared_prompt.attention import accept_prompt_groups, obstacle
from apo_lora.policy.shared_prompt.prefill import prompts_read_once
from apo_lora.policy.shared_prompt.vision_features import image_features, tower_is_frozen
from apo_lora.rewards.calls import CheckedRewards
from apo_lora.rewards.functions import completion_text
from apo_lora.rollout.credit import Rollout, credit_rule
from apo_lora.rollout.group_images import RowPixels, images_processed_once
from apo_lora.rollout.off_policy import correction
from apo_lora.rollout.prompts import next_items, other_items
from apo_lora.rollout.sampling import Sampler, converted_adapters, generation_fault, watched_forwards, without_dropout
from apo_lora.rollout.zero_variance import resampled, without_rows
from apo_lora.run.callbacks import NonFiniteGuard
from apo_lora.run.hooks import APOCallback
from apo_lora.run.log_window import LogWindow


class APOTrainer(GRPOTrainer):
    """GRPO with DADS and STCR on a LoRA policy; replaces `trl.GRPOTrainer` and takes its arguments.

    The reference is the same model with its adapter off, or with a frozen copy of it (`args.reference`): no second
    model is made. `args` is an APOConfig, and `sampler` samples in place of generate(). Raises ValueError for a model
    without an adapter.
    """

    def __init__(self, model, reward_funcs=None, args: APOConfig | None = None, *arguments, sampler=None, **named):
        self.sampler: Sampler | None = sampler
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = APOConfig(f"{Path(name).name}-APO")
        if not isinstance(args, APOConfig):
            raise ValueError(
                f"APOTrainer: args must be an APOConfig, not {type(args).__name__}; it takes the same arguments"
            )
        if any(named.get(name) for name in ("tools", "environment_factory", "rollout_func")):
            raise ValueError("APOTrainer: tools, environments and rollout functions are not supported; leave them out")
        self.checked_rewards = CheckedRewards()
        given = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs] * (reward_funcs is not None)
        reward_funcs = [self.checked_rewards.of(one) if _is_function(one) else one for one in given]
        # With a beta, TRL would copy the fresh adapter as a reference policy, and run an extra pass over it.
        own = copy.copy(args)
        own.beta = 0.0
        super().__init__(model, reward_funcs, own, *arguments, **named)
        self.args.beta = args.beta
        if not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            raise ValueError("APOTrainer: the model has no adapter; give peft_config=LoraConfig(...), or a PeftModel")
        if any(weight.requires_grad for weight in closest_family(self.model).head_of(self.model).parameters()):
            raise ValueError("APOTrainer: lm_head must be frozen; leave it out of target_modules and modules_to_save")
        set_reference(self.accelerator.unwrap_model(self.model), self.args.reference)
        accept_prompt_groups(self.model)  # before the first rollout, whoever loaded the model
        self._never_sample(closest_family(self.model).vision_token_ids(self.processing_class))
        self.credit_of = credit_rule(self.args, self.reward_func_names, self.reward_weights)
        self.pass_size = PassSize(self.args.per_device_train_batch_size)
        self.shares_prompts = self.args.shared_prompt
        if self.shares_prompts and (reason := obstacle(self.model)):
            tqdm.write(f"shared_prompt: not used, {reason}; every completion is scored with its own copy of the prompt")
            self.shares_prompts = False
        self.rollout_features: list[Tensor | None] | None = None
        self.rollout_pixels: RowPixels = []
        self.trained_parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.nonfinite_guard = NonFiniteGuard(
            self.model, self.args.max_nonfinite_steps, scaler=lambda: self.accelerator.scaler
        )
        self.add_callback(self.nonfinite_guard)
        self.rollout_figures: dict[str, float | None] = {}
        self.step_figures = StepFigures()
        self.window = LogWindow()

    def _never_sample(self, token_ids: list[int]) -> None:
        """A sampled image token has no pixels, and breaks the next forward pass."""
        if self.use_vllm:
            return
        # Sampling from logits with a NaN raises (on a GPU it ends the process); scored, they cost only one step.
        options = {"remove_invalid_values": True, **({"suppress_tokens": token_ids} if token_ids else {})}
        self.generation_config.update(**options)
        self.generation_kwargs.update(options)

    @property
    def _apo_callbacks(self) -> list[APOCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, APOCallback)]

    # --- rollout -----------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        started = time.perf_counter()
        rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rollout = Rollout(
            indices=ranks.gathered([example.get("index") for example in inputs]),
            texts=ranks.gathered([completion_text(completion) for completion in completions]),
            adapter_steps=ranks.gathered([self.adapter_step] * len(inputs)),
            # Gathered already. A reward function's None gives nothing, and neither does what is not finite.
            rewards_BF=rewards_BF.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0),
            lengths_B=rewards_BF.new_tensor(ranks.gathered([len(ids) for ids in completion_ids_list])),
            truncated_B=rewards_BF.new_tensor(
                ranks.gathered([ids[-1] not in self.eos_token_ids for ids in completion_ids_list])
            ),
            seconds_for_rewards=time.perf_counter() - started,
        )
        return rewards_BF

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *arguments, **options):
        model, groups = self.accelerator.unwrap_model(self.model), self._groups(len(prompt_ids))
        self.adapter_step = step = self.state.global_step
        if self.sampler:
            ids, logps, self.adapter_step = self.sampler(model, step, self.rollout_items, prompt_ids, groups)
            return ids, logps
        if self.use_vllm or not self.shares_prompts:
            if self.rollout_pixels and not self.use_vllm:  # vLLM processes them itself; the others need every row's
                pixels = [part for part in self.rollout_pixels if part is not None]
                multimodal_fields = {**multimodal_fields, "pixel_values": torch.cat(pixels)}
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *arguments, **options)
        images_per_row = [len(own or ()) for own in images or [None] * len(prompt_ids)]
        with kept_static_cache(), prompts_read_once(self._inner_model, groups, images_per_row) as features:
            output = super()._generate_single_turn(prompt_ids, images, multimodal_fields, *arguments, **options)
        if tower_is_frozen(self._inner_model):
            self.rollout_features = features
        return output

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _groups(self, rows: int) -> list[int]:
        """Which prompt each of this process's rows answers, counted over all processes: a group may lie on two."""
        first = ranks.rank() * rows
        return [place // self._group_size for place in range(first, first + rows)]

    @property
    def _inner_model(self) -> nn.Module:
        return inner_model_of(self.accelerator.unwrap_model(self.model))

    def _prepare_inputs(self, generation_batch):
        """The micro-batches of a rollout in its own order: TRL shuffles sequences, which tears groups apart."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = list(row_slices(batch, len(batch["prompt_ids"]) // self.args.steps_per_generation))
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _sample(self, inputs: list[dict[str, Any]]) -> tuple[dict[str, Any], Rollout]:
        """TRL's rollout of these items, G to a prompt, with what lets scoring compute each prompt once."""
        self.rollout_features, self.rollout_items = None, inputs
        started, model = time.perf_counter(), self.accelerator.unwrap_model(self.model)
        elsewhere = self.sampler or self.use_vllm or self.use_transformers_continuous_batching
        if inputs[0].get("image") is not None or inputs[0].get("images"):
            family_of(model)  # raises for a model whose images cannot be split into passes
        try:
            with (
                watched_forwards(model) as forwards,
                without_dropout(model),
                nullcontext() if elsewhere else converted_adapters(model, self.args),
                images_processed_once(self.processing_class, self._groups(len(inputs))) as self.rollout_pixels,
            ):
                batch = super()._generate_and_score_completions(inputs)
        except torch.OutOfMemoryError:
            raise out_of_memory(f"sampling {len(inputs)} completions at once") from None
        if fault := None if elsewhere else generation_fault(forwards):
            warnings.warn(f"{fault} while sampling, which makes it many times slower", RuntimeWarning, stacklevel=2)
        self.window.seconds["generate"] += time.perf_counter() - started - self.rollout.seconds_for_rewards
        self.window.seconds["reward"] += self.rollout.seconds_for_rewards
        self.window.sampled_tokens += self.rollout.lengths_B.sum().item()
        if self.rollout_pixels:
            batch["pixel_values"] = self.rollout_pixels
        return self._with_shared_prompts(batch), self.rollout

    def _generate_and_score_completions(self, inputs):
        batch, rollout = self._sample(inputs)
        credit_of = replace(self.credit_of, num_generations=self._group_size)
        scored = credit_of(rollout)
        on_zero_variance, num_resampled = self.args.zero_variance_groups, 0
        if on_zero_variance == "resample" and self.model.training:
            others = partial(other_items, self.train_dataset, self.args.seed, self.state)
            batch, scored, num_resampled = resampled(batch, scored, credit_of, others, self._sample)
        ahead = self.sampler and self.sampler.ahead and self.model.training
        if ahead and (items := next_items(self.train_dataset, self.args, self.state)):
            model = self.accelerator.unwrap_model(self.model)
            self.sampler.begin(model, self.state.global_step, items, self._groups(len(items)))
        own = slice(ranks.rank() * len(inputs), (ranks.rank() + 1) * len(inputs))  # groups may lie across processes
        # Whatever is in the batch is split along with it.
        batch["advantages"] = scored.credit.advantages_NG.flatten()[own]
        batch["kl_weights"] = scored.credit.kl_weights_NG.flatten()[own]
        batch["correct"] = scored.correct_NG.flatten()[own]
        is_skipped_N = without_variance(scored.rewards_NG) & (on_zero_variance != "keep")
        if is_skipped_N.any():
            batch = without_rows(batch, is_skipped_N.repeat_interleave(self._group_size)[own])
        self._score_frozen_policies(batch)
        if not self.model.training:
            return batch
        self.rollout_figures = {
            **scored.figures(self.reward_func_names),
            "resampled_groups": float(num_resampled),
            "skipped_groups": is_skipped_N.sum().item(),
            # How long sampling took is not known where only the end of it was waited for.
            "tokens_per_second": None if ahead else self.window.sampled_tokens / self.window.seconds["generate"],
            **({"staleness": scored.rollout.staleness(self.state.global_step)} if self.sampler else {}),
        }
        if ranks.is_main():
            for callback in self._apo_callbacks:
                callback.on_rollout(self.state.global_step + 1, scored)
        return batch

    # --- scoring and loss --------------------------------------------------------------------------------------------

    def _score(self, batch: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
        with self.accelerator.autocast():
            model = self.accelerator.unwrap_model(self.model)
            return token_logps(model, batch, temperature=self.temperature, **options)

    def _with_shared_prompts(self, rollout: dict[str, Any]) -> dict[str, Any]:
        """The rollout with what lets scoring compute a prompt once for its completions, and its images once for all."""
        if not self.shares_prompts:
            return rollout
        ids = rollout["prompt_ids"]
        shared = {**rollout, "group": torch.tensor(self._groups(len(ids)), device=ids.device)}
        if not tower_is_frozen(self._inner_model):
            return shared
        if self.rollout_features is None:  # sampling computes them on its way, where it is the model's own
            try:
                with self.accelerator.autocast():
                    self.rollout_features = image_features(self._inner_model, shared)
            except torch.OutOfMemoryError:
                raise out_of_memory("the images of one prompt") from None
        return {**shared, "image_features": self.rollout_features}

    def _score_frozen_policies(self, batch: dict[str, Any]) -> None:
        """Puts the reference's log-probs into the batch, and the old policy's where TRL wants them."""
        started, model = time.perf_counter(), self.accelerator.unwrap_model(self.model)

        def score() -> Tensor:
            return self.pass_size.fitting(lambda rows: self._score(batch, rows_per_pass=rows, entropies=False))[0]

        with torch.no_grad(), without_dropout(model):
            with reference_mode(model):
                batch["ref_logps"] = score()
            if batch.get("old_per_token_logps") is not None:
                batch["old_per_token_logps"] = score()
        self.window.seconds["score"] += time.perf_counter() - started

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """TRL asks here for the old policy when a rollout feeds several optimizer steps, before the rewards are known.

        _score_frozen_policies fills it in later, when it is known which groups are worth it.
        """
        return torch.zeros(input_ids[:, -logits_to_keep:].shape, device=input_ids.device), None, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro-batch's share of the step's loss, backward included.

        Backward happens here, pass by pass, so that running out of memory can be answered with smaller passes. The
        loss that is returned is a leaf: the Trainer's own backward ends at it.
        """
        # Before the passes: out of memory repeats them on one process only, and this needs all of them.
        totals = self._step_totals(inputs)
        # The micro-batch's own gradients come apart, so that dropping them undoes what a failed attempt left behind.
        accumulated = [parameter.grad for parameter in self.trained_parameters]

        def forward_and_backward(rows_per_pass: int) -> list[Pass]:
            for parameter in self.trained_parameters:
                parameter.grad = None
            passes = []
            for rows in row_slices(inputs, rows_per_pass):
                done = self._forward(rows, *totals)
                if done.loss.requires_grad:
                    self.accelerator.backward(done.loss)
                passes.append(done.detached())
            return passes

        passes = self.pass_size.fitting(forward_and_backward)
        for parameter, gradient in zip(self.trained_parameters, accumulated, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        for done in passes if model.training else ():
            self.step_figures.add(done)
        return torch.stack([done.loss for done in passes]).sum().requires_grad_(torch.is_grad_enabled())

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.nonfinite_guard.see_loss(loss)
        if self.accelerator.sync_gradients:  # the step's last micro-batch; clipping comes next
            for parameter in self.trained_parameters:
                if parameter.grad is None:  # every group was skipped; GradScaler wants gradients all the same
                    parameter.grad = torch.zeros_like(parameter)
            # The scoring pass calls the inner model, around the wrapper that would average gradients.
            ranks.sum_gradients(self.trained_parameters)
            self.window.add_step({**self.rollout_figures, **self.step_figures.over_ranks()})
            self.step_figures = StepFigures()
        return loss

    def _forward(self, inputs: dict[str, Any], num_tokens: float, num_sequences: float) -> Pass:
        logps, entropies = self._score(inputs, entropy_gradient=self.args.entropy_coef > 0)
        # Fully on-policy, the old policy is the policy: the ratio is 1 and only its gradient matters.
        old_logps = inputs.get("old_per_token_logps", logps.detach())
        correct = correction(inputs, old_logps, self.args.importance_cap, num_tokens)
        loss, figures = apo_loss(
            logps,
            old_logps,
            inputs["ref_logps"],
            inputs["completion_mask"],
            inputs["advantages"],
            inputs["kl_weights"],
            beta=self.args.beta,
            epsilon=self.args.epsilon,
            epsilon_high=self.args.epsilon_high,
            ratio=self.args.importance_sampling_level,
            normalization=self.args.normalization,
            max_tokens=self.args.max_completion_length,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            entropies_BT=entropies,
            entropy_coef=self.args.entropy_coef,
            policy_weights_BT=correct.weights_BT,
        )
        return Pass(inputs, loss, figures | correct.figures, logps, entropies, correct.largest)

    def _step_totals(self, inputs: dict[str, Any]) -> tuple[float, float]:
        """Tokens and sequences that this optimizer step trains on, over all its micro-batches and processes."""
        passes = self.current_gradient_accumulation_steps
        first = self._step % self.args.steps_per_generation // passes * passes
        step = self._buffered_inputs[first : first + passes] if self.model.training else [inputs]
        masks = [batch["completion_mask"] for batch in step]
        counts = {
            "tokens": sum(mask.sum().item() for mask in masks),
            "sequences": sum(mask.any(dim=-1).sum().item() for mask in masks),
        }
        tokens, sequences = ranks.summed(counts).values()
        return max(tokens, 1), max(sequences, 1)

    # --- figures and checkpoints -------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's figures and ours, means over the optimizer steps since the last line; ours where both have a name."""
        if self.window.steps and "grad_norm" in logs:  # not of an evaluation, nor the summary at the end
            own = {**self.window.means(), "skipped_nonfinite_steps": self.nonfinite_guard.skipped}
            for callback in self._apo_callbacks:
                own |= callback.figures()
            own |= self.window.cost(elsewhere=own.get("seconds_held_out", 0.0))
            for name in own:
                self._metrics["train"].pop(name, None)
            logs = {**logs, **own}
            self.window = LogWindow()
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with ExitStack() as inside:
            for callback in self._apo_callbacks:
                inside.enter_context(callback.around_save(folder))
            super()._save_checkpoint(model, trial)
        ranks.wait()  # no process continues or ends beside an incomplete checkpoint

    def _save_rng_state(self, output_dir):
        """Each process has its own random state; the main one writes them all."""
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            files = ranks.gathered([(file.name, file.read_bytes()) for file in Path(folder).iterdir()])
        if ranks.is_main():
            for name, content in files:
                (Path(output_dir) / name).write_bytes(content)


def _is_function(reward: Any) -> bool:
    """And not a reward model, or its name."""
    return callable(reward) and not isinstance(reward, nn.Module)
