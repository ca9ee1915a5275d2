"""APOTrainer: whatever `trl.GRPOTrainer` is at this moment, with APO's credit and loss in the place of GRPO's.

On a CPU that is TRL's own class; after `import unsloth` it is Unsloth's rewritten one. TRL samples, calls the rewards
and steps. Overridden are:

    _calculate_rewards                       remembers rewards and true lengths of the rollout
    _generate_and_score_completions          puts APO's advantages, KL weights and reference log-probs into the batch
    _get_per_token_logps_and_entropies       leaves the old policy's log-probs to _score_frozen_policies
    _generate_single_turn                    reads each prompt once for its G completions, its images processed once
    _prepare_inputs                          splits a rollout, and keeps the completions of a prompt side by side
    compute_loss                             apo.apo_loss, with its backward
    training_step                            tells the NaN guard the loss
    log, _save_checkpoint                    one record per step; checkpoints that are sealed when whole

Imported after the engine is chosen, since the base class is fixed at import.
"""

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from apo_lora.apo import apo_loss
from apo_lora.machine import ranks
from apo_lora.machine.memory import peak_memory
from apo_lora.policy.batches import row_slices
from apo_lora.policy.loading import reference_mode
from apo_lora.policy.passes import Pass, PassSize, StepFigures, out_of_memory
from apo_lora.policy.scoring import token_logps
from apo_lora.policy.shared_prompt.attention import obstacle
from apo_lora.policy.shared_prompt.prefill import prompts_read_once
from apo_lora.policy.shared_prompt.vision_features import image_features, tower_is_frozen
from apo_lora.recipe.schema import Recipe
from apo_lora.rewards.functions import completion_text
from apo_lora.rollout.credit import Rollout, ScoredRollout, score_rollout
from apo_lora.rollout.group_images import RowPixels, images_processed_once
from apo_lora.rollout.sampling import generation_fault, watched_forwards, without_dropout
from apo_lora.rollout.trl_config import changed_values
from apo_lora.rollout.zero_variance import resampled, without_rows, without_variance
from apo_lora.run.callbacks import NonFiniteGuard
from apo_lora.run.directory import RunDir, seal_checkpoint
from apo_lora.run.disk import room_for_checkpoint

KEPT_LOGS = 50
"""Steps whose figures stay in memory; metrics.jsonl has all."""


