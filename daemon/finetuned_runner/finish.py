"""The end of a recipe: from the state of the training to what is left behind and said."""

from __future__ import annotations

from pathlib import Path

from finetuned_daemon.runs.contract import EndReason, Result, StopWish
from finetuned_runner.control import NO_ROOM_FOR_EVENTS, Watch
from finetuned_runner.trainer import RunTrainer


def stopped(trainer: RunTrainer, watch: Watch) -> Result:
    """The result of a run that a wish, or the quota, ended."""
    step = trainer.state.global_step
    saved = trainer.saved_here()
    asked = "Stopped by SIGTERM" if watch.cause == "signal" else "Stopped"
    if watch.wish is None:
        return Result(
            end_reason=EndReason.QUOTA_USED_UP,
            message=f"The training quota is used up at step {step}; once there is more of it, "
            f"resume from {saved}.",
            step=step,
        )
    if step == 0:
        message = f"{asked} before the first step was done; there was nothing to save."
    elif saved is not None:
        message = f"{asked} at step {step}; resume from {saved}."
    elif watch.wish is StopWish.DISCARD:
        message = f"Stopped at step {step}; as wished, this step was not saved."
    else:
        message = (
            f"{asked} at step {step}, before a new step was done; resume from the same checkpoint."
        )
    if watch.cause == "disk":
        return Result(
            end_reason=EndReason.DISK_FULL, message=f"{NO_ROOM_FOR_EVENTS} {message}", step=step
        )
    return Result(end_reason=EndReason.STOPPED_BY_USER, message=message, step=step)


def abandoned(trainer: RunTrainer, what: Path) -> Result:
    """The result of a run that waited for room to save its last words, and was told to discard."""
    step = trainer.state.global_step
    return Result(
        end_reason=EndReason.STOPPED_BY_USER,
        message=f"Stopped at step {step} while it waited for room; as wished, {what.name} was not "
        "saved.",
        step=step,
    )


def completed(trainer: RunTrainer, output: Path) -> Result:
    """The result of a run that came to its end."""
    step = trainer.state.global_step
    if trainer.ends_early:
        reason, message = (
            EndReason.EARLY_STOPPED,
            f"The evaluation loss improved no more; ended at step {step}.{_best(trainer)}",
        )
    elif trainer.args.max_steps > 0:
        reason, message = (
            EndReason.STEP_LIMIT,
            f"training.max_steps ({trainer.args.max_steps}) is reached.",
        )
    else:
        reason, message = (
            EndReason.FINISHED,
            f"All {trainer.args.num_train_epochs:g} epochs are done.",
        )
    return Result(end_reason=reason, message=message, step=step, output_path=str(output))


def _best(trainer: RunTrainer) -> str:
    """Where the best checkpoint is: the weights at the end are worse."""
    path, loss = trainer.ranking.best_path, trainer.ranking.best_loss
    if not path:
        return " None of its checkpoints was evaluated at its step."
    return f" The best checkpoint, with an evaluation loss of {loss:.4f}, is {path}."
