"""What a training logs, at which loss it stops, and what its checkpoints keep of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from cbd_hf._trl import GKDTrainer
from cbd_hf.data.columns import EXAMPLE_ID
from cbd_hf.distillation.batching import BLANK, first_rows, is_blank
from cbd_hf.distillation.checkpoints import last_complete_checkpoint, last_written_checkpoint
from cbd_hf.distillation.config import StepwiseDistillationConfig
from cbd_hf.distillation.guards import LossGuard
from cbd_hf.distillation.student import LossParts


if TYPE_CHECKING:
    from transformers.trainer_utils import EvalLoopOutput, TrainOutput


class AccountingTrainer(GKDTrainer):
    """
    The part of [`StepwiseDistillationTrainer`] that counts and watches. A subclass says what the loss is, and calls
    `_start_accounting` before the first step, `_begin_step` before each, `_count` and `_watch` in every micro-batch.
    """

    args: StepwiseDistillationConfig
    model: PreTrainedModel

    def _start_accounting(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._guard = LossGuard(self.args.max_loss_ratio, self.args.output_dir)
        self._step_loss: torch.Tensor | float = 0.0
        self._step_examples: list[int] = []

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        As in `Trainer`; but `resume_from_checkpoint=True` passes over what a killed process has left of a checkpoint.

        Taken is the last checkpoint that is marked as complete (see [`train_resumably`]); where none has a mark, the
        last that has its last file.

        Raises:
            ValueError: there is none to resume from.
            LossError: a loss or gradient is not finite, or the loss exploded.
        """
        if resume_from_checkpoint is True:
            directory = str(self.args.output_dir)
            found = last_complete_checkpoint(directory) or last_written_checkpoint(directory)
            (found,) = broadcast_object_list([found])
            if found is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but output_dir={directory} has no checkpoint that was written to "
                    "its end: leave it out to start anew, or name a checkpoint."
                )
            resume_from_checkpoint = found
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _begin_step(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self._step_loss = 0.0
        self._step_examples = [
            example
            for batch in batches
            for example in batch.get(EXAMPLE_ID, torch.empty(0)).tolist()
            if example != BLANK
        ]

    def _watch(self, loss: torch.Tensor) -> None:
        """Stop at a bad loss of the whole step, before its last backward and so before the weights change."""
        self._step_loss += loss
        if self.accelerator.sync_gradients:
            step_loss = self.accelerator.reduce(self._step_loss, "mean")
            self._guard.check(step_loss.item(), self.state.global_step + 1, self._all_examples)

    def _all_examples(self) -> list[int]:
        """The rows of the global batch: of all processes, which call this together."""
        return gather_object(self._step_examples)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16:  # the loss scaler of fp16 skips what overflows
            self._guard.check_gradient(norm)
        return norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        # Here, where no older checkpoint has been deleted yet: Trainer does that at the end of _save_checkpoint.
        if self.args.should_save:
            self._guard.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._guard.load(checkpoint)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if is_blank(inputs):  # not left out: processes count together
            names = ("input_ids", "attention_mask")
            inputs = {name: inputs[name][:, :0] for name in names if name in inputs}
        super()._track_num_input_tokens(inputs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, with the loss per supervised token: not the mean of the batches' means."""
        self._sums.pop("eval", None)  # of predict(), which logs nothing
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if output.metrics is not None and "eval" in self._sums:
            total, _, _, tokens, _ = self.accelerator.reduce(self._sums["eval"], "sum").tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(tokens, 1)
        return output

    def _without_repeated(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The last batch of an evaluation without the labels of rows that accelerate has repeated to fill it up."""
        state = self.accelerator.gradient_state
        if not (state.in_dataloader and state.end_of_dataloader and state.remainder > 0):
            return inputs
        replica = self.accelerator.process_index // (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
        rows = len(inputs["labels"])
        left = max(state.remainder - replica * rows, 0)  # processes have their rows one behind the other
        # Padding-free rows lie in one.
        return first_rows(inputs, left) if left < rows and "attention_mask" in inputs else inputs

    def _count(self, parts: LossParts, tokens: int, seen: torch.Tensor | int) -> None:
        """Add to the sums that the next log divides; kept on the device until then."""
        mode = "train" if self.model.training else "eval"
        values = [parts.total.detach(), parts.divergence, parts.hidden, torch.tensor(tokens), torch.as_tensor(seen)]
        sums = torch.stack([value.to(self.accelerator.device, torch.float32) for value in values])
        self._sums[mode] = self._sums.get(mode, 0) + sums.to(_summing_dtype(sums.device))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `SFTTrainer`, with `divergence` and `hidden_loss` per supervised token since the last log."""
        mode = "train" if self.model.training else "eval"
        sums = self._sums.pop(mode, None)
        if sums is not None:
            _, divergence, hidden, tokens, seen = self.accelerator.reduce(sums, "sum").tolist()
            metrics = self._metrics[mode]
            if self.args.cross_entropy_weight < 1:
                metrics["divergence"] = [divergence / max(tokens, 1)]
            if self.args.hidden_loss_weight:
                metrics["hidden_loss"] = [hidden / max(tokens, 1)]
            if mode == "train":
                self._total_train_tokens += int(seen) // self.get_tp_size()
            metrics["num_tokens"] = [self._total_train_tokens]
        super().log(logs, start_time)


def _summing_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


__all__ = ["AccountingTrainer"]