class APOTrainer(GRPOTrainer):
    """GRPO with DADS and STCR on a LoRA policy; the reference is the same model with its adapters off."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        run_dir: RunDir,
        record_rollout: Callable[[int, ScoredRollout], None] | None = None,
        more_figures: Callable[[], dict[str, float]] = dict,
        checkpoint_saved: Callable[[], None] = lambda: None,
        **trainer_arguments: Any,
    ):
        """`record_rollout(step, scored)` is called once per rollout, on the main process alone, `more_figures()` once
        per optimizer step, and `checkpoint_saved()` on the main process when one is whole."""
        asked = dict(vars(trainer_arguments["args"]))
        super().__init__(**trainer_arguments)
        changed = changed_values(self.args, asked)  # Unsloth's trainer decides precision again, for example
        assert not changed, f"{type(self).__mro__[1].__name__} changed its configuration: {'; '.join(changed)}"
        for upstream_screen in (PrinterCallback, ProgressCallback):  # dicts of raw numbers; callbacks.Screen has words
            self.remove_callback(upstream_screen)
        self.recipe = recipe
        self.run_dir = run_dir
        self.record_rollout = record_rollout
        self.more_figures = more_figures
        self.checkpoint_saved = checkpoint_saved
        self.pass_size = PassSize(recipe.grpo.completions_per_pass)
        self.shares_prompts = recipe.grpo.shared_prompt
        if self.shares_prompts and (reason := obstacle(self.model)):
            tqdm.write(f"grpo.shared_prompt: {reason}; every completion is scored with a prompt of its own")
            self.shares_prompts = False
        self.rollout_features: list[Tensor | None] | None = None
        self.rollout_pixels: RowPixels = []
        self.trained_parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.nonfinite_guard = NonFiniteGuard(
            self.model,
            recipe.train.max_nonfinite_steps,
            skipped_before=run_dir.last_metrics().get("skipped_nonfinite_steps", 0),
            scaler=lambda: self.accelerator.scaler,
        )
        self.add_callback(self.nonfinite_guard)
        self.rollout_figures: dict[str, float | None] = {}
        self._start_step()

    def _start_step(self) -> None:
        self.step_figures = StepFigures()
        self.seconds = {"generate": 0.0, "reward": 0.0, "score": 0.0}
        self.sampled_tokens = 0.0
        self.step_started = time.perf_counter()

    # --- rollout -----------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        started = time.perf_counter()
        rewards_BF = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rollout = Rollout(
            indices=ranks.gathered([example["index"] for example in inputs]),
            golds=ranks.gathered([example["answer"] for example in inputs]),
            texts=ranks.gathered([completion_text(completion) for completion in completions]),
            rewards_BF=rewards_BF.nan_to_num(0.0),  # gathered already; a reward function's None gives nothing
            lengths_B=rewards_BF.new_tensor(ranks.gathered([len(ids) for ids in completion_ids_list])),
            truncated_B=rewards_BF.new_tensor(
                ranks.gathered([ids[-1] not in self.eos_token_ids for ids in completion_ids_list])
            ),
            seconds_for_rewards=time.perf_counter() - started,
        )
        return rewards_BF

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *arguments, **options):
        if self.use_vllm or not self.shares_prompts:
            if self.rollout_pixels and not self.use_vllm:  # vLLM processes them itself; the others want every row's
                pixels = [part for part in self.rollout_pixels if part is not None]
                multimodal_fields = {**multimodal_fields, "pixel_values": torch.cat(pixels)}
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *arguments, **options)
        images_per_row = [len(own or ()) for own in images or [None] * len(prompt_ids)]
        with prompts_read_once(self._inner_model, self._groups(len(prompt_ids)), images_per_row) as features:
            output = super()._generate_single_turn(prompt_ids, images, multimodal_fields, *arguments, **options)
        if tower_is_frozen(self._inner_model):
            self.rollout_features = features
        return output

    def _groups(self, rows: int) -> list[int]:
        """Which prompt each of this process's rows answers, counted over all processes: a group may lie on two."""
        first = ranks.rank() * rows
        return [place // self.recipe.grpo.num_generations for place in range(first, first + rows)]

    @property
    def _inner_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model).get_base_model().model

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
        self.rollout_features = None
        started = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model)
        try:
            with (
                watched_forwards(model) as forwards,
                without_dropout(model),
                images_processed_once(self.processing_class, self._groups(len(inputs))) as self.rollout_pixels,
            ):
                batch = super()._generate_and_score_completions(inputs)
        except torch.OutOfMemoryError:
            raise out_of_memory(f"sampling {len(inputs)} completions at once") from None
        fault = generation_fault(forwards)
        assert self.use_vllm or fault is None, f"{fault} while sampling"  # vLLM has a cache and passes of its own
        self.seconds["generate"] += time.perf_counter() - started - self.rollout.seconds_for_rewards
        self.seconds["reward"] += self.rollout.seconds_for_rewards
        self.sampled_tokens += self.rollout.lengths_B.sum().item()
        if self.rollout_pixels:
            batch["pixel_values"] = self.rollout_pixels
        return self._with_shared_prompts(batch), self.rollout

    def _generate_and_score_completions(self, inputs):
        batch, rollout = self._sample(inputs)
        scored = score_rollout(rollout, self.recipe)
        on_zero_variance, num_resampled = self.recipe.grpo.zero_variance_groups, 0
        if on_zero_variance == "resample":
            batch, scored, num_resampled = resampled(batch, scored, self.recipe, self._other_items, self._sample)
        own = slice(ranks.rank() * len(inputs), (ranks.rank() + 1) * len(inputs))  # groups may lie across processes
        # Whatever is in the batch is split along with it.
        batch["advantages"] = scored.credit.advantages_NG.flatten()[own]
        batch["kl_weights"] = scored.credit.kl_weights_NG.flatten()[own]
        batch["correct"] = scored.correct_NG.flatten()[own]
        is_skipped_N = without_variance(scored) & (on_zero_variance != "keep")
        if is_skipped_N.any():
            batch = without_rows(batch, is_skipped_N.repeat_interleave(self.recipe.grpo.num_generations)[own])
        self._score_frozen_policies(batch)
        self.rollout_figures = {
            **scored.figures(self.recipe),
            "resampled_groups": float(num_resampled),
            "skipped_groups": is_skipped_N.sum().item(),
            "tokens_per_second": self.sampled_tokens / self.seconds["generate"],
        }
        if self.record_rollout and ranks.is_main():
            self.record_rollout(self.state.global_step + 1, scored)
        return batch

    def _other_items(self, number: int, round_number: int) -> list[dict[str, Any]]:
        """Prompts in the place of others; the same ones where a run is continued."""
        rng = random.Random(f"{self.recipe.train.seed} {self.state.global_step} {round_number}")
        return [self.train_dataset[rng.randrange(len(self.train_dataset))] for _ in range(number)]

    # --- scoring and loss --------------------------------------------------------------------------------------------

    def _score(self, batch: dict[str, Any], rows_per_pass: int | None = None) -> tuple[Tensor, Tensor]:
        with self.accelerator.autocast():
            return token_logps(
                self.accelerator.unwrap_model(self.model),
                batch,
                temperature=self.temperature,
                rows_per_pass=rows_per_pass,
                entropy_gradient=self.recipe.apo.entropy_coef > 0,
            )

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
            return self.pass_size.fitting(lambda rows: self._score(batch, rows_per_pass=rows))[0]

        with torch.no_grad(), without_dropout(model):
            with reference_mode(model):
                batch["ref_logps"] = score()
            if batch.get("old_per_token_logps") is not None:
                batch["old_per_token_logps"] = score()
        self.seconds["score"] += time.perf_counter() - started

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
        # Before the passes: out of memory repeats them on one process alone, and this asks all of them.
        totals = self._step_totals()
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
        for done in passes:
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
        return loss

    def _forward(self, inputs: dict[str, Any], num_tokens: float, num_sequences: float) -> Pass:
        logps, entropies = self._score(inputs)
        loss, figures = apo_loss(
            logps,
            # Fully on-policy, the old policy is the policy: the ratio is 1 and only its gradient matters.
            inputs.get("old_per_token_logps", logps.detach()),
            inputs["ref_logps"],
            inputs["completion_mask"],
            inputs["advantages"],
            inputs["kl_weights"],
            beta=self.recipe.grpo.beta,
            epsilon=self.recipe.grpo.epsilon,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            entropies_BT=entropies,
            entropy_coef=self.recipe.apo.entropy_coef,
        )
        return Pass(inputs, loss, figures, logps, entropies)

    def _step_totals(self) -> tuple[float, float]:
        """Tokens and sequences that this optimizer step trains on, over all its micro-batches and processes."""
        passes = self.current_gradient_accumulation_steps
        first = self._step % self.args.steps_per_generation // passes * passes
        masks = [batch["completion_mask"] for batch in self._buffered_inputs[first : first + passes]]
        counts = {
            "tokens": sum(mask.sum().item() for mask in masks),
            "sequences": sum(mask.any(dim=-1).sum().item() for mask in masks),
        }
        tokens, sequences = ranks.summed(counts).values()
        return max(tokens, 1), max(sequences, 1)

    # --- record ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._metrics["train"].clear()  # TRL's own figures: ours cover them, under one name each
        if "grad_norm" in logs:  # an optimizer step; the other call is the summary at the end of training
            logs = {
                **self.rollout_figures,
                **self.step_figures.over_ranks(),
                "grad_norm": logs["grad_norm"],
                "learning_rate": logs["learning_rate"],
                "skipped_nonfinite_steps": self.nonfinite_guard.skipped,
                **self.more_figures(),
                **self._step_cost(),
            }
            self._start_step()
        Trainer.log(self, logs, start_time)
        del self.state.log_history[:-KEPT_LOGS]  # it would grow in memory and in every checkpoint

    def _step_cost(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.step_started
        return {
            **{f"seconds_{phase}": spent for phase, spent in self.seconds.items()},
            "seconds_train": seconds - sum(self.seconds.values()),
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(),
        }

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Ours is written once, at the end, into the run directory."""

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with room_for_checkpoint(self.run_dir, folder, self.trained_parameters):
            super()._save_checkpoint(model, trial)
            if ranks.is_main():
                seal_checkpoint(folder)
        if ranks.is_main():
            self.checkpoint_saved()
        ranks.wait()  # nobody trains on, or ends, beside a checkpoint that is half there

    def _save_rng_state(self, output_dir):
        """Each process has a random state of its own; the main one writes them all."""
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            files = ranks.gathered([(file.name, file.read_bytes()) for file in Path(folder).iterdir()])
        if ranks.is_main():
            for name, content in files:
                (Path(output_dir) / name).write_bytes(content)
